"""Checkpoints of the original StellarByte, read as a model and its weights."""

from stellarbyte_jax.hf.original.layouts import LAYOUTS
from stellarbyte_jax.hf.original.reading import Imported, from_original

__all__ = ["LAYOUTS", "Imported", "from_original"]
