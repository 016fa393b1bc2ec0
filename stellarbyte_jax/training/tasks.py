"""Tasks of lm-eval during a run: when they are due, and that each round is measured once."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stellarbyte_jax.checkpoint.bundle import Bundle
from stellarbyte_jax.command import MendableError
from stellarbyte_jax.config import TrainConfig
from stellarbyte_jax.evaluation.adapter import as_lm, require_lm_eval
from stellarbyte_jax.evaluation.tasks import Result, check_tasks, evaluate_tasks
from stellarbyte_jax.launch import processes, write_failure
from stellarbyte_jax.model.decoder import ByteTransformer
from stellarbyte_jax.model.trees import Params
from stellarbyte_jax.tokenizer.codec import load_tokenizer
from stellarbyte_jax.tokenizer.directory import write_json
from stellarbyte_jax.tokenizer.special import stop_ids
from stellarbyte_jax.training.trackers import METRICS, JsonlTracker

_PREFIX, _ERROR = "tasks/", "_stderr"
_NOTE = "tasks.json"  # in the run's directory: the last round
_MOST_ROWS = 32  # of one call; memory is needed for training too
Publish = Callable[[int, dict[str, float]], None]


class _StoppedError(Exception):
    """A signal came during a round."""


def check(config: TrainConfig) -> None:
    """Raises an error where tasks cannot be measured: no lm-eval, no such task, or no data of it."""
    if not config.evaluation.tasks:
        return
    try:
        require_lm_eval()
        check_tasks(config.evaluation.tasks)
    except (ImportError, MendableError) as error:
        raise type(error)(f"evaluation.tasks: {error}") from error


class TaskRounds:
    """Measures a run's weights on its tasks, and publishes ``tasks/NAME/METRIC``.

    Attributes:
      stopped: asked between batches; where it comes true, the round is left to a run that goes on.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: ByteTransformer,
        start_step: int,
        stopped: Callable[[], bool],
        publish: Publish | None = None,
    ) -> None:
        """Reads after which step tasks were measured last.

        Args:
          config: of the run.
          model: its network.
          start_step: the run goes on after it; what was measured later is measured again.
          stopped: see the class.
          publish: takes numbers for ``metrics.jsonl`` and trackers; None: for a run without any open, they are appended
            to the file.
        """
        self._config, self._model, self.stopped = config, model, stopped
        self._publish = publish or self._append
        self._note = Path(config.output_dir) / _NOTE
        self._done = processes.from_main(lambda: _read(self._note, start_step))

    def due(self, step: int) -> bool:
        """Whether a round belongs after this step of a run that goes on, and was not made yet."""
        interval = self._config.evaluation.tasks_interval
        return interval is not None and step > 0 and step % interval == 0 and self.missing(step)

    def missing(self, step: int) -> bool:
        """Whether there are tasks, and no round of them after this step."""
        return len(self._config.evaluation.tasks) > 0 and self._done != self._round(step)

    def measure(self, params: Params, step: int, say: Callable[[str], None]) -> None:
        """Makes the round of this step: a line for each metric, and the numbers for the file and the trackers.

        Raises:
          ImportError, MendableError, ValueError: tasks cannot be measured.
        """
        evaluation = self._config.evaluation
        lm = as_lm(self._bundle(params), batch_size=_MOST_ROWS, progress=self._progress)
        try:
            results = evaluate_tasks(lm, evaluation.tasks, limit=evaluation.tasks_limit)
        except _StoppedError:
            say("tasks broken off: they are measured when the run goes on")
            return
        numbers = _numbers(results)
        told = {name: value for name, value in numbers.items() if not name.endswith(_ERROR)}
        errors = {name: f" ± {numbers[name + _ERROR]:.4f}" if name + _ERROR in numbers else "" for name in told}
        say("tasks: " + ", ".join(f"{n.removeprefix(_PREFIX)} {v:.4f}{errors[n]}" for n, v in told.items()))
        self._publish(step, numbers)
        self._done = self._round(step)
        if not processes.is_main():
            return
        try:
            write_json(self._note, self._done)
        except OSError as error:
            raise write_failure(self._note, error) from error

    def _round(self, step: int) -> dict[str, Any]:
        """What a round after this step is of, in JSON values."""
        evaluation = self._config.evaluation
        return {"step": step, "tasks": list(evaluation.tasks), "limit": evaluation.tasks_limit}

    def _bundle(self, params: Params) -> Bundle:
        data = self._config.data
        tokenizer = load_tokenizer(data.tokenizer)
        ends = [i for i in stop_ids(tokenizer.path, tokenizer.eos_id) if 0 <= i < self._model.config.vocab_size]
        return Bundle(self._model, params, tokenizer, ends, data.add_bos, plain_text=True)

    def _progress(self, kind: str, done: int, total: int) -> None:
        del kind, done, total
        if self.stopped():
            raise _StoppedError

    def _append(self, step: int, numbers: dict[str, float]) -> None:
        if not processes.is_main():
            return
        tracker = JsonlTracker(Path(self._config.output_dir) / METRICS, step)
        try:
            tracker.log(step, numbers)
        finally:
            tracker.close()


def _read(note: Path, start_step: int) -> dict[str, Any] | None:
    """The last round up to this step; None where the note is of a later one, missing or broken."""
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    step = found.get("step") if isinstance(found, dict) else None
    return found if isinstance(step, int) and step <= start_step else None


def _numbers(results: list[Result]) -> dict[str, float]:
    """Values and standard errors by the names of metrics; what is no number is left out."""
    numbers = {}
    for result in results:
        name = f"{_PREFIX}{result.task}/{result.metric}"
        if isinstance(result.value, int | float):
            numbers[name] = float(result.value)
        if result.stderr is not None:
            numbers[name + _ERROR] = result.stderr
    return numbers
