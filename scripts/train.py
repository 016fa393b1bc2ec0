"""Trains a model, or continues a run.

python scripts/train.py --config configs/pretrain.py [--set model.hidden_size=512 steps=1000 ...]
"""

import argparse
import sys

from stellarbyte_jax.config import ConfigError, load


def main() -> int:
    """Parses the command line and runs the training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a Python file with `def config() -> TrainConfig`")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="section.name=value", help="settings to change"
    )
    arguments = parser.parse_args()
    try:
        config = load(arguments.config, arguments.set)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    from stellarbyte_jax.train.guard import run_guarded
    from stellarbyte_jax.train.loop import train

    return run_guarded(lambda: train(config, arguments.config), config.output_dir)


if __name__ == "__main__":
    sys.exit(main())
