"""The training run, in three chapters: prepare, loop, finish."""

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from stellarbyte_jax.checkpoint.store import Checkpointer
from stellarbyte_jax.config import TrainConfig
from stellarbyte_jax.data.loader import Loader
from stellarbyte_jax.inspect.costs import ParameterCounts, parameter_counts
from stellarbyte_jax.launch import Interrupt, processes, quiet_libraries
from stellarbyte_jax.launch.compile_cache import CompileCache
from stellarbyte_jax.model.decoder import ByteTransformer
from stellarbyte_jax.model.io import State
from stellarbyte_jax.training import begin, finish, messages, resume, script
from stellarbyte_jax.training.agreement import make_interrupt
from stellarbyte_jax.training.console import Reporter, format_metrics
from stellarbyte_jax.training.directory import RunDirectory
from stellarbyte_jax.training.loads import LoadFile
from stellarbyte_jax.training.meter import Meter
from stellarbyte_jax.training.optimizer import make_optimizer, make_schedule
from stellarbyte_jax.training.placement import mesh_of, on_mesh, placed
from stellarbyte_jax.training.programs import compiled_create_state, compiled_train_step
from stellarbyte_jax.training.rebalance import Moves, compiled_rebalance, rebalances, tell
from stellarbyte_jax.training.resume import Progress, Resumed
from stellarbyte_jax.training.samples import Sampler
from stellarbyte_jax.training.state import TrainState, state_shapes
from stellarbyte_jax.training.tasks import TaskRounds
from stellarbyte_jax.training.trackers import Together, make_trackers
from stellarbyte_jax.training.validation import check_comparable, compiled_eval_step, evaluate, measured_on


@dataclass(frozen=True)
class Finished:
    """How a run ended.

    Attributes:
      exit_code: 0, or 130 and 143 after SIGINT and SIGTERM, with a checkpoint written.
      step: of the last checkpoint.
      ended_by: all steps done (now or before), a signal, patience, or the end of the data.
    """

    exit_code: int
    step: int
    ended_by: Literal["steps", "signal", "patience", "data"]


@dataclass
class _Run:
    """Everything that the loop works with; ``total`` is the number of steps, or where the run stands beyond them.

    ``config`` has the directory of the tokenizer, and ``named`` its name, as the run records it.
    """

    config: TrainConfig
    named: TrainConfig
    total: int
    report: Reporter
    began: float
    cache: CompileCache
    interrupt: Interrupt
    directory: RunDirectory
    checkpointer: Checkpointer
    model: ByteTransformer
    parameters: ParameterCounts
    state: TrainState
    progress: Progress
    base: dict[str, Any] | None
    loader: Loader
    validation: Loader | None
    publish: Callable[[int, dict[str, float]], None]
    sampler: Sampler
    rounds: TaskRounds
    train_step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    eval_step: Callable[..., tuple[dict[str, jax.Array], State]]
    first_carried: Callable[[], State]
    rebalance: Callable[[TrainState], tuple[TrainState, Moves]] | None
    meter: Meter


def train(config: TrainConfig) -> Finished:
    """Trains, or continues, the run in ``config.output_dir``.

    Raises:
      ConfigError, DataError, CheckpointError, OSError: something that the user can mend; the message says how.
      DivergedError: the loss became NaN or infinite; the checkpoints before it are kept.
    """
    with processes.together():
        return _train(config)


def _train(config: TrainConfig) -> Finished:
    began = time.perf_counter()
    script.refuse_worker()
    quiet_libraries()
    found = begin.find_tokenizer(begin.complete(config))
    config = found.used
    begin.check_same(config)
    begin.check(config)
    mesh = mesh_of(config)
    run_dir = Path(config.output_dir)
    directory = RunDirectory(run_dir)
    with (
        on_mesh(mesh),
        directory.locked(),
        Reporter(run_dir / "train.log", processes.is_main()) as report,
        contextlib.ExitStack() as stack,
    ):
        interrupt = stack.enter_context(make_interrupt(mesh))
        prepared = _prepare(found, began, interrupt, directory, report, stack, mesh)
        if isinstance(prepared, Finished):
            return prepared
        stack.callback(report.end_bar)
        start = int(prepared.state.step)
        report.start_bar("training", prepared.total, start)
        finished = _finish(prepared, _loop(prepared, start))
        directory.check()
        return finished


