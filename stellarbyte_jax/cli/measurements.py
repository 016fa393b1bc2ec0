"""What ``benchmark`` measures, each in a process of its own.

FLOPs of a token are 6 (active parameters - embedding) + 6 L T D, causal attention counted by the half that is computed.
"""

import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from stellarbyte_jax.cli.traces import STEPS as TRACED
from stellarbyte_jax.cli.traces import collective_shares
from stellarbyte_jax.command import imports
from stellarbyte_jax.config import TrainConfig

REPEATS = 5
_READING = 15  # seconds


def tell(text: str) -> None:
    """A line on standard error about what is being done: measurements take minutes on a CPU.

    Of several processes that measure together the first one tells.
    """
    if os.environ.get("RANK", "0") == "0":
        print(f"  {text}", file=sys.stderr, flush=True)


def timed(run: Any, tokens: float, steps: int) -> dict[str, Any]:
    """Median tokens a second of ``run(steps)``, which returns when the work is done."""
    rates = []
    for number in range(1, REPEATS + 1):
        start = time.perf_counter()
        run(steps)
        rates.append(tokens * steps / (time.perf_counter() - start))
        tell(f"repeat {number} of {REPEATS}: {rates[-1]:,.0f} tokens/s")
    return summary(rates, steps)


def summary(rates: Sequence[float], steps: int) -> dict[str, Any]:
    """Median, lowest and highest of the tokens a second of repeats of so many steps."""
    return {
        "tokens_per_second": round(statistics.median(rates)),
        "lowest": round(min(rates)),
        "highest": round(max(rates)),
        "repeats": len(rates),
        "steps": steps,
    }


