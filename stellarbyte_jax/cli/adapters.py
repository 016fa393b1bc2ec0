"""``convert to-peft``: the adapters of a run as a directory of PEFT."""

import argparse
from pathlib import Path
from typing import Any

from stellarbyte_jax.cli.program import DTYPES, also_spelled, local_path, path_or_name
from stellarbyte_jax.command import imports
from stellarbyte_jax.config.foreign import shown

with imports():
    from stellarbyte_jax.checkpoint.source import find_source, tokenizer_of
    from stellarbyte_jax.checkpoint.weights import load_base, load_config, load_weights, run_and_step
    from stellarbyte_jax.config import TrainConfig
    from stellarbyte_jax.hf.hub import is_hub_name
    from stellarbyte_jax.hf.peft import save_adapter
    from stellarbyte_jax.model.decoder import ByteTransformer
    from stellarbyte_jax.tokenizer.directory import TokenizerDirectory


def add_to_peft(commands: Any) -> argparse.ArgumentParser:
    """Adds the options of the command."""
    to_peft = commands.add_parser("to-peft", help="write the adapters of a run as a directory of PEFT")
    to_peft.add_argument("source", type=local_path, help="run directory with adapters, or checkpoints/STEP in one")
    to_peft.add_argument("target", type=local_path, help="directory to write")
    to_peft.add_argument("--step", type=int, help="checkpoint to take; the newest where none is named")
    to_peft.add_argument(
        "--base",
        type=path_or_name,
        help="Hugging Face directory of the base, or owner/name of the hub; default: what init_from of the run names",
    )
    dtypes = ("float32", "bfloat16", "float16")
    to_peft.add_argument("--dtype", type=also_spelled(DTYPES), choices=dtypes, default="float32", help="of the numbers")
    return to_peft


def to_peft(arguments: argparse.Namespace) -> None:
    """Writes a directory of PEFT."""
    run, step = run_and_step(arguments.source, arguments.step)
    config = load_config(run, step)
    if not config.model.lora.r:
        raise ValueError(f"{run} has no adapters (model.lora.r is 0): to-hf writes its weights")
    base = arguments.base or _base_of(run, step, config)
    tokenizer = tokenizer_of(run, config)
    save_adapter(
        arguments.target,
        ByteTransformer(config.model),
        load_weights(run, step)[1],
        base=base,
        dtype=arguments.dtype,
        tokenizer=tokenizer if TokenizerDirectory(tokenizer).files else None,
        overwrite=arguments.overwrite,
    )
    for path in sorted(arguments.target.iterdir()):
        print(f"{path.stat().st_size:>16,} bytes  {path}")
    print(f"wrote {arguments.target}: adapters of {base}")


def _base_of(run: Path, step: int | None, config: TrainConfig) -> str:
    """The base as a Hugging Face directory or a name of the hub, where a run began with one."""
    if config.init_from is not None and is_hub_name(config.init_from):
        return config.init_from
    base = load_base(run, step)["path"]
    source = find_source(base, weights=False)
    if source.is_run:
        raise ValueError(
            f"the base of these adapters, {shown(base)}, is a run, which PEFT cannot read: write it with convert to-hf "
            "as a Hugging Face directory, and name that by --base"
        )
    if source.is_adapter:
        raise ValueError(
            f"the base of these adapters is an adapter itself, {shown(base)}: merge that into its own base with PEFT, "
            "save it, and name the directory by --base"
        )
    return base
