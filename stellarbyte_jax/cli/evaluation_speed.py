"""How fast requests of lm-eval are answered, by this project and by lm-eval's backend for transformers (``hf``).

Both read one exported directory with random weights, and answer the same requests, made of the embedded corpus. Of
several batch sizes each kind of request counts with the fastest.
"""

import contextlib
import io
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stellarbyte_jax.cli.measurements import tell
from stellarbyte_jax.command import imports
from stellarbyte_jax.config import TrainConfig
from stellarbyte_jax.config.files import shipped

_REPEATS = 3
_CHOICES = 4


@dataclass(frozen=True)
class _Size:
    """What is asked: questions of so many words, their choices, whole texts, and answers of so many tokens."""

    questions: int
    words: int
    choice_words: int
    texts: int
    answers: int
    new_tokens: int
    batch_sizes: tuple[int, ...]


_ON_GPU = _Size(256, 300, 10, 128, 256, 64, (32, 128))
_ON_CPU = _Size(8, 100, 8, 8, 8, 16, (1, 4, 16))


def ours(config: TrainConfig, steps: int) -> dict[str, Any]:
    """Requests a second of :class:`evaluation.backend.Backend`, by kind."""
    del steps
    with imports():
        import jax

        from stellarbyte_jax.checkpoint.bundle import load_bundle
        from stellarbyte_jax.evaluation.adapter import as_lm
        from stellarbyte_jax.launch import environment

    size = _ON_CPU if jax.default_backend() == "cpu" else _ON_GPU
    with tempfile.TemporaryDirectory() as directory:
        bundle = load_bundle(_export(config, Path(directory)))
        dtype = {"compute_dtype": "float32"} if size is _ON_CPU else {"compute_dtype": "bfloat16"}
        bundle = _with(bundle, dtype)
        measured = _measured(size, lambda batch_size: as_lm(bundle, batch_size=batch_size))
    return {**measured, **dtype, "on": environment()}


def peer(config: TrainConfig, steps: int) -> dict[str, Any]:
    """The same of lm-eval's backend for transformers."""
    del steps
    with imports():
        import jax
        import lm_eval  # pyright: ignore[reportMissingImports]
        import torch
        import transformers
        from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    jax.config.update("jax_platforms", "cpu")  # it only writes the weights; the GPU's memory is the peer's
    on_gpu = torch.cuda.is_available()
    dtype = "bfloat16" if on_gpu else "float32"
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings(action="ignore"):
        exported = str(_export(config, Path(directory)))
        make: Any = HFLM  # its decorators hide what it takes
        model = make(pretrained=exported, dtype=dtype, device="cuda" if on_gpu else "cpu", batch_size=1)

        def with_batch_size(batch_size: int) -> Any:
            model.batch_size_per_gpu = batch_size
            return model

        measured = _measured(_ON_GPU if on_gpu else _ON_CPU, with_batch_size, disable_tqdm=True)
    on = torch.cuda.get_device_name() if on_gpu else f"cpu, {torch.get_num_threads()} threads"
    versions = f"lm-eval {lm_eval.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    return {**measured, "compute_dtype": dtype, "on": f"{versions}, {on}"}


def _with(bundle: Any, settings: dict[str, Any]) -> Any:
    from stellarbyte_jax.inference.reconfigure import reconfigure

    return replace(bundle, model=reconfigure(bundle.model, [f"{name}={value}" for name, value in settings.items()]))


def _export(config: TrainConfig, directory: Path) -> Path:
    import jax

    from stellarbyte_jax.hf.directory import save_pretrained
    from stellarbyte_jax.model.decoder import ByteTransformer, init_params

    model = ByteTransformer(config.model)
    params = jax.jit(lambda: init_params(model, jax.random.key(0)))()
    save_pretrained(directory / "hf", model, params, tokenizer=config.data.tokenizer)
    return directory / "hf"


def _measured(size: _Size, make: Callable[[int], Any], **options: Any) -> dict[str, Any]:
    """Median requests a second of each kind, with the batch size that was fastest, and what all answers add up to."""
    found: dict[str, Any] = {}
    for name, kind, arguments in _requests(size):
        best: tuple[float, int, float] = (0.0, 0, 0.0)
        for batch_size in size.batch_sizes:
            try:
                first, rates, answers = _repeat(make(batch_size), kind, arguments, options)
            except RuntimeError as error:
                if "out of memory" not in str(error).lower():
                    raise
                tell(f"{name}, {batch_size} at once: out of memory")
                continue
            tell(f"{name}, {batch_size} at once: {statistics.median(rates):,.2f} requests/s, first {first:.1f} s")
            best = max(best, (statistics.median(rates), batch_size, first))
            if kind != "generate_until":
                found[f"{name}_mean"] = round(_mean(answers), 3)
        rate, batch_size, first = best
        found |= {f"{name}_per_second": round(rate, 2), f"{name}_batch": batch_size, f"{name}_first": round(first, 2)}
    return {**found, "repeats": _REPEATS}


def _repeat(
    model: Any, kind: str, arguments: Sequence[tuple[Any, ...]], options: dict[str, Any]
) -> tuple[float, list[float], list[Any]]:
    from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]

    seconds, answers = [], []
    for _ in range(1 + _REPEATS):
        requests = [Instance(request_type=kind, doc={}, arguments=each, idx=0) for each in arguments]  # pyright: ignore
        start = time.perf_counter()
        with contextlib.redirect_stderr(io.StringIO()):  # bars
            answers = getattr(model, kind)(requests, **options)
        seconds.append(time.perf_counter() - start)
    return seconds[0], [len(arguments) / each for each in seconds[1:]], answers


def _mean(answers: Sequence[Any]) -> float:
    return statistics.fmean(answer[0] if isinstance(answer, tuple) else answer for answer in answers)


def _requests(size: _Size) -> Iterator[tuple[str, str, list[tuple[Any, ...]]]]:
    """Kinds of requests: choices of several tokens and of one, whole texts, answers."""
    lines = (shipped("data") / "tiny_bilingual_train.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [record["text"] for record in map(json.loads, lines) if record["lang"] == "en"]
    words = [word for text in texts for word in text.split()]

    def taken(at: int, count: int) -> str:
        return " ".join(words[(at + i) % len(words)] for i in range(count))

    questions = [taken(number * size.words, size.words) for number in range(size.questions)]
    endings = [
        [taken(7 * number + 31 * choice, size.choice_words) for choice in range(_CHOICES)]
        for number in range(size.questions)
    ]
    yield (
        "choices",
        "loglikelihood",
        [(question, f" {choice}") for question, choices in zip(questions, endings, strict=True) for choice in choices],
    )
    yield "letters", "loglikelihood", [(question, f" {letter}") for question in questions for letter in "ABCD"]
    yield "texts", "loglikelihood_rolling", [(texts[number % len(texts)],) for number in range(size.texts)]
    settings = {"until": ["\n\n"], "max_gen_toks": size.new_tokens, "do_sample": False}
    yield "answers", "generate_until", [(question, dict(settings)) for question in questions[: size.answers]]


WORKERS = {"eval": ours, "eval_huggingface": peer}
