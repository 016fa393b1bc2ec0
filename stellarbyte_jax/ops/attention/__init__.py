"""Attention: one operation for whole rows, prefill and cached decoding, in several implementations."""

from stellarbyte_jax.ops.attention.api import IMPLEMENTATIONS, attention
from stellarbyte_jax.ops.attention.mask import Mask, always_visible
from stellarbyte_jax.ops.attention.options import AttentionOutput, Dropout, Options

__all__ = ["IMPLEMENTATIONS", "AttentionOutput", "Dropout", "Mask", "Options", "always_visible", "attention"]
