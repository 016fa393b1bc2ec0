"""``python -m stellarbyte_jax`` is the console command ``stellarbyte``."""

import sys

from stellarbyte_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
