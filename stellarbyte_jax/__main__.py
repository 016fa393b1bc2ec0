"""``python -m stellarbyte_jax`` is the console command ``stellarbyte``."""

from stellarbyte_jax.interrupts import imports

with imports():
    import sys

    from stellarbyte_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
