"""Writes a page with the plots of a run, or of several; the console command ``stellarbyte report`` is the same."""

from stellarbyte_jax.interrupts import imports

with imports():
    import sys

    from stellarbyte_jax.cli.report import main

if __name__ == "__main__":
    sys.exit(main())
