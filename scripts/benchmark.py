"""Measures throughput, beside a peer in the same run; the console command ``stellarbyte benchmark`` is the same."""

from stellarbyte_jax.interrupts import imports

with imports():
    import sys

    from stellarbyte_jax.cli.benchmark import main

if __name__ == "__main__":
    sys.exit(main())
