"""One pass over whole rows without a cache: what cached decoding must equal."""

import functools

import jax

from stellarbyte_jax.model.decoder import forward, logits
from stellarbyte_jax.model.io import Inputs


@functools.partial(jax.jit, static_argnums=0)
def full_pass(model, params, tokens_BT, segment_ids_BT=None):
    """Logits [B, T, V]."""
    return logits(model, params, forward(model, params, Inputs(tokens_BT, segment_ids_BT=segment_ids_BT)).hidden_BTD)
