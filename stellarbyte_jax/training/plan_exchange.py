"""What the devices of a mesh send each other in a step, by kind of collective and axis.

An estimate from shapes: a ring of n devices sends (n - 1) / n of an array that is gathered or summed into parts, and
twice that of one that is summed everywhere.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.inspect.activations import expert_rows
from stellarbyte_jax.inspect.ring_bytes import Ring
from stellarbyte_jax.model.params import WeightUse
from stellarbyte_jax.sharding.rules import entry_axes, spec_of
from stellarbyte_jax.training.plan_devices import ASSUMED, DEVICES_OF_A_MACHINE, Device

_FLOAT32 = 4
AXES = ("data", "fsdp", "expert", "context", "tensor")


@dataclass(frozen=True)
class Exchange:
    """What a device sends in a step by one kind of collective.

    Attributes:
      kind: of the collective, as XLA calls it.
      axis: of the mesh, or several that exchange together.
      what: is sent.
      sent: bytes.
    """

    kind: str
    axis: str
    what: str
    sent: int

    def seconds(self, sizes: Mapping[str, int], device: Device) -> float:
        """How long it takes on the slowest link between the devices of its axes."""
        return self.sent / (ASSUMED.links * (device.nvlink if within_machine(self.axis, sizes) else device.network))


def within_machine(axis: str, sizes: Mapping[str, int]) -> bool:
    """Whether devices along an axis are in one machine: those of the last axis of a mesh are neighbours."""
    first = axis.split("+")[0]
    inside = math.prod(sizes[name] for name in AXES[AXES.index(first) :])
    return inside <= DEVICES_OF_A_MACHINE


class Matrices(NamedTuple):
    """Bytes of a mesh's collectives of weights.

    Attributes:
      exchanges: of one part of an accumulated batch.
      buffers: whole weights of a layer and of the one that comes next, and the gradients of one, on a device; where
        layers keep them, those of all.
    """

    exchanges: list[Exchange]
    buffers: int


def of_weights(config: ByteConfig, params: Any, uses: Any, sizes: Mapping[str, int]) -> Matrices:
    """Weights that are gathered, and gradients that are summed.

    Weights travel in the compute dtype, as products read them, and so do their gradients; those of the head are summed
    in float32 (``sharding.cross_entropy``). What is cast behind a gather XLA casts before it on GPUs
    (``CollectiveQuantizer``).

    Args:
      config: of the model.
      params: shapes with shardings of the trained weights, as ``placement.placed`` gives them.
      uses: of these weights.
      sizes: of the mesh.
    """
    c = jnp.dtype(config.compute_dtype).itemsize
    sent: dict[tuple[str, str, str], float] = {}
    layer, outside, kept = 0, 0, 0

    def add(kind: str, axes: list[str], what: str, size: float, times: int = 1) -> None:
        n = math.prod(sizes[axis] for axis in axes)
        if n > 1:
            key = (kind, "+".join(axes), what)
            sent[key] = sent.get(key, 0.0) + times * size * (n - 1) / n

    leaves = zip(
        jax.tree.leaves(params), jax.tree.leaves(uses, is_leaf=lambda x: isinstance(x, WeightUse)), strict=True
    )
    for shape, use in leaves:
        here = math.prod(shape.sharding.shard_shape(shape.shape))
        used_spec = spec_of(use.axes, shape.shape, shape.sharding.mesh)
        pairs = zip(shape.sharding.spec, used_spec, strict=False)
        parted = {axis for kept, used in pairs for axis in entry_axes(kept) if axis not in entry_axes(used)}
        cut = [axis for axis in AXES if axis in parted]
        n = math.prod(sizes[axis] for axis in cut)
        is_head = "vocab" in use.axes and not use.lookup
        used = c if (use.is_matrix and not use.float32) or use.lookup else _FLOAT32
        whole = here * n * used
        in_layers = use.axes[0] == "layers"
        is_kept = config.remat == "none" and in_layers
        # A tied table is gathered for the lookup and for the head.
        once = is_head or is_kept or (use.lookup and not config.tie_word_embeddings)
        add("all-gather", cut, "weights", whole, 1 if once else 2)
        mixed = [axis for axis in AXES if sizes[axis] > 1 and axis != "tensor"]  # along which tokens differ
        head_slope = here * n * _FLOAT32 if is_head or (use.lookup and config.tie_word_embeddings) else 0
        slope = 0 if is_head else whole
        if use.lookup and mixed != cut:
            # Summed once over all tokens, then cut: no collective does both where other axes have tokens too.
            add("all-reduce", mixed, "gradients", slope, 2)
            slope = 0
        own = {axis for entry in shape.sharding.spec for axis in entry_axes(entry)}
        summed = [axis for axis in mixed if axis not in own]
        add("reduce-scatter", cut, "gradients", slope + head_slope)
        add("all-reduce", summed, "gradients", (slope + head_slope) / n, 2)
        if cut and is_kept:
            kept += whole
        elif cut and in_layers:
            layer += whole // shape.shape[0]
        elif cut:
            outside += whole + max(slope, whole if use.lookup else 0) + head_slope
    return Matrices([Exchange(*key, round(size)) for key, size in sent.items()], kept + max(3 * layer, outside))


def of_activations(
    config: ByteConfig, rows: int, length: int, sizes: Mapping[str, int], *, packed: bool = True
) -> list[Exchange]:
    """Activations of one part of an accumulated batch, of so many rows on a device, ``packed`` or one document each."""
    c, D = jnp.dtype(config.compute_dtype).itemsize, config.hidden_size
    t, x, e = sizes["tensor"], sizes["context"], sizes["expert"]
    tokens = rows * (length // x)
    L, experts = config.num_hidden_layers, len(config.moe_layers)
    again, all_again = config.remat in ("dots", "full"), config.remat == "full"
    found = []
    if t > 1:
        branches = 1 if config.parallel_residual else 2
        stream = tokens * D * c * (t - 1) / t
        # Each branch gathers its input and the gradient of its result; the loss and the embedding do so once.
        gathered = L * branches * (2 + again) + 2
        # Each branch sums its result; the gradients of queries, keys, values and of the MLP's input are summed apart.
        summed = L * (branches + 4 + (branches - 1) * all_again) + 2
        found.append(Exchange("all-gather", "tensor", "activations", round(gathered * stream)))
        found.append(Exchange("reduce-scatter", "tensor", "activations", round(summed * stream)))
    if x > 1:
        ring = Ring.of(config, rows, length, x, t, packed=packed)
        found.append(Exchange("collective-permute", "context", "keys and values", L * ring.sent(1 + again)))
    if e > 1 and experts and config.moe.dispatch == "capacity":
        slots = expert_rows(config, tokens).rows * D * c * (e - 1) / e
        # What is no product is made again with dots too; without a loop XLA finds that it is there already.
        again_slots = all_again or (again and config.scan_unroll is not None)
        found.append(Exchange("all-to-all", "expert", "tokens", round(experts * slots * (4 + 2 * again_slots))))
    elif e > 1 and experts:
        # With each token its experts and their weights, which have a gradient.
        others, choices = tokens * D * c * (e - 1), tokens * config.moe.num_experts_per_tok * (e - 1)
        gathered = others * (2 + all_again) + choices * 2 * _FLOAT32 * (1 + all_again)
        found.append(Exchange("all-gather", "expert", "tokens", experts * gathered))
        found.append(Exchange("reduce-scatter", "expert", "tokens", experts * (others * 2 + choices * _FLOAT32)))
    return found


def buffer_bytes(config: ByteConfig, rows: int, length: int, sizes: Mapping[str, int]) -> int:
    """Activations of other devices that one has at a time."""
    c, t, x, e = jnp.dtype(config.compute_dtype).itemsize, sizes["tensor"], sizes["context"], sizes["expert"]
    tokens = rows * (length // x)
    kv = config.kv_heads // (1 if config.kv_heads % t else t) * config.head_size
    found = 2 * tokens * config.hidden_size * c if t > 1 else 0
    if x > 1:
        found += 2 * tokens * kv * 2 * (c + _FLOAT32)  # those here and those that come, with their gradients
    if e > 1 and config.moe_layers and config.moe.dispatch == "dropless":
        found += 2 * tokens * e * config.hidden_size * c
    return found
