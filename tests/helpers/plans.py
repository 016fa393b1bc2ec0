"""Runs to plan, their compiled steps on eight devices, and what the programs of these exchange."""

import collections
import contextlib
import dataclasses
import functools
import math
import re
import tempfile
from pathlib import Path

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding, PartitionSpec

from helpers.training import settings
from stellarbyte_jax.config import ByteConfig, DataConfig, MeshConfig, OptimizerConfig
from stellarbyte_jax.model.decoder import ByteTransformer
from stellarbyte_jax.training.optimizer import make_optimizer
from stellarbyte_jax.training.placement import mesh_of, on_mesh, placed, shardings
from stellarbyte_jax.training.plan import Planner
from stellarbyte_jax.training.plan_devices import KINDS
from stellarbyte_jax.training.state import state_shapes
from stellarbyte_jax.training.step import make_train_step

H100 = KINDS["H100"]
_BYTES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1, "u8": 1}
_KINDS = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all"


def run_of(mesh, *, optimizer="adamw", ema=None, parts=1, rows=64, length=32, **model):
    base = ByteConfig(
        vocab_size=256,
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=8,
        intermediate_size=512,
        max_position_embeddings=max(64, length),
        compute_dtype="float32",
    )
    return settings(
        model=dataclasses.replace(base, **model),
        global_batch_size=rows,
        gradient_accumulation_steps=parts,
        ema_decay=ema,
        mesh=MeshConfig(**{"data": 1, **mesh}),
        data=DataConfig(sequence_length=length, arrangement="contiguous" if "memory" in model else "packed"),
        optimizer=OptimizerConfig(name=optimizer),
    )


def plan_of(run, *, packed=True):
    return Planner(run, H100, packed=packed).plan(run.mesh.sizes(8))


@functools.cache
def _compiled(mesh, model, parts, segments):
    """The program as the CPU runs it; of bfloat16 also the text of what it was when it had been partitioned."""
    run = run_of(dict(mesh), parts=parts, **dict(model))
    network = ByteTransformer(run.model)
    optimizer = make_optimizer(run, network)
    with on_mesh(mesh_of(run)), tempfile.TemporaryDirectory() as dumped:
        shapes = placed(state_shapes(run, network, optimizer), network, optimizer)
        rows = None
        if mesh:
            rows = NamedSharding(jax.sharding.get_mesh(), PartitionSpec(("data", "fsdp", "expert")))
        shape = (run.global_batch_size, run.data.sequence_length)
        batch = {"tokens": jax.ShapeDtypeStruct(shape, np.int32, sharding=rows)}
        if segments:
            mask = jax.ShapeDtypeStruct(shape, np.bool_, sharding=rows)
            batch |= {"segment_ids": batch["tokens"], "positions": batch["tokens"], "loss_mask": mask}
        step = make_train_step(run, network, optimizer, lambda _: 0.0)
        places = shardings(shapes)
        step = jax.jit(step, out_shardings=None if places is None else (places, None), donate_argnums=0)
        narrow = run.model.compute_dtype != "float32"
        options = {"xla_dump_to": dumped, "xla_dump_hlo_pass_re": "spmd", "xla_dump_hlo_as_text": True}
        # jax mixes types inside of its attention, backward too.
        with jax.numpy_dtype_promotion("standard"), _without_cache(narrow):
            program = step.lower(shapes, batch).compile(compiler_options=options if narrow else None)
        texts = [path.read_text() for path in Path(dumped).glob("*after_spmd-partitioning*")]
        return run, program, texts[-1] if texts else ""


@contextlib.contextmanager
def _without_cache(asked):
    """A program of the cache is not dumped."""
    if not asked:
        yield
        return
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
        compilation_cache.reset_cache()


def compiled(mesh, parts=1, segments=False, **model):
    return _compiled(tuple(mesh.items()), tuple(model.items()), parts, segments)


def _devices_of_a_group(line):
    """Of a collective; XLA writes groups in three ways."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(listed[1].split(","))
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(counted[1])
    named = re.search(r"replica_groups=mesh\[(.*?)\].*?\{(.*?)\}", line)
    assert named is not None, line
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))


def _times(text):
    """How often each computation of a program runs, by the known number of turns of loops."""
    calls, name = collections.defaultdict(list), ""
    for line in text.splitlines():
        if (
            line.endswith("{")
            and (head := re.match(r"(ENTRY )?%?([\w.\-]+)", line))
            and not line.startswith("HloModule")
        ):
            name = head[2]
            calls["" if head[1] else None].append((name, 1))
        turns = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
        for kind, called in re.findall(r"(body|condition|calls|to_apply)=%?([\w.\-]+)", line):
            calls[name].append((called, int(turns[1]) if turns and kind == "body" else 1))
    found = collections.Counter()

    def go(name, times):
        found[name] += times
        for called, more in calls[name]:
            go(called, times * more)

    go("", 1)
    return found


def volumes(text):
    """Bytes that a device sends by gathering, by summing (once, in parts), by passing on and by exchanging.

    What is cast to a narrower type right behind a gather counts as if it were cast before it, as XLA has it on GPUs.
    """
    narrowed = {
        given: _BYTES[kind] / 4
        for kind, given in re.findall(r" = (bf16)\S+ convert\(%?([\w.\-]+)\)", text)
        if given.startswith("all-gather")
    }
    found, times, inside = collections.Counter(), _times(text), ""
    for line in text.splitlines():
        if line.endswith("{") and (head := re.match(r"(?:ENTRY )?%?([\w.\-]+)", line)):
            inside = head[1]
        match = re.search(rf"%?([\w.\-]+) = (.*?) ({_KINDS})(?:-start)?\(", line)
        if match is None:
            continue
        size = times[inside] * sum(
            _BYTES[kind] * math.prod(map(int, filter(None, shape.split(","))))
            for kind, shape in re.findall(r"(\w+)\[([\d,]*)\]", match[2])
        )
        if match[3] == "collective-permute":
            found["passed"] += size
            continue
        n = _devices_of_a_group(line)
        if match[3] in ("all-gather", "all-to-all"):
            name = "gathered" if match[3] == "all-gather" else "exchanged"
            found[name] += size * narrowed.get(match[1], 1) * (n - 1) / n
        else:
            found["summed"] += size * (n - 1) // (n if match[3] == "all-reduce" else 1)
    return found


def planned_volumes(plan):
    """The same of a plan. Sums are counted once: a CPU sums all where a GPU sums parts."""
    names = {"all-gather": "gathered", "collective-permute": "passed", "all-to-all": "exchanged"}
    found = collections.Counter()
    for each in plan.exchanges:
        found[names.get(each.kind, "summed")] += each.sent // (2 if each.kind == "all-reduce" else 1)
    return found
