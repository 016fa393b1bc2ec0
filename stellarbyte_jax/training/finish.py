"""What a run does when it is over: an export, samples of text, tasks, a report. What is done is not repeated."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stellarbyte_jax.checkpoint.source import tokenizer_of
from stellarbyte_jax.checkpoint.store import EXPORT
from stellarbyte_jax.checkpoint.weights import training_facts
from stellarbyte_jax.config import ConfigError, TrainConfig
from stellarbyte_jax.hf.card import TrainingFacts
from stellarbyte_jax.hf.directory import save_pretrained
from stellarbyte_jax.hf.export import export_family
from stellarbyte_jax.hf.files import clear_abandoned
from stellarbyte_jax.launch import processes, write_failure
from stellarbyte_jax.lora import merge_adapters
from stellarbyte_jax.model.decoder import ByteTransformer
from stellarbyte_jax.model.trees import Params
from stellarbyte_jax.tokenizer.directory import write_json
from stellarbyte_jax.training import plots, samples, tasks
from stellarbyte_jax.training.heatmap import HEATMAP, write_heatmap
from stellarbyte_jax.training.loads import LOADS
from stellarbyte_jax.training.report import REPORT, make_page, write_page
from stellarbyte_jax.training.samples import Sampler
from stellarbyte_jax.training.tasks import TaskRounds

_NOTE = "finished.json"  # in the run's directory: the last step, and what was done after it


def check(config: TrainConfig) -> None:
    """Raises ValueError at the start of a run where its end could not be done."""
    if config.export_at_end:
        lora = config.model.lora
        if lora.activation != "none":
            raise ConfigError(
                f"export_at_end=true merges adapters into the weights, and those with model.lora.activation="
                f"{lora.activation} cannot be: set one of them otherwise"
            )
        export_family(config.model.without_adapters)
    samples.check(config)
    tasks.check(config)
    if config.report_at_end:
        plots.check("report_at_end=true")


def recover(config: TrainConfig) -> None:
    """Removes what a killed export left, and puts back what it was about to replace; under the run's lock."""
    if processes.is_main():
        clear_abandoned(Path(config.output_dir) / EXPORT, alone=True)


def forget(config: TrainConfig) -> None:
    """What was done at an earlier end is to be done again, since weights change: also at a step of the same number."""
    if not processes.is_main():
        return
    note = Path(config.output_dir) / _NOTE
    try:
        note.unlink(missing_ok=True)
    except OSError as error:
        raise write_failure(note, error) from error


def finish(
    config: TrainConfig,
    model: ByteTransformer,
    params: Params,
    step: int,
    say: Callable[[str], None],
    sampler: Sampler,
    rounds: TaskRounds,
    validation_loss: float | None = None,
) -> Path | None:
    """Exports, prints samples, measures tasks and writes a report as the settings ask for, unless that is done already.

    Args:
      config: of the run.
      model: its network.
      params: its weights.
      step: the last one.
      say: takes lines.
      sampler: makes the samples. Where a signal stops it, the next call does what is left.
      rounds: measures the tasks; likewise.
      validation_loss: of these weights, where it is known.

    Returns:
      The exported directory, where one is asked for.
    """
    run_dir = Path(config.output_dir)
    note, target = run_dir / _NOTE, run_dir / EXPORT
    done = processes.from_main(lambda: _read(note, step))
    exported = processes.from_main(lambda: bool(done.get("exported") and target.is_dir()))
    if config.export_at_end and not exported:
        try:
            export(config, model, params, training_facts(config, step, validation_loss))
        except OSError as error:
            raise write_failure(target, error) from error
        done["exported"] = True
        _write(note, done)
    if sampler.missing(step):
        sampler.sample(params, step, say)
        done.pop("reported", None)  # it lacks them
    if rounds.missing(step) and not rounds.stopped():
        rounds.measure(params, step, say)
        done.pop("reported", None)
    if sampler.stopped():
        return target if config.export_at_end else None
    if not processes.is_main():
        return target if config.export_at_end else None
    if config.report_at_end and not (done.get("reported") and (run_dir / REPORT).is_file()):
        _report(run_dir, say)
        done["reported"] = True
        _write(note, done)
    if (run_dir / LOADS).is_file() and not (done.get("drawn") and (run_dir / HEATMAP).is_file()):
        done["drawn"] = _draw_loads(run_dir, say)
        _write(note, done)
    return target if config.export_at_end else None


def _report(run_dir: Path, say: Callable[[str], None]) -> None:
    """Writes the page of a run."""
    page, _ = make_page([run_dir])
    target = run_dir / REPORT
    try:
        write_page(target, page)
    except OSError as error:
        raise write_failure(target, error) from error
    say(f"report: {target}")


def _draw_loads(run_dir: Path, say: Callable[[str], None]) -> bool:
    """Draws the load of experts, where there is what draws; else says so, and that the same command draws it later."""
    target = run_dir / HEATMAP
    try:
        plots.check(str(target))
    except ModuleNotFoundError as error:
        say(f"load of experts: {error}; the same command then draws it")
        return False
    try:
        written = write_heatmap(run_dir)
    except OSError as error:
        raise write_failure(target, error) from error
    if written is not None:
        say(f"load of experts: {target}")
    return True


def is_done(config: TrainConfig, step: int, sampler: Sampler, rounds: TaskRounds) -> bool:
    """Whether nothing is left of what :func:`finish` does after this step."""
    run_dir = Path(config.output_dir)
    done = processes.from_main(lambda: _read(run_dir / _NOTE, step))
    reported = not config.report_at_end or done.get("reported", False)
    drawn = processes.from_main(lambda: "drawn" in done or not (run_dir / LOADS).is_file())
    return reported and drawn and not sampler.missing(step) and not rounds.missing(step)


def export(config: TrainConfig, model: ByteTransformer, params: Params, training: TrainingFacts | None = None) -> None:
    """Writes ``output_dir/hf`` anew, with adapters merged; its model card tells the facts of ``training``."""
    model, params = merge_adapters(model, params)
    target, tokenizer = Path(config.output_dir) / EXPORT, tokenizer_of(config.output_dir, config)
    writes = processes.is_main()  # the others have parts of the weights
    save_pretrained(target, model, params, tokenizer=tokenizer, overwrite=True, training=training, write=writes)


def _write(note: Path, done: dict[str, Any]) -> None:
    if not processes.is_main():
        return
    try:
        write_json(note, done)
    except OSError as error:
        raise write_failure(note, error) from error


def _read(note: Path, step: int) -> dict[str, Any]:
    """What was done after this step; nothing where the note is of another one, missing or broken."""
    try:
        done = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        done = None
    return done if isinstance(done, dict) and done.get("step") == step else {"step": step}
