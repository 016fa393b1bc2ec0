"""Checkpoints to and from Hugging Face directories, from the original's, to another vocabulary, and to experts."""

import argparse
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stellarbyte_jax.cli.adapters import add_to_peft, to_peft
from stellarbyte_jax.cli.program import DTYPES, also_spelled, local_path, new_parser, path_or_name, told_by_options
from stellarbyte_jax.cli.tensors import inspect_checkpoints
from stellarbyte_jax.command import command, imports
from stellarbyte_jax.config.files import shipped
from stellarbyte_jax.config.paths import real

with imports():
    import jax
    import numpy as np

    from stellarbyte_jax.checkpoint.checksum import array_checksums
    from stellarbyte_jax.checkpoint.source import find_source, tokenizer_of
    from stellarbyte_jax.checkpoint.store import TOKENIZER, CheckpointError
    from stellarbyte_jax.checkpoint.weights import (
        load_lazy_weights,
        load_training_facts,
        load_weights,
        run_and_step,
        save_initial,
    )
    from stellarbyte_jax.config import DataConfig
    from stellarbyte_jax.hf.card import TrainingFacts
    from stellarbyte_jax.hf.directory import open_pretrained, round_params, save_pretrained
    from stellarbyte_jax.hf.families import FAMILIES
    from stellarbyte_jax.hf.gguf import dropped_by_llama_cpp
    from stellarbyte_jax.hf.hub import is_hub_name, local_directory
    from stellarbyte_jax.hf.original import LAYOUTS
    from stellarbyte_jax.hf.original import from_original as read_original
    from stellarbyte_jax.hf.settings import read_config
    from stellarbyte_jax.hf.verify import Agreement, compare_with_transformers, require_torch
    from stellarbyte_jax.inspect.costs import parameter_counts
    from stellarbyte_jax.launch import quiet_libraries
    from stellarbyte_jax.model.decoder import ByteTransformer
    from stellarbyte_jax.tokenizer.codec import Tokenizer, check_vocabulary, load_tokenizer
    from stellarbyte_jax.tokenizer.directory import TokenizerDirectory, copy_tokenizer
    from stellarbyte_jax.tokenizer.special import adds_bos, as_list, kept_ids, stop_ids
    from stellarbyte_jax.training.messages import parameters
    from stellarbyte_jax.upcycling import upcycle as upcycle_weights
    from stellarbyte_jax.upcycling import upcycled_config
    from stellarbyte_jax.vocabulary import fit_tokenizer, resize_vocabulary

