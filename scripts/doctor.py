"""Looks at this machine before a run; the console command ``stellarbyte doctor`` is the same."""

from stellarbyte_jax.interrupts import imports

with imports():
    import sys

    from stellarbyte_jax.cli.doctor import main

if __name__ == "__main__":
    sys.exit(main())