def _prepare(
    settings: begin.Found,
    began: float,
    interrupt: Interrupt,
    directory: RunDirectory,
    report: Reporter,
    stack: contextlib.ExitStack,
    mesh: Mesh,
) -> _Run | Finished:
    """Checks all that can be checked before the first step, and opens what the run needs.

    What is opened is closed with ``stack``. A run that is complete already is finished.
    """
    config, named = settings.used, settings.named
    run_dir = Path(config.output_dir)
    cache = CompileCache()
    may_be_over = resume.may_be_over(config)
    if not may_be_over:
        begin.introduce(settings, mesh, report)
    finish.recover(config)

    model = ByteTransformer(config.model)
    schedule = make_schedule(config)
    optimizer = make_optimizer(config, model)
    checkpointer = stack.enter_context(contextlib.closing(Checkpointer(run_dir, config.checkpoint)))
    shapes = placed(state_shapes(config, model, optimizer), model, optimizer)
    rebalance = compiled_rebalance(config, model, shapes, report.line)
    parameters = parameter_counts(model)
    found = resume.restore(checkpointer, named, shapes, optimizer, report.line, config.data.tokenizer)
    if found is not None:
        named = found.settings
        config = replace(config, init_from=named.init_from)
    resumed = found or begin.from_weights(config, shapes, optimizer, report.line)
    begin.tell_routers_without_slope(config, report.line)
    if resumed is None:
        begin.tell_unused_rows(config, report.line)
        create = compiled_create_state(config, model, optimizer, shapes)
        resumed = Resumed(create(), Progress(), None, named)
    start = int(resumed.state.step)
    total = max(start, config.steps)
    if start == total and resumed.progress.validated != start:
        resumed.progress.unvalidated = True  # the last step, of a run that was to be longer
    validates = resumed.progress.unvalidated and bool(config.data.validation)
    if (start == total and not validates) or resumed.progress.exhausted(config.evaluation.patience):
        return _over(config, model, resumed, report, interrupt)
    if may_be_over:
        begin.introduce(settings, mesh, report)
    script.check_guarded(config.data)
    loader = stack.enter_context(contextlib.closing(begin.open_loader(config, "train")))
    validation = None
    if config.data.validation:
        validation = stack.enter_context(contextlib.closing(begin.open_loader(config, "validation")))
        check_comparable(resumed.progress.validation, validation, config.evaluation.batches)
    if resumed.data is not None:
        loader.restore(resumed.data)
        report.line(f"resumed at step {start} from {run_dir}")
    elif found is not None:
        report.line(f"starting from the weights in {run_dir}")
    begin.keep(begin.Found(named, config), parameters)
    report.line(messages.sizes(config, parameters))
    trackers = Together(make_trackers(config, start, validated=not validates))
    stack.callback(trackers.close)
    loads = stack.enter_context(contextlib.closing(LoadFile(config, start)))

    def show(step: int, metrics: dict[str, float], due: bool) -> None:
        report.step(step, total, metrics, due=due)
        if due:
            trackers.log(step, metrics)
            loads.write(step, meter.loads)

    def publish_tasks(step: int, metrics: dict[str, float]) -> None:
        trackers.log(step, {**metrics, **meter.totals()})

    seconds, tokens = resumed.progress.seconds, resumed.progress.tokens
    meter = Meter(config, parameters.active, show, lambda: loader.counts, seconds, tokens, mesh.size)
    return _Run(
        config=config,
        named=named,
        total=total,
        report=report,
        began=began,
        cache=cache,
        interrupt=interrupt,
        directory=directory,
        checkpointer=checkpointer,
        model=model,
        parameters=parameters,
        state=resumed.state,
        progress=resumed.progress,
        base=resumed.base,
        loader=loader,
        validation=validation,
        publish=trackers.log,
        sampler=Sampler(config, model, start, interrupt.came, trackers.samples),
        rounds=TaskRounds(config, model, start, interrupt.came, publish_tasks),
        train_step=compiled_train_step(config, model, optimizer, schedule, shapes),
        eval_step=compiled_eval_step(config, model, shapes),
        first_carried=partial(resume.first_carried, config, shapes),
        rebalance=rebalance,
        meter=meter,
    )


