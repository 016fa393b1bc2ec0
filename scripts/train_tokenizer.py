"""Trains a byte-level BPE tokenizer; the console command ``stellarbyte tokenizer`` is the same."""

from stellarbyte_jax.interrupts import imports

with imports():
    import sys

    from stellarbyte_jax.cli.tokenizer import main

if __name__ == "__main__":
    sys.exit(main())
