"""Longer texts that a run prints: its size, where the time before its first step went, and how it ended."""

import math
import signal
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from stellarbyte_jax.config import TrainConfig
from stellarbyte_jax.inspect.costs import ParameterCounts
from stellarbyte_jax.launch.compile_cache import CompileCache
from stellarbyte_jax.training.meter import Meter
from stellarbyte_jax.training.optimizer import make_schedule


def parameters(counts: ParameterCounts, noun: str = " parameters") -> str:
    """Their number, and that of those that one token uses where it is another."""
    told = f"{counts.total:,}{noun}"
    if counts.trainable < counts.total:
        told += f", {counts.trainable:,} trained"
    return told if counts.active == counts.total else f"{told}, {counts.active:,} active"


def sizes(config: TrainConfig, counts: ParameterCounts) -> str:
    """Parameters of the model, and tokens of a step."""
    return f"{parameters(counts)}; {config.global_batch_size * config.data.sequence_length:,} tokens a step"


def mesh(mesh: Mesh, devices: int, processes: int = 1) -> str | None:
    """How a run is spread over these devices; None where there is one."""
    if devices == 1:
        return None
    axes = " x ".join(f"{name}={size}" for name, size in mesh.shape.items() if size > 1) or "data=1"
    of = f" of {processes} processes" if processes > 1 else ""
    return f"mesh {axes}: uses {mesh.size} of {devices} devices{of}"


def first_step(seconds: float, cache: CompileCache) -> str:
    """How long a run took to its first step, and how much of that XLA."""
    programs = "program" if cache.misses == 1 else "programs"
    warmth = f"{cache.misses} {programs} compiled" if cache.misses else "every program found"
    temperature = "cold" if cache.misses else "warm"
    return (
        f"first step after {seconds:.1f} s, {cache.compile_seconds:.1f} s of them for XLA "
        f"(compile cache {temperature}: {warmth})"
    )


def end_of_data(config: TrainConfig, step: int) -> str:
    """That the data ended at this step, and where the learning rate was then."""
    text = f"the data ended after {config.data.epochs} epochs, at step {step} of {config.steps}"
    if step == 0:
        return text
    schedule = make_schedule(config)
    ended, end = (float(np.asarray(schedule(s - 1))) / config.optimizer.learning_rate for s in (step, config.steps))
    if math.isclose(ended, end, rel_tol=1e-3):
        return text
    return (
        f"{text}, with the learning rate at {ended:.3g} of its peak: the schedule comes to its end, {end:.3g}, "
        f"at step {config.steps}. With steps={step} and another output_dir it ends with the data"
    )


def early_stop(stale: int, step: int) -> str:
    """That a run stopped at this step, after so many validations without a better loss."""
    return f"stopped early at step {step}: {stale} validations without a better loss"


def stopped(number: int, step: int, total: int) -> str:
    """That this signal stopped a run at this step, and what the same command does."""
    left = "goes on from there" if step < total else "does what is left to do after it"
    return f"{signal.Signals(number).name}: stopped at step {step} of {total}; the same command {left}"


def over(config: TrainConfig, step: int, stale: int) -> str:
    """That a run which stands at this step has none left."""
    if step < config.steps:
        return f"{early_stop(stale, step)}. A larger evaluation.patience goes on"
    where = f"{step} of {config.steps} steps"
    if step > config.steps:
        where = f"it stands at step {step}, beyond steps={config.steps}"
    return f"the run in {config.output_dir} is complete: {where}"


def summary(
    config: TrainConfig,
    step: int,
    counts: ParameterCounts,
    seconds: float,
    meter: Meter,
    best_loss: float | None,
    exported: Path | None,
) -> dict[str, str]:
    """What a run that ended at this step was, by name: the rows of a table."""
    rows = {"steps": f"{step:,}", "parameters": parameters(counts, ""), "time": f"{seconds:.0f} s"}
    last = meter.last
    if "loss" in last:
        rows["training loss"] = f"{last['loss']:.4f}"
    if best_loss is not None:
        rows["best validation loss"] = f"{best_loss:.4f}"
    if meter.rates:
        rows["speed"] = f"{np.median(meter.rates):,.0f} tokens/s (median)"
    if "peak_memory_gib" in last:
        rows["peak device memory"] = f"{last['peak_memory_gib']:.1f} GiB"
    rows["checkpoint"] = str(Path(config.output_dir) / "checkpoints" / str(step))
    if exported is not None:
        rows["Hugging Face directory"] = str(exported)
    return rows
