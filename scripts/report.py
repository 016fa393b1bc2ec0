"""Writes a page with the plots of a run, or of several; the console command ``stellarbyte report`` is the same."""

import sys

from stellarbyte_jax.command import imports

with imports():
    from stellarbyte_jax.cli.report import main

if __name__ == "__main__":
    sys.exit(main())
