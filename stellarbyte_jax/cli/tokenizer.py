r"""Trains the byte-level BPE tokenizer in stages over weighted corpora and writes tokenizer/.

A small one, from the embedded corpus::

    python scripts/train_tokenizer.py --output /tmp/small --corpus text='data/*_train.jsonl' --stage 4000:text

Files are read as data.train reads them; one of any other kind is a single document of text.

The committed one, from books, poetry, documentation and code that are not part of the repository. $C/corpus/*.jsonl
hold one object a line with the fields text and source, $C/html and $C/js are unpacked packages; tokenizer/README.md
describes them::

    python scripts/train_tokenizer.py --output tokenizer --baselines --sample-megabytes 20 \
      --corpus embedded='data/*_train.jsonl' \
      --corpus english_web=$C/corpus/en.jsonl \
      --only 'english_web:source=owt|wikipedia|c4|openwebtext|oscar|wiki_demo' \
      --corpus english_books=$C/corpus/en.jsonl \
      --only 'english_books:source=sotu|moby|shakespeare|kjv|anarchism|jargon|devil|fortunes' \
      --corpus english_docs=$C/corpus/en.jsonl \
      --only 'english_docs:source=handbook|reference|guide|help|gnome|policy|postgresql|python3|linux-doc|git' \
      --only 'english_docs:source=django|manpages|foldoc|rust|perl' \
      --corpus chinese_modern=$C/corpus/zh.jsonl --only 'chinese_modern:source=^deb:(?!fortunes)' \
      --corpus chinese_classical=$C/corpus/zh.jsonl --only 'chinese_classical:source=chinese-poetry' \
      --corpus mathematics=$C/corpus/en.jsonl --only 'mathematics:source=scipy|sklearn|sympy' \
      --corpus code=$C/corpus/code.jsonl --corpus javascript="$C/js/**/lib/*.js" \
      --corpus markup="$C/html/**/*.html" --corpus markup="$C/html/**/*.page" \
      --stage '18000: embedded=0.5, english_web=3, english_books=1, english_docs=1, chinese_modern=2,
               chinese_classical=1' \
      --stage '26000: english_web=2, english_books=1, english_docs=1, chinese_modern=1.5, chinese_classical=1,
               mathematics=2, code=4, javascript=0.5' \
      --stage '32000: embedded=0.5, english_web=3, english_books=1.5, english_docs=1.5, chinese_modern=2,
               chinese_classical=1, mathematics=1.5, code=3, javascript=0.5, markup=1.5'
"""

import argparse
import contextlib
import functools
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from stellarbyte_jax.cli.parser import Parser
from stellarbyte_jax.cli.program import local_path, positive, told_by_options, typed
from stellarbyte_jax.command import command, directory_for, imports, remedy

with imports():
    from stellarbyte_jax.data.tokenizer_corpus import TokenizerCorpus, draw
    from stellarbyte_jax.tokenizer.directory import LIBRARY, write_json
    from stellarbyte_jax.tokenizer.training.evaluation import evaluate, pieces_of
    from stellarbyte_jax.tokenizer.training.format import build, save
    from stellarbyte_jax.tokenizer.training.stages import Stage, check_stages, train

_REPORT = "report.json"
_SCRIPT = "python scripts/train_tokenizer.py"  # in the examples above


def parse_corpora(
    paths: Sequence[str],
    filters: Sequence[str],
    text_field: str,
    cache_dir: str | None = None,
    on_error: Literal["raise", "skip"] = "raise",
) -> dict[str, TokenizerCorpus]:
    """Reads ``NAME=GLOB`` and ``NAME:FIELD=REGEX``, alternatives where repeated. Raises ValueError on other forms."""
    globs: dict[str, list[str]] = {}
    for argument in paths:
        name, equals, pattern = argument.partition("=")
        if not (name and equals and pattern):
            raise ValueError(f"--corpus {argument}: write NAME=GLOB")
        globs.setdefault(name, []).append(pattern)
    only: dict[str, dict[str, str]] = {name: {} for name in globs}
    for argument in filters:
        target, equals, pattern = argument.partition("=")
        name, colon, field = target.partition(":")
        if not (equals and colon and field) or name not in only:
            raise ValueError(f"--only {argument}: write NAME:FIELD=REGEX with a NAME of --corpus ({sorted(only)})")
        only[name][field] = f"{only[name][field]}|{pattern}" if field in only[name] else pattern
    return {
        name: TokenizerCorpus(
            name=name,
            paths=tuple(patterns),
            text_field=text_field,
            only=only[name],
            on_error=on_error,
            cache_dir=cache_dir,
        )
        for name, patterns in globs.items()
    }


