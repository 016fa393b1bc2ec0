"""Tells what a model is and costs; the console command ``stellarbyte info`` is the same."""

import sys

from stellarbyte_jax.command import imports

with imports():
    from stellarbyte_jax.cli.info import main

if __name__ == "__main__":
    sys.exit(main())
