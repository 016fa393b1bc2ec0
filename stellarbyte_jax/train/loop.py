"""The training run, from settings to a finished checkpoint."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stellarbyte_jax.config import TrainConfig
from stellarbyte_jax.data.loader import Loader, make_loader
from stellarbyte_jax.launch import CompileCache, Interrupt, environment, quiet_libraries
from stellarbyte_jax.model.decoder import ByteTransformer
from stellarbyte_jax.model.memory import Memory
from stellarbyte_jax.tokenizer.codec import check_vocabulary, load_tokenizer, token_byte_lengths
from stellarbyte_jax.tokenizer.directory import copy_tokenizer
from stellarbyte_jax.train import finish
from stellarbyte_jax.train.checkpoint import Checkpointer
from stellarbyte_jax.train.console import Reporter, format_metrics
from stellarbyte_jax.train.metrics import (
    count_parameters,
    flops_per_token,
    memory_metrics,
    speed_metrics,
    validation_metrics,
)
from stellarbyte_jax.train.optimizer import make_optimizer, make_schedule
from stellarbyte_jax.train.state import TrainState, create_state, empty_memory, state_shapes
from stellarbyte_jax.train.step import make_eval_step, make_train_step
from stellarbyte_jax.train.trackers import make_trackers


class DivergedError(RuntimeError):
    """The loss is no longer a number."""


@dataclass
class _Progress:
    """What the loop remembers besides the state; kept in every checkpoint."""

    best_loss: float | None = None
    stale: int = 0  # validations without a better loss

    def improved(self, loss: float) -> bool:
        better = self.best_loss is None or loss < self.best_loss
        self.best_loss, self.stale = (loss, 0) if better else (self.best_loss, self.stale + 1)
        return better


def train(config: TrainConfig, config_path: str = "CONFIG") -> int:
    """Trains, or continues, the run in ``config.output_dir``.

    Args:
      config: the run.
      config_path: how the user named it, for the commands that are suggested at the end.

    Returns:
      The exit code: 0, or 130 and 143 after SIGINT and SIGTERM, with a checkpoint written.

    Raises:
      ConfigError, DataError, CheckpointError, OSError: something that the user can mend; the message says how.
      DivergedError: the loss became NaN or infinite; the checkpoints before it are kept.
    """
    began = time.perf_counter()
    run_dir = Path(config.output_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    quiet_libraries()
    with Reporter(run_dir / "train.log") as report, contextlib.ExitStack() as stack:
        interrupt = stack.enter_context(Interrupt())
        cache = CompileCache()
        report.line(environment())
        report.config(config)
        finish.check_exportable(config)

        model = ByteTransformer(config.model)
        check_vocabulary(load_tokenizer(config.data.tokenizer), config.model.vocab_size)
        schedule = make_schedule(config)
        optimizer = make_optimizer(config, model)
        checkpointer = stack.enter_context(contextlib.closing(Checkpointer(run_dir, config.checkpoint)))
        shapes = state_shapes(config, model, optimizer)
        parameters = count_parameters(shapes.params)
        restored = checkpointer.restore(config, shapes, report.line)
        state, place = _start(config, model, optimizer, restored)
        start = int(state.step)
        if start >= config.steps:
            report.line(f"the run in {run_dir} is complete: {start} of {config.steps} steps")
            report.line(finish.next_commands(config, config_path))
            return 0
        loader = stack.enter_context(contextlib.closing(_train_loader(config)))
        validation = stack.enter_context(contextlib.closing(v)) if (v := _validation_loader(config)) else None
        progress = _Progress()
        if place is not None:
            loader.restore(place["loader"])
            progress = _Progress(place["best_loss"], place["stale"])
            report.line(f"resumed at step {start} from {run_dir}")
        elif restored is not None:
            report.line(f"starting from the weights in {run_dir}")
        (run_dir / "train_config.json").write_text(config.to_json(), encoding="utf-8")
        # Its checkpoints stay readable when the original moves.
        copy_tokenizer(config.data.tokenizer, run_dir / "tokenizer")
        report.line(
            f"{parameters:,} parameters; {config.global_batch_size * config.data.sequence_length:,} tokens a step"
        )
        trackers = make_trackers(config, start)
        for tracker in trackers:
            stack.callback(tracker.close)

        def publish(step: int, metrics: dict[str, float]) -> None:
            for tracker in trackers:
                tracker.log(step, metrics)

        def place_of(loader: Loader) -> dict[str, Any]:
            return {"loader": loader.state(), "best_loss": progress.best_loss, "stale": progress.stale}

        run_step = jax.jit(make_train_step(config, model, optimizer, schedule), donate_argnums=0)
        run_eval = jax.jit(make_eval_step(config, model, jnp.asarray(token_byte_lengths(config.data.tokenizer))))
        no_memory = empty_memory(config.model, config.rows_at_once)
        meter = _Meter(config, parameters)
        pending: tuple[int, dict[str, jax.Array]] | None = None
        saved = start
        stack.callback(report.end_bar)
        report.start_bar("training", config.steps, start)
        step = start

        for step in range(start + 1, config.steps + 1):
            batch = next(loader, None)
            if batch is None:
                step -= 1
                report.line(f"the data ended after {config.data.epochs} epochs, at step {step} of {config.steps}")
                if pending is not None:
                    pending = meter.report(*pending, report, publish, loader.skipped)
                if saved != step:
                    checkpointer.save(step, state, place_of(loader), config)
                break
            state, metrics = run_step(state, batch)
            if pending is not None:
                meter.report(*pending, report, publish, loader.skipped)
            pending = (step, metrics)
            if step == start + 1:
                jax.block_until_ready(metrics)
                report.line(_first_step(time.perf_counter() - began, cache))
                meter.reset()

            last = step == config.steps
            validated = None
            if validation is not None and (last or step % config.evaluation.interval == 0):
                pending = meter.report(*pending, report, publish, loader.skipped)
                with meter.paused():
                    weights = state.params if state.ema is None else state.ema
                    validated = evaluate(run_eval, weights, validation, config.evaluation.batches, report, no_memory)
                    report.line(f"step {step}/{config.steps}  validation  {format_metrics(validated)}")
                    publish(step, {f"validation/{name}": value for name, value in validated.items()})
            better = validated is not None and progress.improved(validated["loss"])
            patience = config.evaluation.patience
            stop = interrupt.signal is not None or (patience is not None and progress.stale >= patience)
            if last or stop or step % config.checkpoint.interval == 0 or (better and config.checkpoint.keep_best):
                if pending is not None:
                    pending = meter.report(*pending, report, publish, loader.skipped)
                with meter.paused():
                    loss = None if validated is None else validated["loss"]
                    checkpointer.save(step, state, place_of(loader), config, loss)
                    saved = step
            if stop:
                break

        report.end_bar()
        checkpointer.wait()
        if interrupt.signal is not None:
            name = signal.Signals(interrupt.signal).name
            report.line(f"{name}: stopped at step {saved} of {config.steps}; the same command goes on from there")
            return interrupt.exit_code
        if config.evaluation.patience is not None and progress.stale >= config.evaluation.patience:
            report.line(f"stopped early at step {step}: {progress.stale} validations without a better loss")
        weights = state.params if state.ema is None else state.ema
        finish.samples(config, model, weights, report.line)
        exported = finish.export(config, model, weights)
        report.table(
            "summary", _summary(config, parameters, step, progress, meter, time.perf_counter() - began, exported)
        )
        report.line(finish.next_commands(config, config_path))
    return 0


def evaluate(
    run_eval: Callable[..., tuple[dict[str, jax.Array], Memory | None]],
    params: dict[str, Any],
    batches: Iterable[Any],
    limit: int | None,
    report: Reporter,
    begin: Memory | None = None,
) -> dict[str, float]:
    """Token-weighted validation metrics over at most ``limit`` batches, from the memory ``begin`` on."""
    totals: list[dict[str, jax.Array]] = []
    memory = begin
    for index, batch in enumerate(batches):
        if index == limit:
            break
        sums, memory = run_eval(params, batch, memory)
        totals.append(sums)
        report.validation(index + 1, limit)
    sums = jax.device_get(totals)
    return validation_metrics({name: float(np.sum([np.float64(s[name]) for s in sums])) for name in sums[0]})


class _Meter:
    """Turns the metrics of finished steps into lines, with the speed since the last line."""

    def __init__(self, config: TrainConfig, parameters: int) -> None:
        self._config = config
        self._flops = flops_per_token(config.model, parameters, config.data.sequence_length)
        self._tokens = config.global_batch_size * config.data.sequence_length
        self.rates: list[float] = []
        self.last: dict[str, float] = {}
        self.reset()

    def reset(self) -> None:
        self._since, self._steps = time.perf_counter(), 0

    @contextlib.contextmanager
    def paused(self):
        """Leaves what happens inside out of the speed."""
        before = time.perf_counter()
        yield
        self._since += time.perf_counter() - before

    def report(
        self,
        step: int,
        metrics: dict[str, jax.Array],
        report: Reporter,
        publish: Callable[[int, dict[str, float]], None],
        skipped: int,
    ) -> None:
        """Waits for one step's numbers and passes them on."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self._steps += 1
        if not np.isfinite(values["loss"]):
            raise DivergedError(
                f"the loss is {values['loss']} at step {step}. The checkpoints before it are kept: lower "
                "optimizer.learning_rate or lengthen schedule.warmup_steps, then start the run again"
            )
        due = step % self._config.logging.interval == 0 or step == self._config.steps
        speed = {}
        if self._steps > 1 or self.rates:
            speed = speed_metrics(self._tokens * self._steps, time.perf_counter() - self._since, self._flops)
        self.last = {**values, **speed, **memory_metrics()}
        if skipped:
            self.last["skipped_lines"] = float(skipped)
        report.step(step, self._config.steps, self.last, due=due)
        if due:
            publish(step, self.last)
            if speed:
                self.rates.append(speed["tokens_per_second"])
                self.reset()