def parse_stage(argument: str) -> Stage:
    """Reads ``SIZE:NAME=SHARE,NAME=SHARE``; a share that is not written is 1. Raises ValueError on any other form."""
    size, _, mixture = argument.partition(":")
    shares = (item.partition("=") for item in mixture.split(",") if item.strip())
    try:
        return Stage(int(size), {name.strip(): float(share or 1) for name, _, share in shares})
    except ValueError:
        raise ValueError(f"--stage {argument}: write SIZE:NAME=SHARE,NAME=SHARE such as 20000:en=3,zh=2") from None


def _megabytes(text: str) -> float:
    try:
        size = float(text)
    except ValueError:
        size = math.nan
    if not 0 <= size < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of megabytes, 0 or more")
    return size


@contextlib.contextmanager
def _output(path: Path, overwrite: bool) -> Iterator[None]:
    """Makes the directory before the work, where a tokenizer can be written there; work that fails leaves none.

    Raises:
      ValueError: There is a tokenizer, which may not be replaced.
      OSError: It cannot be written.
    """
    if (path / LIBRARY).exists() and not overwrite:
        raise ValueError(f"{path} holds a tokenizer already: give another --output, or --overwrite to replace it")
    with contextlib.ExitStack() as stack:
        with _writing(path):
            stack.enter_context(directory_for(path))
            with tempfile.TemporaryFile(dir=path):
                pass
        yield


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        advice = remedy(error, "--output") or "choose another --output"
        raise OSError(f"{path} cannot be written: {error.strerror or error}; {advice}") from error


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line, trains, evaluates on held-out documents and writes the directory."""
    started = time.monotonic()
    summary, _, examples = (__doc__ or "").partition("\n")
    parser = Parser(
        prog=typed("tokenizer"),
        description=summary,
        epilog=examples.replace(_SCRIPT, typed("tokenizer")),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = functools.partial(parser.add_argument, required=True)
    add("--corpus", action="append", metavar="NAME=GLOB", help=".jsonl[.gz|.zst], .parquet or text files; may repeat")
    add("--stage", action="append", metavar="SIZE:NAME=SHARE,...", help="vocabulary size and mixture; in order")
    add("--output", type=local_path, help="directory to write")
    add = parser.add_argument
    add("--only", action="append", default=[], metavar="NAME:FIELD=REGEX", help="records to take; repeat for more")
    add("--text-field", default="text", help="field of a record that holds the text (default: %(default)s)")
    add("--on-error", choices=("raise", "skip"), default="raise", help="what to do with bad lines")
    add("--cache-dir", metavar="DIR", help="default: ~/.cache/stellarbyte_jax")
    add("--sample-megabytes", type=_megabytes, default=40, help="of each corpus (default: %(default)s)")
    add(
        "--held-out-megabytes", type=_megabytes, default=1, help="of each corpus, for the report (default: %(default)s)"
    )
    add("--max-token-length", type=positive, default=24, help="in bytes (default: %(default)s)")
    add("--model-max-length", type=positive, default=32768, help="written to the config (default: %(default)s)")
    add("--baselines", action="store_true", help="also train GPT-2-like and lossy tokenizers to compare with")
    add("--overwrite", action="store_true", help="replace an earlier tokenizer in --output")
    options = parser.parse_args(arguments)

    with told_by_options(("cache_dir",)):
        _work(options, started)
    return 0


def _work(options: argparse.Namespace, started: float) -> None:
    corpora = parse_corpora(options.corpus, options.only, options.text_field, options.cache_dir, options.on_error)
    stages = [parse_stage(s) for s in options.stage]
    check_stages(stages, corpora)
    sizes = int(options.sample_megabytes * 1e6), int(options.held_out_megabytes * 1e6)

    def sample(cut):
        return {name: draw(corpus, cut, *sizes) for name, corpus in corpora.items()}

    with _output(options.output, options.overwrite):
        samples = sample(pieces_of())
        for name, drawn in samples.items():
            skipped = f", {drawn.skipped:,} lines skipped" if drawn.skipped else ""
            read = f"{drawn.training_bytes / 1e6:.1f} MB, {len(drawn.pieces)} distinct pieces"
            print(f"{name}: {read}{skipped}", flush=True)
        merges = train(samples, stages, options.max_token_length, functools.partial(print, flush=True))
        with _writing(options.output):
            save(build(merges), options.output, options.model_max_length)
    print(f"wrote {options.output} after {time.monotonic() - started:.0f} s", flush=True)
    report = evaluate(merges, samples, stages, sample if options.baselines else None)
    with _writing(options.output / _REPORT):
        write_json(options.output / _REPORT, report)
    for name, figures in report["tokenizer"].items():
        print(f"{name}: {figures['bytes_per_token']:.3f} bytes a token, round trip {figures['round_trip']:.2%}")
    for name, reason in report["skipped_baselines"].items():
        print(f"baseline {name} skipped: {reason}")