_VERIFIED_ROWS, _VERIFIED_TOKENS = 8, 128
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def size(text: str) -> int:
    """Bytes of a text such as ``5GB`` or ``500MiB``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text)
    if not match or match[2].upper() not in UNITS or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: expected a number and KB, MB, GB, KiB, MiB or GiB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = new_parser(
        "convert",
        "Checkpoints to and from Hugging Face directories, from the original's, to another size of the vocabulary, and "
        "from one MLP in a layer to experts.",
        "to-hf RUN OUT [--dtype bfloat16] [--verify]               RUN may also be RUN/checkpoints/STEP",
        "to-peft RUN OUT [--base DIR]                              the adapters of a run, for PEFT",
        "from-hf DIR RUN [--verify]                                makes a run of DIR, or of owner/name of the hub",
        "from-original FILE.pth RUN [--config CONFIG]              makes a run of a checkpoint of the original",
        "inspect DIR [OTHER]                                       tensors of a checkpoint, or how two differ",
        "resize DIR RUN --tokenizer TOKENIZER                      the same of either, with a row for each token",
        "upcycle DIR RUN moe.num_experts=8                         the same of either, with experts that are copies",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    to_hf = commands.add_parser("to-hf", help="write a checkpoint as a Hugging Face directory")
    to_hf.add_argument("source", type=local_path, help="run directory, or checkpoints/STEP in one")
    to_hf.add_argument("target", type=local_path, help="directory to write")
    to_hf.add_argument("--step", type=int, help="checkpoint to take; the newest where none is named")
    dtypes = ("float32", "bfloat16", "float16")
    to_hf.add_argument("--dtype", type=also_spelled(DTYPES), choices=dtypes, default="float32", help="of the weights")
    to_hf.add_argument("--max-shard-size", type=size, default="5GB", help="of one file, such as 5GB")
    to_hf.add_argument("--tokenizer", type=path_or_name, help="to copy its files; the run's where none")
    families = f"one of {', '.join(FAMILIES)} (default: the most widely read one that computes the same)"
    to_hf.add_argument("--family", metavar="NAME", help=families)
    peft = add_to_peft(commands)
    from_hf = commands.add_parser("from-hf", help="make a run directory from a Hugging Face directory")
    from_hf.add_argument("source", type=path_or_name, help="Hugging Face directory, or owner/name of the hub")
    from_hf.add_argument("target", type=local_path, help="run directory to write")
    from_hf.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a model of the hub")
    from_original = commands.add_parser(
        "from-original", help="make a run directory from a checkpoint of the original StellarByte"
    )
    from_original.add_argument("source", type=local_path, help="what torch.save wrote, or .safetensors")
    from_original.add_argument("target", type=local_path, help="run directory to write")
    from_original.add_argument(
        "--config", type=local_path, help="the original's, JSON or YAML; without one sizes are those of the tensors"
    )
    from_original.add_argument("--layout", choices=("auto", *LAYOUTS), default="auto", help="default: auto")
    from_original.add_argument("--tokenizer", type=path_or_name, help="of the model: a directory, or owner/name")
    resize = commands.add_parser("resize", help="make a run directory with another tokenizer and vocabulary size")
    resize.add_argument(
        "source",
        type=path_or_name,
        help="Hugging Face directory, owner/name of the hub, run, or its checkpoints/STEP",
    )
    resize.add_argument("target", type=local_path, help="run directory to write")
    resize.add_argument("--step", type=int, help="checkpoint of a run to take; the newest where none is named")
    resize.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a model of the hub")
    resize.add_argument(
        "--tokenizer", type=path_or_name, required=True, help="the tokenizer from now on: a directory, or owner/name"
    )
    resize.add_argument("--vocab-size", type=int, help="default: the model's, or the tokenizer's where that is larger")
    resize.add_argument("--multiple", type=int, help="rows are padded to a multiple of this; default: as before")
    grow = commands.add_parser("upcycle", help="make a run directory whose layers have experts, copies of their MLPs")
    grow.add_argument(
        "source",
        type=path_or_name,
        help="dense model: Hugging Face directory, owner/name of the hub, run, or its checkpoints/STEP",
    )
    grow.add_argument("target", type=local_path, help="run directory to write")
    grow.add_argument("settings", nargs="*", metavar="moe.NAME=VALUE", help="of the experts, such as moe.num_experts=8")
    grow.add_argument("--step", type=int, help="checkpoint of a run to take; the newest where none is named")
    grow.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a model of the hub")
    grow.add_argument("--seed", type=int, default=0, help="of the routers and of --noise (default: 0)")
    grow.add_argument(
        "--noise",
        type=float,
        default=0.0,
        help="change each expert at random, by this share of its weights' spread (default: 0, logits stay as they are)",
    )
    look = commands.add_parser("inspect", help="list the tensors of a checkpoint, or say how two differ")
    look.add_argument(
        "source", type=path_or_name, help="Hugging Face directory, owner/name, run, or its checkpoints/STEP"
    )
    look.add_argument(
        "other", nargs="?", type=path_or_name, help="another one, to compare with; status 1 if they differ"
    )
    look.add_argument("--step", type=int, help="checkpoint of the run SOURCE; the newest where none is named")
    look.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a model of the hub")
    for each in (to_hf, from_hf):
        each.add_argument("--verify", action="store_true", help="compare logits with transformers (needs torch)")
    for each in (to_hf, peft, from_hf, from_original, resize, grow):
        each.add_argument("--overwrite", action="store_true", help="replace what an earlier conversion wrote")
    return parser.parse_args(arguments)


def to_hf(arguments: argparse.Namespace) -> Any:
    """Writes a Hugging Face directory; returns how well it agrees with transformers, where asked for."""
    run, step = run_and_step(arguments.source, arguments.step)
    config, params = load_lazy_weights(run, step)
    network = config.model
    if network.lora.r:
        network, params = find_source(run, step).weights()
    model = ByteTransformer(network)
    tokenizer, own = None, tokenizer_of(run, config)
    if arguments.tokenizer is not None:
        tokenizer = local_directory(arguments.tokenizer, weights=False)
    elif TokenizerDirectory(own).files:
        tokenizer = own
    print(f"tokenizer: {tokenizer or 'none found, so the export has none; give --tokenizer DIR to add one'}")
    check_tokenizer(tokenizer, config.model.vocab_size)
    ids = {} if tokenizer in (None, own) else kept_ids(own, tokenizer, config.model.vocab_size)
    save_pretrained(
        arguments.target,
        model,
        params,
        dtype=arguments.dtype,
        max_shard_bytes=arguments.max_shard_size,
        tokenizer=tokenizer,
        ids=ids,
        overwrite=arguments.overwrite,
        training=facts_of(run, step),
        family=arguments.family,
    )
    report(arguments.target, model)
    family, written = read_config(arguments.target)
    for setting in dropped_by_llama_cpp(family.model_type, written):
        print(f"a GGUF file of it would lack {setting}: see docs/gguf.md")
    if not arguments.verify:
        return None
    return compare(arguments.target, model, round_params(params, arguments.dtype, family))


def facts_of(run: Path, step: int | None) -> TrainingFacts | None:
    """What the model card tells of the training; without those facts weights are converted all the same."""
    try:
        return load_training_facts(run, step)
    except CheckpointError as error:
        print(f"the model card tells nothing of the training: {error}")
        return None


def from_hf(arguments: argparse.Namespace) -> Any:
    """Writes a run directory; returns how well it agrees with transformers, where asked for."""
    run = arguments.target
    check_target(run, arguments.overwrite)
    source = local_directory(arguments.source, arguments.revision)
    with open_pretrained(source) as (model, params):
        check_tokenizer(source, model.config.vocab_size)
        if not TokenizerDirectory(source).is_complete:
            print("tokenizer: none that is whole, so what reads texts asks for one; to-hf takes --tokenizer DIR")
        write_run(run, model.config, params, source, begins_with_bos(source), {}, arguments.source)
    if not arguments.verify:
        return None
    return compare(source, model, load_weights(run)[1])


def from_original(arguments: argparse.Namespace) -> None:
    """Writes a run directory from a checkpoint of the original."""
    run = arguments.target
    check_target(run, arguments.overwrite)
    tokenizer = None
    if arguments.tokenizer is not None:
        tokenizer = local_directory(arguments.tokenizer, weights=False)
    found = read_original(arguments.source, config=arguments.config, layout=arguments.layout)
    check_tokenizer(tokenizer, found.model.config.vocab_size)
    add_bos = found.layout.adds_bos and (tokenizer is None or has_bos(tokenizer))
    print(f"layout: {found.layout.name}; texts begin with{'' if add_bos else 'out'} bos")
    print(f"tokenizer: {tokenizer or 'none, so what reads texts asks for one; give --tokenizer DIR to add it'}")
    write_run(run, found.model.config, found.params, tokenizer, add_bos, {}, str(arguments.source))


def has_bos(tokenizer: Path) -> bool:
    """Whether a directory holds a whole tokenizer that has a bos."""
    return TokenizerDirectory(tokenizer).is_complete and load_tokenizer(tokenizer).bos_id is not None


def compare(directory: Path, model: ByteTransformer, params: Any) -> Agreement:
    """How well a Hugging Face directory agrees with a model: on texts, or without a tokenizer on random tokens."""
    tokens_BT = None
    if TokenizerDirectory(directory).is_complete:
        tokens_BT = text_rows(load_tokenizer(directory), min(_VERIFIED_TOKENS, model.config.max_position_embeddings))
    print("comparing with transformers on", "random tokens" if tokens_BT is None else "texts of the embedded corpus")
    return compare_with_transformers(directory, model, params, tokens_BT)


def text_rows(tokenizer: Tokenizer, length: int) -> np.ndarray | None:
    """Beginnings of texts of the embedded corpus, int32 [B, T] with T at most ``length``; None if all are too short."""
    lines = (shipped("data") / "tiny_bilingual_valid.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines[:: max(1, len(lines) // _VERIFIED_ROWS)]]
    rows = [ids for ids in (tokenizer.encode(text)[:length] for text in texts) if len(ids) > 1]
    return np.asarray([ids[: min(map(len, rows))] for ids in rows], np.int32) if rows else None


def resize(arguments: argparse.Namespace) -> None:
    """Writes a run directory whose model has a row for each token of the given tokenizer."""
    run = arguments.target
    check_outside(run, arguments.source, arguments.tokenizer)
    check_target(run, arguments.overwrite)
    directory = local_directory(arguments.tokenizer, weights=False)
    tokenizer = load_tokenizer(directory)
    source = find_source(arguments.source, arguments.step, arguments.revision)
    config, params = source.weights()
    if source.is_run:
        _, before, add_bos = source.settings()
    else:
        before, add_bos = source.path, begins_with_bos(directory)
    wanted, multiple = arguments.vocab_size, arguments.multiple
    if wanted is None:
        resized, params = fit_tokenizer(config, params, tokenizer, vocab_size_multiple=multiple)
    elif wanted < tokenizer.vocab_size:
        raise ValueError(
            f"--vocab-size {wanted} is less than the {tokenizer.vocab_size} tokens of {arguments.tokenizer}: "
            f"give at least {tokenizer.vocab_size}, or a smaller tokenizer"
        )
    else:
        resized, params = resize_vocabulary(config, params, wanted, vocab_size_multiple=multiple)
    ids = kept_ids(before, directory, resized.vocab_size)
    ends = {*stop_ids(directory, tokenizer.eos_id), *as_list(ids.get("eos_token_id", []))}
    left_out = [i for i in stop_ids(before, None) if i not in ends]
    if left_out:
        print(
            f"ends of texts: {left_out} of {before} are no longer any, by what {arguments.tokenizer} says of these ids"
        )
    write_run(run, resized, params, directory, add_bos, ids, arguments.source)
    print(
        f"vocabulary: {config.vocab_size:,} tokens in {config.padded_vocab_size:,} rows before, "
        f"{resized.vocab_size:,} in {resized.padded_vocab_size:,} now; the tokenizer has {tokenizer.vocab_size:,}"
    )


def upcycle(arguments: argparse.Namespace) -> None:
    """Writes a run directory of a dense model whose MLPs become experts."""
    run = arguments.target
    check_outside(run, arguments.source)
    check_target(run, arguments.overwrite)
    source = find_source(arguments.source, arguments.step, arguments.revision)
    before, tokenizer, add_bos = source.settings()
    config = upcycled_config(before, arguments.settings)
    _, params = source.weights()
    params = upcycle_weights(before, params, config, seed=arguments.seed, noise=arguments.noise)
    has_files = bool(TokenizerDirectory(tokenizer).files)
    write_run(run, config, params, tokenizer if has_files else None, add_bos, {}, arguments.source)
    layers = len(config.moe_layers)
    print(
        f"experts: {config.moe.num_experts} of {config.expert_size} channels in {layers} of {config.num_hidden_layers} "
        f"layers, {config.moe.num_experts_per_tok} for each token"
    )
    if arguments.noise:
        print(f"noise: experts differ from the MLPs by {arguments.noise:g} of their spread, and so do the logits")
    else:
        print(f"the logits are those of {arguments.source}, up to rounding")
    if config.moe.dispatch == "capacity":
        print(
            "moe.dispatch=capacity: in training, tokens that experts have no room for pass the layer by from the start"
        )
    if config.moe.num_experts_per_tok == 1:
        print(
            "moe.num_experts_per_tok=1: an expert's weight is always 1, so routers learn from losses of balance alone"
        )


def check_outside(run: Path, *sources: str) -> None:
    """Raises ValueError where a directory that is read lies in the run that is to be written."""
    for path in sources:
        if not is_hub_name(path) and real(path).is_relative_to(real(run)):
            raise ValueError(f"{path} lies in {run}, which is to be written: give another target directory")


def check_target(run: Path, overwrite: bool) -> None:
    """Raises ValueError where a run directory may not be written."""
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        if not overwrite:
            raise ValueError(f"{run} is not empty: give another directory, or --overwrite to replace its checkpoints")
        if not (run / "checkpoints").is_dir():
            raise ValueError(f"{run} holds something that is no run (no checkpoints), so it is not overwritten")


def check_tokenizer(directory: Path | None, vocab_size: int) -> None:
    """Raises ValueError where a directory holds a tokenizer that is larger than the model's vocabulary."""
    # Weights may be converted with half a tokenizer or none: only what reads texts needs a whole one.
    if directory and TokenizerDirectory(directory).is_complete:
        check_vocabulary(load_tokenizer(directory), vocab_size)


