"""Rotary position embeddings: one file a scheme, and what they share."""

from stellarbyte_jax.ops.rotary.rope import Frequencies, Rope
from stellarbyte_jax.ops.rotary.scaling import Scaling
from stellarbyte_jax.ops.rotary.stellarbyte import StellarByteRope
from stellarbyte_jax.ops.rotary.xpos import XPos

__all__ = ["Frequencies", "Rope", "Scaling", "StellarByteRope", "XPos"]
