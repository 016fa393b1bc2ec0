"""Tokenizes text files once, before training; the console command ``stellarbyte prepare`` is the same."""

import sys

from stellarbyte_jax.command import imports

with imports():
    from stellarbyte_jax.cli.prepare import main

if __name__ == "__main__":
    sys.exit(main())
