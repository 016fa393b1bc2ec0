"""Converts checkpoints to and from the Hugging Face format; the console command ``stellarbyte convert`` is the same."""

from stellarbyte_jax.interrupts import imports

with imports():
    import sys

    from stellarbyte_jax.cli.convert import main

if __name__ == "__main__":
    sys.exit(main())
