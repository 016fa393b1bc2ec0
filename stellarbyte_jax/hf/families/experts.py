"""Layers with experts: fields and rows that families share, and why they refuse a model."""

from collections.abc import Mapping
from typing import Any

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.config.foreign import shown
from stellarbyte_jax.hf.layout import EXPERTS_DOWN, EXPERTS_GATE_UP, SPLIT_INPUT, SPLIT_OUTPUT
from stellarbyte_jax.hf.table import Row

GATE_UP, DOWN, ROUTER = "layers/moe/experts/gate_up", "layers/moe/experts/down", "layers/moe/router/kernel"
# Of a loss for the balance of experts, and of noise in training.
TOLD = ("router_aux_loss_coef", "output_router_logits", "router_jitter_noise")
# Either name is read: one is the other's alias in transformers, which name is written depends on its release.
_COUNTS = ("num_experts", "num_local_experts")


def listed_rows(block: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
    """A tensor for each expert.

    Args:
      block: name of the layer's part.
      gate: name of an expert's gate projection.
      up: of its up projection.
      down: of its down projection.
    """
    expert = block + ".experts.{e}."
    return (
        Row(ROUTER, block + ".gate.weight", SPLIT_OUTPUT),
        Row(GATE_UP, f"{expert}{gate}.weight", SPLIT_OUTPUT, slot=0),
        Row(GATE_UP, f"{expert}{up}.weight", SPLIT_OUTPUT, slot=1),
        Row(DOWN, f"{expert}{down}.weight", SPLIT_INPUT),
    )


# All experts of a layer in one tensor, as release 5 of transformers has them in memory.
FUSED_ROWS = (
    Row(GATE_UP, "model.layers.{i}.mlp.experts.gate_up_proj", EXPERTS_GATE_UP),
    Row(DOWN, "model.layers.{i}.mlp.experts.down_proj", EXPERTS_DOWN),
)


# What an absent one means is what the other one says, or the family's own number.
COUNT_DEFAULTS: Mapping[str, Any] = dict.fromkeys(_COUNTS)


def read_count(values: Mapping[str, Any], default: int) -> int:
    """The number of experts of a layer; raises ValueError where its two names contradict each other, or for none."""
    stated = {name: values[name] for name in _COUNTS if values[name] is not None}
    if len({shown(value) for value in stated.values()}) > 1:
        raise ValueError(f"contradicting values {shown(stated)}: keep one of them")
    count = next(iter(stated.values()), default)
    if count == 0:
        raise ValueError(f"{next(iter(stated))} is 0: a model without experts is of a family without them")
    return count


def no_experts(config: ByteConfig) -> str | None:
    """Why a family whose layers have experts refuses a model without them."""
    return None if config.moe.num_experts else "no layer of the model has experts (moe.num_experts is 0)"
