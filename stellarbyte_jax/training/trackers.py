"""Where metrics go besides the console: a JSONL file always, and the trackers that the settings name."""

import contextlib
import json
import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from stellarbyte_jax.command import MendableError, one_line
from stellarbyte_jax.config import TrainConfig
from stellarbyte_jax.config.foreign import json_object, shown
from stellarbyte_jax.launch import processes, write_failure
from stellarbyte_jax.tokenizer.directory import write_json
from stellarbyte_jax.training.jsonl import keep_lines
from stellarbyte_jax.training.samples import Sample

METRICS = "metrics.jsonl"  # in the run's directory
IDS = "trackers.json"  # in the run's directory
_ID_LENGTH = 21  # SwanLab takes no other one
_SWANLAB_CLOUD = ("cloud", "online")


class Tracker(Protocol):
    """Receives numbers and texts by step."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Takes the metrics of one optimizer step."""

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Takes a round of prompts and their continuations."""

    def close(self) -> None:
        """Writes out what is pending."""


class JsonlTracker:
    """One JSON object a line. On resume, lines past the step resumed from are dropped: they will be written again."""

    def __init__(self, path: Path, start_step: int, *, validated: bool = True) -> None:
        """Opens the file for the steps after ``start_step``, and for its validation where that is not ``validated``."""

        def keep(line: dict[str, Any]) -> bool:
            again = line["step"] == start_step and not validated and "validation/loss" in line
            return line["step"] <= start_step and not again

        keep_lines(path, keep)
        self._path = path
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Appends a line."""
        try:
            self._file.write(json.dumps({"step": step, **metrics}) + "\n")
            self._file.flush()
        except OSError as error:
            raise write_failure(self._path, error) from error

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """They have a file of their own: :class:`samples.SampleFile`."""

    def close(self) -> None:
        """Closes the file."""
        with contextlib.suppress(OSError):  # of a line that could not be written, which was told
            self._file.close()


class TensorBoardTracker:
    """Event files under ``output_dir/tensorboard``."""

    def __init__(self, directory: Path, start_step: int) -> None:
        """Opens an event file that hides earlier events past ``start_step``."""
        from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]

        self._writer = SummaryWriter(str(directory), purge_step=start_step + 1)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Writes scalars."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Writes texts, indented: TensorBoard takes them for Markdown, and shows such lines as they are."""
        for number, (prompt, text) in enumerate(samples, 1):
            lines = f"{prompt}|{text}".splitlines()
            self._writer.add_text(f"samples/{number}", "".join(f"    {line}\n" for line in lines), step)

    def close(self) -> None:
        """Flushes and closes the event file."""
        self._writer.close()


def known_as(run_dir: Path, tracker: str) -> str:
    """The id under which a tracker knows a run: made once, and kept in the run's directory.

    An earlier version gave the name of the directory to W&B: a run that it began goes on under that name.

    Raises:
      ValueError: the file of ids is damaged.
      OSError: it cannot be read or written.
    """
    path = run_dir / IDS
    try:
        ids = json_object(path.read_bytes(), str(path)) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{error}, or remove it: trackers begin new runs then") from error
    if tracker not in ids:
        named = tracker == "wandb" and (run_dir / "wandb").is_dir()
        ids[tracker] = _name(run_dir) if named else uuid.uuid4().hex[:_ID_LENGTH]
        try:
            write_json(path, ids)
        except OSError as error:
            raise write_failure(path, error) from error
    if not isinstance(ids[tracker], str) or not ids[tracker]:
        raise ValueError(
            f"{path}: the id of {tracker} must be a text, got {shown(ids[tracker])}; remove it for a new one"
        )
    return ids[tracker]


def _name(run_dir: Path) -> str:
    """The name of a directory, of ``.`` too."""
    return Path(os.path.abspath(run_dir)).name


def _begin(tracker: str, start: Callable[..., Any], offline: str, ids: Path | None, **settings: Any) -> Any:
    """What a tracker's ``start`` returns; ``ids`` is the file that holds the id of a run which is to go on.

    Raises:
      MendableError: it could not begin.
    """
    try:
        return start(**settings)
    except Exception as error:  # of the package's own kinds, whose names differ between its versions
        refused = "" if ids is None else f", or where it lets no run of this id go on, write another one into {ids}"
        raise MendableError(
            f"logging.trackers names {tracker!r}, which could not begin ({type(error).__name__}: "
            f"{one_line(str(error))}): log in with `{tracker} login`, or set {offline}{refused}"
        ) from error


