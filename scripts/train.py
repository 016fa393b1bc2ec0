"""Trains a model, or continues a run.

python scripts/train.py --config configs/pretrain.py [--set model.hidden_size=512 steps=1000 ...]
"""

import argparse
import contextlib
import sys

from stellarbyte_jax.command import command, imports
from stellarbyte_jax.config import TrainConfig, load


@command
def main() -> int:
    """Parses the command line, runs the training and says what can be done next."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a Python file with `def config() -> TrainConfig`")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="section.name=value", help="settings to change"
    )
    arguments = parser.parse_args()
    config = load(arguments.config, arguments.set)
    with imports():
        from stellarbyte_jax.training.guard import run_guarded
        from stellarbyte_jax.training.run import train

    def run() -> int:
        finished = train(config)
        if finished.exit_code == 0:
            print(next_commands(config, arguments.config))
        return finished.exit_code

    return run_guarded(run, config.output_dir)


def next_commands(config: TrainConfig, config_path: str) -> str:
    """The commands that make sense after the run, to copy and paste."""
    with imports():
        from stellarbyte_jax.hf.families import export_family

    run = config.output_dir
    prompt = config.sample_prompts[0] if config.sample_prompts else "Once upon a time"
    lines = [
        "next:",
        f"  resume:    python scripts/train.py --config {config_path} --set steps={2 * config.steps}",
        f'  generate:  python scripts/generate.py --model {run} --prompt "{prompt}"',
    ]
    with contextlib.suppress(ValueError):
        export_family(config.model)
        lines.append(f"  convert:   python scripts/convert.py to-hf {run} {run}-hf --dtype bfloat16")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
