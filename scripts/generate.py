"""Continues prompts with a trained or converted model; the console command ``stellarbyte generate`` is the same."""

from stellarbyte_jax.interrupts import imports

with imports():
    import sys

    from stellarbyte_jax.cli.generate import main

if __name__ == "__main__":
    sys.exit(main())