def _loop(run: _Run, start: int) -> Finished:
    """Steps, validations and checkpoints, until the run ends for whatever reason."""
    config, patience = run.config, run.config.evaluation.patience
    saved = start
    if run.progress.unvalidated and (ended := _make_up(run, start)) is not None:
        return ended
    _sample_and_measure(run, start)  # a signal may have come before, or among them
    if run.interrupt.signal is not None and (run.sampler.due(start) or run.rounds.due(start)):
        return Finished(run.interrupt.exit_code, start, "signal")
    for step in range(start + 1, config.steps + 1):
        batch = next(run.loader, None)
        if batch is None:
            return _data_ended(run, step - 1, saved)
        if step == start + 1:
            finish.forget(config)
            run.report.compiling()
        run.state, metrics = run.train_step(run.state, batch)
        run.interrupt.agree()
        run.directory.keep()
        run.meter.push(step, metrics)
        if step == start + 1:
            run.meter.flush()
            run.report.line(messages.first_step(time.perf_counter() - run.began, run.cache))
            run.meter.reset()
        if run.rebalance is not None and rebalances(config, step):
            _rebalance(run, step, run.rebalance)

        last = step == config.steps
        loss = None
        if run.validation is not None and (last or step % config.evaluation.interval == 0):
            loss = _validate(run, step, run.validation)
        better = loss is not None and run.progress.stale == 0
        exhausted = not last and run.progress.exhausted(patience)
        if not last and not exhausted:  # the end of a run has its own
            _sample_and_measure(run, step)
        stopped = run.interrupt.signal is not None
        due = step % config.checkpoint.interval == 0 or (better and config.checkpoint.keep_best)
        if last or stopped or exhausted or due:
            _save(run, step, loss)
            saved = step
        if stopped:
            return Finished(run.interrupt.exit_code, step, "signal")
        if exhausted:
            return Finished(0, step, "patience")
    return Finished(0, run.total, "steps")


def _rebalance(run: _Run, step: int, rebalance: Callable[[TrainState], tuple[TrainState, Moves]]) -> None:
    """Splits overloaded experts, and tells of it."""
    run.meter.flush()
    with run.meter.paused():
        run.state, moves = rebalance(run.state)
        for line in tell(run.config.model, step, moves):
            run.report.line(line)


def _make_up(run: _Run, step: int) -> Finished | None:
    """Does the validation that is missing after this step, where the run goes on; how it ended, if it did."""
    if run.validation is None:
        run.progress.unvalidated = False
    elif (loss := _validate(run, step, run.validation)) is not None:
        _save(run, step, loss)
    if run.interrupt.signal is not None:
        return Finished(run.interrupt.exit_code, step, "signal")
    if step < run.total and run.progress.exhausted(run.config.evaluation.patience):
        return Finished(0, step, "patience")
    return None


def _data_ended(run: _Run, step: int, saved: int) -> Finished:
    """The end of a run whose data ended before its steps: as any end, with a validation and a checkpoint."""
    run.meter.flush()
    run.report.line(messages.end_of_data(run.config, step))
    loss = None
    if run.validation is not None and run.progress.validated != step:
        loss = _validate(run, step, run.validation)
    if saved != step or loss is not None:
        _save(run, step, loss)
    if run.interrupt.signal is not None:
        return Finished(run.interrupt.exit_code, step, "signal")
    return Finished(0, step, "data")


