"""Checkpoints to and from Hugging Face directories.

``python scripts/convert.py to-hf RUN OUT [--dtype bfloat16] [--verify]``: RUN may also be ``RUN/checkpoints/STEP``.
``python scripts/convert.py from-hf DIR RUN [--verify]``: makes a run directory that training and generation start from.
"""

import argparse
import re
import shutil
import sys
from pathlib import Path
from typing import Any

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def size(text: str) -> int:
    """Bytes of a text such as ``5GB`` or ``500MiB``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text)
    if not match or match[2].upper() not in UNITS or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: expected a number and KB, MB, GB, KiB, MiB or GiB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    to_hf = commands.add_parser("to-hf", help="write a checkpoint as a Hugging Face directory")
    to_hf.add_argument("source", type=Path, help="run directory, or checkpoints/STEP in one")
    to_hf.add_argument("target", type=Path, help="directory to write")
    to_hf.add_argument("--step", type=int, help="checkpoint to take; the newest where none is named")
    to_hf.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    to_hf.add_argument("--max-shard-size", type=size, default="5GB", help="of one file, such as 5GB")
    to_hf.add_argument("--tokenizer", type=Path, help="directory to copy tokenizer files from; the run's where none")
    from_hf = commands.add_parser("from-hf", help="make a run directory from a Hugging Face directory")
    from_hf.add_argument("source", type=Path, help="Hugging Face directory")
    from_hf.add_argument("target", type=Path, help="run directory to write")
    for command in (to_hf, from_hf):
        command.add_argument("--verify", action="store_true", help="compare logits with transformers (needs torch)")
        command.add_argument("--overwrite", action="store_true", help="replace what an earlier conversion wrote")
    return parser.parse_args()


def to_hf(arguments: argparse.Namespace) -> Any:
    """Writes a Hugging Face directory; returns how well it agrees with transformers, where asked for."""
    from stellarbyte_jax.hf.directory import round_params, save_pretrained
    from stellarbyte_jax.hf.verify import compare_with_transformers
    from stellarbyte_jax.model.decoder import ByteTransformer
    from stellarbyte_jax.train.checkpoint import load_for_export

    run, step = arguments.source.absolute(), arguments.step
    if run.parent.name == "checkpoints" and run.name.isdigit():
        run, step = run.parents[1], int(run.name) if step is None else step
    config, params = load_for_export(run, step)
    model = ByteTransformer(config.model)
    tokenizer = arguments.tokenizer
    if tokenizer is None:
        found = [p for p in (run / "tokenizer", Path(config.data.tokenizer)) if (p / "tokenizer.json").is_file()]
        tokenizer = found[0] if found else None
    print(f"tokenizer: {tokenizer or 'none found, so the export has none; give --tokenizer DIR to add one'}")
    save_pretrained(
        arguments.target,
        model,
        params,
        dtype=arguments.dtype,
        max_shard_bytes=arguments.max_shard_size,
        tokenizer=tokenizer,
        overwrite=arguments.overwrite,
    )
    report(arguments.target, params)
    if not arguments.verify:
        return None
    return compare_with_transformers(arguments.target, model, round_params(params, arguments.dtype))


def from_hf(arguments: argparse.Namespace) -> Any:
    """Writes a run directory; returns how well it agrees with transformers, where asked for."""
    from stellarbyte_jax.hf.directory import copy_tokenizer, from_pretrained
    from stellarbyte_jax.hf.verify import compare_with_transformers
    from stellarbyte_jax.train.checkpoint import load_for_export, save_initial

    run = arguments.target
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        if not arguments.overwrite:
            raise ValueError(f"{run} is not empty: give another directory, or --overwrite to replace its checkpoints")
        if not (run / "checkpoints").is_dir():
            raise ValueError(f"{run} holds something that is no run (no checkpoints), so it is not overwritten")
    model, params = from_pretrained(arguments.source)
    for part in ("checkpoints", "tokenizer"):
        shutil.rmtree(run / part, ignore_errors=True)
    tokenizer = str(run / "tokenizer") if copy_tokenizer(arguments.source, run / "tokenizer") else None
    save_initial(run, model.config, params, tokenizer)
    report(run, params)
    if not arguments.verify:
        return None
    return compare_with_transformers(arguments.source, model, load_for_export(run)[1])


def report(target: Path, params: dict[str, Any]) -> None:
    """Prints what was written, and the number of parameters."""
    import jax

    for part in sorted(target.iterdir()):
        files = [part] if part.is_file() else [p for p in part.rglob("*") if p.is_file()]
        print(f"{sum(p.stat().st_size for p in files):>16,} bytes  {part}{'' if part.is_file() else '/'}")
    print(f"wrote {target}: {sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters")


def main() -> int:
    """Parses and converts."""
    arguments = parse()

    import jax

    from stellarbyte_jax.launch import quiet_libraries
    from stellarbyte_jax.train.checkpoint import CheckpointError

    quiet_libraries()
    jax.config.update("jax_platforms", "cpu")  # a conversion needs no accelerator, and may not fit into one
    try:
        agreement = {"to-hf": to_hf, "from-hf": from_hf}[arguments.command](arguments)
    except (ValueError, OSError, ImportError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if agreement is not None:
        print(f"verify: {agreement}: {'agrees with transformers' if agreement.ok else 'DOES NOT AGREE'}")
    return 0 if agreement is None or agreement.ok else 1


if __name__ == "__main__":
    sys.exit(main())