def _kept_ids(run_dir: Path) -> Path | None:
    return run_dir / IDS if (run_dir / IDS).exists() else None


class WandbTracker:
    """A Weights & Biases run, continued on resume."""

    def __init__(self, config: TrainConfig) -> None:
        """Starts or continues the run with the id that is kept in the output directory, which gives it its name."""
        import wandb  # pyright: ignore[reportMissingImports]

        self._wandb: Any = wandb
        directory = Path(config.output_dir)
        self._run: Any = _begin(
            "wandb",
            wandb.init,
            "WANDB_MODE=offline",
            _kept_ids(directory),
            project="stellarbyte",
            name=_name(directory),
            id=known_as(directory, "wandb"),
            resume="allow",
            dir=config.output_dir,
            config=config.to_dict(),
        )
        # An axis of its own: W&B's counter never goes back, and what a resumed run logs again would be dropped.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Sends scalars."""
        self._run.log({**metrics, "step": step})

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Sends a table of prompts and texts."""
        table = self._wandb.Table(columns=["prompt", "text"], data=[list(sample) for sample in samples])
        self._run.log({"samples": table, "step": step})

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()


class SwanLabTracker:
    """A SwanLab experiment, continued on resume; away from its cloud each start makes a new one."""

    def __init__(self, config: TrainConfig) -> None:
        """Starts or continues the experiment with the id that is kept in the output directory."""
        import swanlab  # pyright: ignore[reportMissingImports]

        self._swanlab = swanlab
        directory = Path(config.output_dir)
        continues, ids = {}, None
        if os.environ.get("SWANLAB_MODE", "cloud") in _SWANLAB_CLOUD:  # refused in other modes
            ids = _kept_ids(directory)
            continues = {"id": known_as(directory, "swanlab"), "resume": "allow"}
        _begin(
            "swanlab",
            swanlab.init,
            "SWANLAB_MODE=local",
            ids,
            project="stellarbyte",
            experiment_name=_name(directory),
            logdir=f"{config.output_dir}/swanlab",
            config=config.to_dict(),
            **continues,
        )

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Sends scalars."""
        self._swanlab.log(metrics, step=step)

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Sends a text for each prompt."""
        texts = [self._swanlab.Text(text, caption=prompt) for prompt, text in samples]
        self._swanlab.log({"samples": texts}, step=step)

    def close(self) -> None:
        """Ends the experiment."""
        self._swanlab.finish()


class Together:
    """Several trackers as one."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        """Takes them open."""
        self._trackers = trackers

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Gives the metrics to each."""
        for tracker in self._trackers:
            tracker.log(step, metrics)

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Gives the samples to each."""
        for tracker in self._trackers:
            tracker.samples(step, samples)

    def close(self) -> None:
        """Closes each, although another one could not be closed."""
        with contextlib.ExitStack() as stack:
            for tracker in self._trackers:
                stack.callback(tracker.close)


def make_trackers(config: TrainConfig, start_step: int, *, validated: bool = True) -> list[Tracker]:
    """The JSONL tracker and those that ``logging.trackers`` names; none but in the main process.

    Args:
      config: of the run.
      start_step: the run goes on after it.
      validated: whether no validation is left to be done at that step.

    Raises:
      ModuleNotFoundError: a tracker's package is not installed; the message names the extra.
      MendableError: a tracker could not begin, such as one that wants a login.
      ValueError, OSError: the file of their ids is damaged, or cannot be read or written.
    """
    if not processes.is_main():
        return []
    directory = Path(config.output_dir)
    trackers: list[Tracker] = [JsonlTracker(directory / METRICS, start_step, validated=validated)]
    for name in config.logging.trackers:
        try:
            if name == "tensorboard":
                trackers.append(TensorBoardTracker(directory / "tensorboard", start_step))
            elif name == "wandb":
                trackers.append(WandbTracker(config))
            else:
                trackers.append(SwanLabTracker(config))
        except (MendableError, ValueError, OSError, ModuleNotFoundError) as error:
            for tracker in trackers:
                tracker.close()
            if not isinstance(error, ModuleNotFoundError):
                raise
            raise ModuleNotFoundError(
                f"logging.trackers names {name!r}, but {error.name} is not installed: pip install {error.name}"
            ) from error
    return trackers