def fastest(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The fastest of the ways in which the same was measured, with the others beside it where it has figures."""
    best = max(found, key=lambda result: result.get("tokens_per_second", 0))
    others = [result for result in found if result is not best]
    return {**best, **({"others": others} if others and "error" not in best else {})}


def compared(results: Mapping[str, Mapping[str, Any]], peers: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Any]]:
    """Ours beside the fastest of its peers, where both were measured, on as many devices.

    Args:
      results: of all measurements, by name.
      peers: names of those beside each of ours.

    Returns:
      By the name of ours: ``peer``, the fastest one's name, and ``times_the_peer``, our tokens a second over its.
    """
    made = {}
    measured = {name: result for name, result in results.items() if "tokens_per_second" in result}
    for name, beside in peers.items():
        ours = measured.get(name, {})
        there = [peer for peer in beside if peer in measured and measured[peer].get("devices") == ours.get("devices")]
        if ours and there:
            peer = max(there, key=lambda peer: measured[peer]["tokens_per_second"])
            times = ours["tokens_per_second"] / measured[peer]["tokens_per_second"]
            made[name] = {"peer": peer, "times_the_peer": round(times, 3)}
    return made


def train_ours(
    config: TrainConfig,
    steps: int,
    batches: Iterator[Any],
    devices: int,
    profile: Path | None = None,
    tokens: float | None = None,
) -> dict[str, Any]:
    """Speed of our training step on the mesh that is set.

    Args:
      config: of the run.
      steps: of a repeat.
      batches: on the devices.
      devices: of the mesh.
      profile: directory for a trace of :data:`traces.STEPS` further steps; None: none.
      tokens: of a batch, on average, that are no padding; the share of the peak is then not said, since attention
        within short documents is not what FLOPs of a token count. None: every position counts.
    """
    with imports():
        import jax

        from stellarbyte_jax.inspect.costs import flops_per_token, parameter_counts
        from stellarbyte_jax.launch import environment
        from stellarbyte_jax.model.decoder import ByteTransformer
        from stellarbyte_jax.training import placement
        from stellarbyte_jax.training.metrics import memory_metrics, peak_flops
        from stellarbyte_jax.training.optimizer import make_optimizer, make_schedule
        from stellarbyte_jax.training.state import create_state, state_shapes
        from stellarbyte_jax.training.step import make_train_step

    model = ByteTransformer(config.model)
    optimizer = make_optimizer(config, model)
    places = placement.shardings(placement.placed(state_shapes(config, model, optimizer), model, optimizer))
    state = jax.jit(lambda: create_state(config, model, optimizer), out_shardings=places)()
    train_step = make_train_step(config, model, optimizer, make_schedule(config))
    run_step = jax.jit(train_step, donate_argnums=0, out_shardings=(places, None))
    tell("compiling the first step")
    start = time.perf_counter()
    with _compiling() as compile_seconds:
        state, metrics = jax.block_until_ready(run_step(state, next(batches)))
    first = time.perf_counter() - start
    tell(f"first step after {first:.1f} s; 5 steps to warm up")

    def run(count: int) -> None:
        nonlocal state, metrics
        for _ in range(count):
            state, metrics = run_step(state, next(batches))
        jax.block_until_ready(metrics)

    run(5)
    result = timed(run, tokens or config.global_batch_size * config.data.sequence_length, steps)
    flops = flops_per_token(config.model, parameter_counts(model).active, config.data.sequence_length)
    peak = peak_flops()
    if peak is not None and tokens is None:
        result["mfu"] = round(result["tokens_per_second"] * flops.causal / (peak * devices), 4)
    memory = {name: round(value, 2) for name, value in memory_metrics().items()}
    if profile is not None:
        tell(f"tracing {TRACED} steps into {profile}")
        with jax.profiler.trace(profile):
            run(TRACED)
        result |= collective_shares(profile)
    return {
        **result,
        **memory,
        "compile_seconds": round(sum(compile_seconds), 1),
        "first_step_seconds": round(first, 1),
        "loss": float(metrics["loss"]),
        **({} if devices == 1 else {"devices": devices}),
        "on": environment(),
    }


@contextlib.contextmanager
def _compiling() -> Iterator[list[float]]:
    """The seconds that XLA compiles inside it, program after program."""
    with imports():
        import jax

    seconds: list[float] = []

    def add(event: str, duration_secs: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(add)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(add)


def synthetic(config: TrainConfig, steps: int, profile: Path | None = None) -> dict[str, Any]:
    """Speed of our training step on random tokens, on the mesh of the config.

    Args:
      config: of the run.
      steps: of a repeat.
      profile: directory for a trace of :data:`traces.STEPS` further steps; None: none.
    """
    import itertools

    with imports():
        import numpy as np

        from stellarbyte_jax.training.placement import mesh_of, on_mesh, place_batches

    shape = (config.global_batch_size, config.data.sequence_length)
    random = np.random.default_rng(0)
    mesh = mesh_of(config)
    with on_mesh(mesh):
        place = place_batches()
        made = [place({"tokens": random.integers(0, config.model.vocab_size, shape, dtype=np.int32)}) for _ in range(4)]
        return train_ours(config, steps, itertools.cycle(made), mesh.size, profile)


def _real(config: TrainConfig, steps: int, profile: Path | None = None) -> dict[str, Any]:
    with imports():
        from stellarbyte_jax.data.loader import make_loader
        from stellarbyte_jax.training.placement import mesh_of, on_mesh, place_batches

    mesh = mesh_of(config)
    with on_mesh(mesh):
        rows, place = config.global_batch_size, place_batches()
        loader = make_loader(config.data, split="train", batch_size=rows, seed=0, transform=place)
        with contextlib.closing(loader):
            return train_ours(config, steps, loader, mesh.size, profile)


def _rounded(result: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4 if value < 100 else None) for name, value in result.items()}


def _jsonl(config: TrainConfig, steps: int) -> dict[str, Any]:
    del steps
    with imports():
        from stellarbyte_jax.data.loader import measure_loader

    tell(f"reading batches for {_READING} s")
    return _rounded(measure_loader(config.data, batch_size=config.global_batch_size, seconds=_READING))


def _shards(config: TrainConfig, steps: int) -> dict[str, Any]:
    del steps
    import dataclasses

    with imports():
        from stellarbyte_jax.data.loader import measure_loader
        from stellarbyte_jax.data.shards import prepare
        from stellarbyte_jax.data.text import TextFormat

    data = config.data
    with tempfile.TemporaryDirectory() as directory:
        text = TextFormat(data.fields, data.template)
        tell("tokenising")
        shards = Path(directory) / "shards"
        prepare(data.train, shards, data.tokenizer, text=text, workers=data.workers, cache_dir=data.cache_dir)
        data = dataclasses.replace(config.data, train=(str(Path(directory) / "shards"),))
        tell(f"reading batches for {_READING} s")
        return _rounded(measure_loader(data, batch_size=config.global_batch_size, seconds=_READING))


def _checkpoint(verify: bool) -> Callable[[TrainConfig, int], dict[str, Any]]:
    def measure(config: TrainConfig, steps: int) -> dict[str, Any]:
        """Median seconds; saving blocks training until the state is copied, the rest goes on beside it."""
        del steps
        with imports():
            import jax

            from stellarbyte_jax.checkpoint.checksum import array_checksums
            from stellarbyte_jax.checkpoint.store import Checkpointer
            from stellarbyte_jax.launch import environment
            from stellarbyte_jax.model.decoder import ByteTransformer
            from stellarbyte_jax.training import resume
            from stellarbyte_jax.training.optimizer import make_optimizer
            from stellarbyte_jax.training.state import create_state, state_shapes

        model = ByteTransformer(config.model)
        optimizer = make_optimizer(config, model)
        state = jax.block_until_ready(jax.jit(lambda: create_state(config, model, optimizer))())
        shapes = state_shapes(config, model, optimizer)
        seconds: dict[str, list[float]] = {name: [] for name in ("checksums", "save_blocks", "save", "restore")}

        @contextlib.contextmanager
        def timed(name: str) -> Iterator[None]:
            start = time.perf_counter()
            yield
            seconds[name].append(time.perf_counter() - start)

        settings = replace(config.checkpoint, verify=verify)
        with tempfile.TemporaryDirectory() as directory:
            for step in range(1, REPEATS + 2):  # the first one compiles
                tell(f"repeat {step - 1} of {REPEATS}" if step > 1 else "compiling, and saving once")
                with contextlib.closing(Checkpointer(Path(directory), settings)) as checkpointer:
                    with timed("checksums"):
                        array_checksums((state.params, state.opt_state))
                    with timed("save"):
                        with timed("save_blocks"):
                            resume.save(checkpointer, config, state, step, {}, resume.Progress(), 1.0)
                        checkpointer.wait()
                    with timed("restore"):
                        found = resume.restore(checkpointer, config, shapes, optimizer, print)
                        jax.block_until_ready(found and found.state)
        size = sum(x.nbytes for x in jax.tree.leaves((state.params, state.opt_state)))
        medians = {name: round(statistics.median(values[1:]), 4) for name, values in seconds.items()}
        return {"gib": round(size / 2**30, 2), **medians, "repeats": REPEATS, "on": environment()}

    return measure


def _device(config: TrainConfig, steps: int) -> dict[str, Any]:
    del config, steps
    with imports():
        import jax

    first = jax.devices()[0]
    found = {"platform": jax.default_backend(), "devices": len(jax.devices())}
    if first.platform == "gpu":
        found |= {"kind": first.device_kind, "compute_capability": getattr(first, "compute_capability", None)}
    return found


WORKERS = {
    "device": _device,
    "verified": _checkpoint(True),
    "unverified": _checkpoint(False),
    "synthetic": synthetic,
    "real": _real,
    "jsonl": _jsonl,
    "shards": _shards,
}
