"""Tells what a model is and costs; the console command ``stellarbyte info`` is the same."""

from stellarbyte_jax.interrupts import imports

with imports():
    import sys

    from stellarbyte_jax.cli.info import main

if __name__ == "__main__":
    sys.exit(main())
