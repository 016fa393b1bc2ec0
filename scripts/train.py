"""Trains a model, or continues a run; the console command ``stellarbyte train`` is the same."""

from stellarbyte_jax.interrupts import imports

with imports():
    import sys

    from stellarbyte_jax.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
