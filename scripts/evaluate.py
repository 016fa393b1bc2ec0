"""Evaluates a model on tasks of lm-eval; the console command ``stellarbyte evaluate`` is the same."""

from stellarbyte_jax.interrupts import imports

with imports():
    import sys

    from stellarbyte_jax.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
