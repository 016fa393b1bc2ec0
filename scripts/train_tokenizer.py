"""Trains a byte-level BPE tokenizer; the console command ``stellarbyte tokenizer`` is the same."""

import sys

from stellarbyte_jax.command import imports

with imports():
    from stellarbyte_jax.cli.tokenizer import main

if __name__ == "__main__":
    sys.exit(main())
