"""Samples of text: how a run continues its ``sample_prompts``, and the file that keeps what it wrote."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from stellarbyte_jax.config import TrainConfig
from stellarbyte_jax.inference.capacity import TooLongError, limits_of
from stellarbyte_jax.inference.programs import cast_for_inference
from stellarbyte_jax.inference.request import Request
from stellarbyte_jax.inference.text import continue_text
from stellarbyte_jax.launch import processes, write_failure
from stellarbyte_jax.model.decoder import ByteTransformer
from stellarbyte_jax.model.trees import Params
from stellarbyte_jax.training.chat import ends_of_texts, prompt_ids, tokenizer_of_run
from stellarbyte_jax.training.jsonl import keep_lines, read_lines

SAMPLES = "samples.jsonl"  # in the run's directory
Sample = tuple[str, str]  # a prompt, and the text that follows it
# Small models repeat themselves where the likeliest token is always taken.
_TEMPERATURE, _TOP_K, _MOST_TOKENS = 0.8, 40, 64


def check(config: TrainConfig) -> None:
    """Raises ValueError where a prompt is empty, or does not fit into the model with its continuation."""
    if not config.sample_prompts:
        return
    tokenizer = tokenizer_of_run(config)
    for prompt in config.sample_prompts:
        row = prompt_ids(config, tokenizer, prompt)
        try:
            Request.make(config.model, [row], max_new_tokens=_new_tokens(config))
        except TooLongError:
            raise ValueError(f"sample_prompts: {prompt[:40]!r} {_too_long(config, len(row))}") from None
        except ValueError as error:
            raise ValueError(f"sample_prompts: {prompt[:40]!r} cannot be continued: {error}") from None


def _too_long(config: TrainConfig, tokens: int) -> str:
    """What is said of a prompt of so many tokens."""
    new, positions = _new_tokens(config), limits_of(config.model).positions
    assert positions is not None
    enough = min(2 * tokens - 1, tokens + _MOST_TOKENS)  # since half of the positions, or so many, are for new tokens
    return (
        f"has {tokens} tokens, and with {new} new ones the model has room for {positions - new}: shorten it, or "
        f"set model.max_position_embeddings={enough}"
    )


class SampleFile:
    """``samples.jsonl``: a line a prompt, ``{"step", "prompt", "text"}``, the text without its prompt.

    Only whole rounds of prompts are written. On resume, lines past the step resumed from are dropped: they will be
    written again.
    """

    def __init__(self, run_dir: Path, start_step: int) -> None:
        """Mends the file for the steps after ``start_step``; it is made with the first round."""
        self._path = run_dir / SAMPLES
        self._step, self._prompts = processes.from_main(lambda: self._mended(start_step))

    def _mended(self, start_step: int) -> list[Any]:
        """Step and prompts of the last round."""
        if not self._path.exists():
            return [0, []]
        keep_lines(self._path, lambda line: line["step"] <= start_step)
        step, prompts = 0, []
        for _, line in read_lines(self._path):
            if line is not None:
                prompts = [*(prompts if line["step"] == step else ()), line.get("prompt")]
                step = line["step"]
        return [step, prompts]

    def has(self, step: int, prompts: Sequence[str]) -> bool:
        """Whether the last round was made after this step, of these prompts."""
        return self._step == step and self._prompts == list(prompts)

    def write(self, step: int, samples: Sequence[Sample]) -> None:
        """Appends a round, which takes the place of one after the same step."""
        replaces = self._step == step
        self._step, self._prompts = step, [prompt for prompt, _ in samples]
        if not processes.is_main():
            return
        lines = [json.dumps({"step": step, "prompt": p, "text": t}, ensure_ascii=False) + "\n" for p, t in samples]
        try:
            if self._path.exists() and replaces:
                keep_lines(self._path, lambda line: line["step"] < step)
            with self._path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write("".join(lines))
        except OSError as error:
            raise write_failure(self._path, error) from error


def _no_tracker(step: int, samples: Sequence[Sample]) -> None:
    """A run that is complete has no trackers open."""


class Sampler:
    """Continues the prompts of a run and keeps the texts.

    Attributes:
      stopped: asked before each prompt; where it comes true, the round is left to a run that goes on.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: ByteTransformer,
        start_step: int,
        stopped: Callable[[], bool],
        publish: Callable[[int, Sequence[Sample]], None] = _no_tracker,
    ) -> None:
        """Mends ``samples.jsonl`` for the steps after ``start_step``; ``publish`` takes whole rounds for trackers."""
        self._config, self._model, self._publish = config, model, publish
        self._file = SampleFile(Path(config.output_dir), start_step)
        self.stopped = stopped

    def due(self, step: int) -> bool:
        """Whether a round belongs after this step of a run that goes on, and was not made yet."""
        interval = self._config.sample_interval
        return interval is not None and step > 0 and step % interval == 0 and self.missing(step)

    def missing(self, step: int) -> bool:
        """Whether there are prompts, and no round of them after this step."""
        prompts = self._config.sample_prompts
        return len(prompts) > 0 and not self._file.has(step, prompts)

    def sample(self, params: Params, step: int, say: Callable[[str], None]) -> None:
        """Makes the round of this step: a line for each prompt, and the file."""
        made = []
        for prompt, text in self._continued(params):
            say(f"sample: {prompt}|{text}")
            made.append((prompt, text))
        if len(made) == len(self._config.sample_prompts):
            self._file.write(step, made)
            self._publish(step, made)

    def _continued(self, params: Params) -> Iterator[Sample]:
        """Prompts and texts, which follow from the weights alone: nothing of the run's random numbers is used."""
        config = self._config
        tokenizer = tokenizer_of_run(config)
        ends = ends_of_texts(config, tokenizer)
        params = cast_for_inference(self._model, params)
        for seed, prompt in enumerate(config.sample_prompts):
            if self.stopped():
                return
            (text,) = continue_text(
                self._model,
                params,
                tokenizer,
                [prompt_ids(config, tokenizer, prompt)],
                stop_tokens=ends,
                max_new_tokens=_new_tokens(config),
                temperature=_TEMPERATURE,
                top_k=_TOP_K,
                seed=seed,
            ).texts
            yield prompt, text


def _new_tokens(config: TrainConfig) -> int:
    return min(_MOST_TOKENS, config.model.max_position_embeddings // 2)
