"""Tokenizes text files once, before training; the console command ``stellarbyte prepare`` is the same."""

from stellarbyte_jax.interrupts import imports

with imports():
    import sys

    from stellarbyte_jax.cli.prepare import main

if __name__ == "__main__":
    sys.exit(main())