def _start(config: TrainConfig, model: ByteTransformer, optimizer: Any, restored: Any) -> tuple[TrainState, Any]:
    if restored is None:
        return jax.jit(lambda: create_state(config, model, optimizer))(), None
    state, place = restored
    if state.opt_state is None:
        state = state.replace(opt_state=jax.jit(optimizer.init)(state.params))
    return state, place


def _train_loader(config: TrainConfig) -> Loader:
    return make_loader(
        config.data,
        split="train",
        batch_size=config.global_batch_size,
        seed=config.seed,
        vocab_size=config.model.vocab_size,
        transform=jax.device_put,
    )


def _validation_loader(config: TrainConfig) -> Loader | None:
    if not config.data.validation:
        return None
    return make_loader(
        config.data,
        split="validation",
        batch_size=config.rows_at_once,
        seed=config.seed,
        vocab_size=config.model.vocab_size,
        transform=jax.device_put,
    )


def _first_step(seconds: float, cache: CompileCache) -> str:
    warmth = f"{cache.misses} programs compiled" if cache.misses else "every program found"
    temperature = "cold" if cache.misses else "warm"
    return (
        f"first step after {seconds:.1f} s, {cache.compile_seconds:.1f} s of them for XLA "
        f"(compile cache {temperature}: {warmth})"
    )


def _summary(
    config: TrainConfig,
    parameters: int,
    step: int,
    progress: _Progress,
    meter: _Meter,
    seconds: float,
    exported: Path | None,
) -> dict[str, str]:
    rows = {"steps": f"{step:,}", "parameters": f"{parameters:,}", "time": f"{seconds:.0f} s"}
    if "loss" in meter.last:
        rows["training loss"] = f"{meter.last['loss']:.4f}"
    if progress.best_loss is not None:
        rows["best validation loss"] = f"{progress.best_loss:.4f}"
    if meter.rates:
        rows["speed"] = f"{np.median(meter.rates):,.0f} tokens/s (median)"
    if "peak_memory_gib" in meter.last:
        rows["peak device memory"] = f"{meter.last['peak_memory_gib']:.1f} GiB"
    rows["checkpoint"] = str(Path(config.output_dir) / "checkpoints" / str(step))
    if exported is not None:
        rows["Hugging Face directory"] = str(exported)
    return rows
