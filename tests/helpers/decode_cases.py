"""Attention of few queries over a cache: arrays as a cache holds them, and masks."""

import jax
import jax.numpy as jnp
import numpy as np

from stellarbyte_jax.model.state.storage import Storage
from stellarbyte_jax.ops.attention import Mask


def cached(
    B=2,
    T=1,
    S=200,
    N=4,
    K=2,
    H=64,
    dtype="bfloat16",
    compute="bfloat16",
    window=None,
    ring=False,
    visible=0,
    invalid=0,
    lengths=None,
    layers=2,
    seed=0,
):
    """Queries, keys and values in the compute dtype, the storage that holds them in its last layer, and the mask.

    Rows have as many tokens as ``lengths`` says, or any number. In a ``ring`` they may have gone round the slots; the
    first ``visible`` tokens of a text stand in its first slots then, which no window hides.
    """
    random = np.random.default_rng(seed)
    q, k, v = (random.standard_normal((B, n, h, H)) for n, h in ((T, N), (S, K), (S, K)))
    most = 3 * S if ring else S
    lengths = np.asarray([random.integers(T, most + 1) for _ in range(B)] if lengths is None else lengths)
    slots = np.arange(S)[None]
    places = np.where(slots < lengths[:, None], slots, -1)
    if ring:
        turned = S - visible
        newest = visible + (lengths[:, None] - 1 - visible) // turned * turned + slots - visible
        held = np.where(newest < lengths[:, None], newest, newest - turned)
        places = np.where(lengths[:, None] > S, np.where(slots < visible, slots, held), places)
    k_positions = jnp.asarray(places[..., None], jnp.int32)
    mask = Mask(
        jnp.asarray(lengths[:, None] - T + np.arange(T)[None], jnp.int32),
        k_positions,
        k_valid_BS=jnp.broadcast_to(jnp.asarray(slots >= invalid), (B, S)) if invalid else None,
        always_visible_BSK=k_positions < visible if visible else None,
        window=window,
    )
    others = Storage.empty((layers, B, S, K, H), dtype)
    held = others.encode(*(jnp.asarray(x, jnp.float32) for x in (k, v)))
    others = jax.tree.map(lambda x: jnp.full_like(x, 1), others)
    storage = others.replace_layer(jnp.int32(layers - 1), held)
    keys, values = held.decode(jnp.dtype("float32"))
    return jnp.asarray(q, compute), keys, values, storage, mask
