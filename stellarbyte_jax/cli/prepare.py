"""Tokenises text files once, into shards that training reads without further work."""

import sys
from collections.abc import Sequence

from stellarbyte_jax.cli.program import new_parser
from stellarbyte_jax.command import command, imports

with imports():
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from stellarbyte_jax.data.shards import prepare
    from stellarbyte_jax.data.text import TextFormat


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line, prepares the data and returns the exit code."""
    parser = new_parser(
        "prepare",
        "Tokenise text files once, into shards for data.train.",
        "--input 'my_corpus/train/*.jsonl' --output prepared --tokenizer tokenizer",
    )
    parser.add_argument("--input", nargs="+", required=True, metavar="GLOB", help=".jsonl[.gz|.zst] or .parquet")
    parser.add_argument("--output", required=True, metavar="DIR", help="a new or empty directory")
    parser.add_argument("--tokenizer", default="tokenizer", metavar="DIR", help="directory (default: %(default)s)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--fields", nargs="+", default=["text"], metavar="NAME", help="joined by a newline")
    form.add_argument("--template", help='such as "Question: {question}\\nAnswer: {answer}"')
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes (default: %(default)s)")
    parser.add_argument("--on-error", choices=("raise", "skip"), default="raise", help="what to do with bad lines")
    parser.add_argument("--shard-tokens", type=int, default=50_000_000, metavar="N", help="default: %(default)s")
    parser.add_argument("--cache-dir", metavar="DIR", help="default: ~/.cache/stellarbyte_jax")
    parser.add_argument("--overwrite", action="store_true", help="replace the shards of an earlier run")
    options = parser.parse_args(arguments)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns) as bar:
            task = bar.add_task("tokenising", total=None)
            prepared = prepare(
                options.input,
                options.output,
                options.tokenizer,
                text=TextFormat(tuple(options.fields), options.template),
                workers=options.workers,
                on_error=options.on_error,
                shard_tokens=options.shard_tokens,
                overwrite=options.overwrite,
                cache_dir=options.cache_dir,
                progress=lambda read, tokens, total: bar.update(
                    task, completed=read, total=total, description=f"{tokens:,} tokens"
                ),
            )
    except KeyboardInterrupt:
        print(f"interrupted: {options.output} is incomplete, run again with --overwrite", file=sys.stderr)
        return 130
    skipped = f", {prepared.skipped:,} lines skipped" if prepared.skipped else ""
    print(f"{prepared.documents:,} documents, {prepared.tokens:,} tokens, {len(prepared.shards)} shards{skipped}")
    return 0