def begins_with_bos(tokenizer: Path) -> bool:
    """Whether the tokenizer of a Hugging Face directory begins texts with bos; without a whole one, as in training."""
    if not TokenizerDirectory(tokenizer).is_complete:
        return DataConfig().add_bos
    loaded = load_tokenizer(tokenizer)
    return adds_bos(tokenizer, loaded.bos_id, loaded.eos_id)


def write_run(
    run: Path, config: Any, params: Any, tokenizer: Path | None, add_bos: bool, ids: dict[str, Any], source: str
) -> None:
    """Writes weights of ``source`` as step 0 of a run directory, with what there is of a tokenizer and further ids."""
    checksums = array_checksums(params)  # lazy ones are read for them: damaged ones remove nothing
    for part in ("checkpoints", TOKENIZER):
        shutil.rmtree(run / part, ignore_errors=True)
    if tokenizer is not None:
        copy_tokenizer(tokenizer, run / TOKENIZER, ids)
    # Its own place even where that stays empty: whatever lies in the folder where this is typed is not its tokenizer.
    own = str(run / TOKENIZER)
    save_initial(run, config, params, own, add_bos=add_bos, init_from=source, checksums=checksums)
    report(run, ByteTransformer(config))


def report(target: Path, model: ByteTransformer) -> None:
    """Prints what was written, and the number of parameters."""
    for part in sorted(target.iterdir()):
        files = [part] if part.is_file() else [p for p in part.rglob("*") if p.is_file()]
        print(f"{sum(p.stat().st_size for p in files):>16,} bytes  {part}{'' if part.is_file() else '/'}")
    print(f"wrote {target}: {parameters(parameter_counts(model))}")


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Parses and converts."""
    options = parse(arguments)
    if getattr(options, "verify", False):
        require_torch()  # before anything is written
    quiet_libraries()
    jax.config.update("jax_platforms", "cpu")  # a conversion needs no accelerator, and may not fit into one
    with told_by_options(()):
        if options.command == "inspect":
            return 0 if inspect_checkpoints(options.source, options.other, options.step, options.revision) else 1
        converters = {
            "to-hf": to_hf,
            "to-peft": to_peft,
            "from-hf": from_hf,
            "from-original": from_original,
            "resize": resize,
            "upcycle": upcycle,
        }
        agreement = converters[options.command](options)
    if agreement is not None:
        print(f"verify: {agreement}: {'agrees with transformers' if agreement.ok else 'DOES NOT AGREE'}")
    return 0 if agreement is None or agreement.ok else 1
