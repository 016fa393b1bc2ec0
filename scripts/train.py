"""Trains a model, or continues a run; the console command ``stellarbyte train`` is the same."""

import sys

from stellarbyte_jax.command import imports

with imports():
    from stellarbyte_jax.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