def _finish(run: _Run, ended: Finished) -> Finished:
    """Waits for the last checkpoint, and makes of a run that came to its end what the settings ask for."""
    config, report = run.config, run.report
    report.end_bar()
    run.checkpointer.wait()
    if run.interrupt.signal is not None:
        return _stopped(run, ended.step)
    if ended.ended_by == "patience":
        report.line(messages.early_stop(run.progress.stale, ended.step))
    run.directory.check()
    loss = run.progress.loss_at(ended.step)
    exported = finish.finish(
        config, run.model, run.state.averaged, ended.step, report.line, run.sampler, run.rounds, loss
    )
    seconds, best = time.perf_counter() - run.began, run.progress.best_loss
    rows = messages.summary(config, ended.step, run.parameters, seconds, run.meter, best, exported)
    report.table("summary", rows)
    if run.interrupt.signal is None or finish.is_done(config, ended.step, run.sampler, run.rounds):
        return ended
    return _stopped(run, ended.step)


def _stopped(run: _Run, step: int) -> Finished:
    assert run.interrupt.signal is not None
    run.report.line(messages.stopped(run.interrupt.signal, step, run.total))
    return Finished(run.interrupt.exit_code, step, "signal")


def _over(
    config: TrainConfig, model: ByteTransformer, resumed: Resumed, report: Reporter, interrupt: Interrupt
) -> Finished:
    """A run that has no step left: does what is missing of its end."""
    step = int(resumed.state.step)
    report.line(messages.over(config, step, resumed.progress.stale))
    sampler, rounds = Sampler(config, model, step, interrupt.came), TaskRounds(config, model, step, interrupt.came)
    loss = resumed.progress.loss_at(step)
    finish.finish(config, model, resumed.state.averaged, step, report.line, sampler, rounds, loss)
    if interrupt.came() and not finish.is_done(config, step, sampler, rounds):
        return Finished(interrupt.exit_code, step, "signal")
    return Finished(0, step, "steps" if step >= config.steps else "patience")


def _validate(run: _Run, step: int, batches: Loader) -> float | None:
    """Measures the loss and counts it; None where a signal came before that was complete."""
    run.meter.flush()
    with run.meter.paused():
        limit = run.config.evaluation.batches
        weights, carried = run.state.averaged, run.first_carried()
        validated = evaluate(run.eval_step, weights, batches, limit, run.report, carried, run.interrupt.came)
        if validated is None:
            run.progress.unvalidated = True
            run.report.line(f"step {step}/{run.total}  validation broken off: it is done when the run goes on")
            return None
        run.progress.measured(step, validated["loss"], measured_on(batches, limit))
        validated |= {name: float(count) for name, count in batches.counts.items()}
        run.report.line(f"step {step}/{run.total}  validation  {format_metrics(validated)}")
        named = {f"validation/{name}": value for name, value in validated.items()}
        run.publish(step, {**named, **run.meter.totals()})
    return validated["loss"]


def _sample_and_measure(run: _Run, step: int) -> None:
    """Continues the prompts and measures the tasks, where that is due after this step."""

    def say(text: str) -> None:
        run.report.line(f"step {step}/{run.total}  {text}")

    for is_due, act in ((run.sampler.due, run.sampler.sample), (run.rounds.due, run.rounds.measure)):
        if is_due(step) and run.interrupt.signal is None:
            run.meter.flush()
            with run.meter.paused():
                act(run.state.averaged, step, say)


def _save(run: _Run, step: int, validation_loss: float | None = None) -> None:
    run.meter.flush()
    if validation_loss is not None and not math.isfinite(validation_loss):
        validation_loss = None  # no measure of which checkpoints are the best
    run.directory.check()
    with run.meter.paused():
        place = run.loader.state()
        run.progress.seconds, run.progress.tokens = run.meter.seconds, run.meter.tokens
        resume.save(run.checkpointer, run.named, run.state, step, place, run.progress, validation_loss, run.base)
