"""Continues prompts with a trained or converted model; the console command ``stellarbyte generate`` is the same."""

import sys

from stellarbyte_jax.command import imports

with imports():
    from stellarbyte_jax.cli.generate import main

if __name__ == "__main__":
    sys.exit(main())
