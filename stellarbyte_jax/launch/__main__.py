"""``python -m stellarbyte_jax.launch doctor`` is ``stellarbyte doctor``."""

from stellarbyte_jax.interrupts import imports

with imports():
    import sys

    from stellarbyte_jax.cli.doctor import launch

if __name__ == "__main__":
    sys.exit(launch())
