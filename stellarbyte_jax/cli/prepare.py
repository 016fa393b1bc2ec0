"""Tokenises text files once, into shards that training reads without further work."""

import argparse
import contextlib
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from stellarbyte_jax.cli.program import also_spelled, new_parser, path_or_name, typed, with_options
from stellarbyte_jax.command import command, imports
from stellarbyte_jax.config import ConfigError, TrainConfig
from stellarbyte_jax.config.files import parsed, shipped
from stellarbyte_jax.config.paths import real
from stellarbyte_jax.config.section import written

with imports():
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from stellarbyte_jax.data.shards import Prepared, prepare
    from stellarbyte_jax.data.text import TextFormat
    from stellarbyte_jax.hf.hub import local_directory
    from stellarbyte_jax.tokenizer.codec import Tokenizer, load_tokenizer

_OPTIONS = (
    "cache_dir",
    "fields",
    "on_error",
    "shard_tokens",
    "template",
    "text_documents",
    "tokenizer",
    "workers",
)


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line, prepares the data and returns the exit code."""
    parser = new_parser(
        "prepare",
        "Tokenise text files once, into shards for data.train.",
        "--input 'my_corpus/train/*.jsonl' --output prepared --tokenizer tokenizer",
        "--input 'books/*.txt' --output prepared --on-error skip",
    )
    add = parser.add_argument
    kinds = ".jsonl[.gz|.zst], .parquet, .arrow, .txt, or the directory of a data set (save_to_disk)"
    add("--input", nargs="+", required=True, metavar="GLOB", help=kinds)
    add("--output", type=path_or_name, required=True, metavar="DIR", help="a new or empty directory")
    tokenizer = "a directory, or owner/name of the hub (default: %(default)s)"
    add("--tokenizer", type=path_or_name, default=os.path.relpath(shipped("tokenizer")), metavar="DIR", help=tokenizer)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--fields", nargs="+", default=["text"], metavar="NAME", help="joined by a newline")
    form.add_argument("--template", help='such as "Question: {question}\\nAnswer: {answer}"')
    documents = "what a document of a .txt file is; blank lines part paragraphs (default: %(default)s)"
    kind = also_spelled({"files": "file", "paragraphs": "paragraph"})
    add("--text-documents", type=kind, choices=("file", "paragraph"), default="file", help=documents)
    add("--workers", type=int, default=1, metavar="N", help="processes (default: %(default)s)")
    add("--on-error", choices=("raise", "skip"), default="raise", help="what to do with bad lines")
    add("--shard-tokens", type=int, default=50_000_000, metavar="N", help="default: %(default)s")
    add("--cache-dir", metavar="DIR", help="default: ~/.cache/stellarbyte_jax")
    add("--overwrite", action="store_true", help="replace the shards of an earlier run")
    options = parser.parse_args(arguments)
    try:
        tokenizer = str(local_directory(options.tokenizer, weights=False))
        prepared = _prepare(options, tokenizer)
    except ValueError as error:
        raise ValueError(_told(str(error))) from error
    ones = "one" if prepared.skipped == 1 else "ones"
    skipped = f", {prepared.skipped:,} unusable {ones} skipped" if prepared.skipped else ""
    counts = {"document": prepared.documents, "token": prepared.tokens, "shard": len(prepared.shards)}
    counted = (f"{count:,} {what}{'' if count == 1 else 's'}" for what, count in counts.items())
    print(", ".join(counted) + skipped)
    print(f"next:\n  train:     {_train(options.output, options.tokenizer, load_tokenizer(tokenizer))}")
    print("  on a GPU:  the same with --config pretrain, for a model of 12 layers")
    return 0


def _train(output: str, name: str, tokenizer: Tokenizer) -> str:
    """The command that trains a small model on the shards, whatever the tokenizer has."""
    ends = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
    settings = [_named("data.train", output), f"data.tokenizer={name}", f"model.vocab_size={tokenizer.vocab_size}"]
    settings += [f"data.add_{end}=false" for end, token in ends.items() if token is None]
    settings.append(f"output_dir={Path('runs', real(output).name)}")
    return f"{typed('train')} --config quickstart --set {shlex.join(settings)}"


def _named(setting: str, path: str) -> str:
    """A setting that lists one path, as ``--set`` reads it: as JSON where it would be taken for several or none."""
    plain = f"{setting}={path}"
    with contextlib.suppress(ConfigError):
        if parsed(TrainConfig, [plain])[setting] == (path,):
            return plain
    return f"{setting}={written([path])}"


def _prepare(options: argparse.Namespace, tokenizer: str) -> Prepared:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(), transient=True)
    task = bar.add_task("tokenising", total=None)

    def show(read: int, tokens: int, total: int) -> None:
        begins = bar.console.is_terminal and not bar.live.is_started
        if begins:
            bar.start()  # not before: what is wrong is told first
        bar.update(task, completed=read, total=total, description=f"{tokens:,} tokens", refresh=begins)

    try:
        return prepare(
            options.input,
            options.output,
            tokenizer,
            text=TextFormat(tuple(options.fields), options.template),
            text_documents=options.text_documents,
            workers=options.workers,
            on_error=options.on_error,
            shard_tokens=options.shard_tokens,
            overwrite=options.overwrite,
            cache_dir=options.cache_dir,
            progress=show,
        )
    finally:
        if bar.live.is_started:  # to stop one that is not prints an empty line
            bar.stop()


def _told(message: str) -> str:
    """A message of the library, which may also be that of a run, with the options of this command."""
    message = re.sub(r"^inputs:", "--input:", with_options(message, _OPTIONS))
    return message.replace("another output directory", "another --output").replace("; the checkpoints are kept", "")
