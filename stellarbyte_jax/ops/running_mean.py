"""The running mean of what came earlier in a document.

B batch, T positions, D channels.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def running_mean(
    x_BTD: Float[Array, "B T D"],
    starts_BT: Bool[Array, "B T"],
    valid_BT: Bool[Array, "B T"],
    before_BD: Float[Array, "B D"],
    decay: float,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D"]]:
    """``m = decay m + (1 - decay) x`` from token to token, from zero at the start of a document.

    Args:
      x_BTD: tokens.
      starts_BT: whether a token begins a document.
      valid_BT: False for padding, which changes nothing.
      before_BD: the mean before the first position, float32.
      decay: weight of the past.

    Returns:
      For each token the mean of the tokens before it, float32, and the mean after the last one.
    """
    x_BTD = x_BTD.astype(jnp.float32)
    keep_BT1 = jnp.where(valid_BT, jnp.where(starts_BT, 0.0, decay), 1.0)[..., None]
    add_BTD = jnp.where(valid_BT[..., None], (1 - decay) * x_BTD, 0.0)

    def after(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
        return first[0] * second[0], second[0] * first[1] + second[1]

    keep_BT1, add_BTD = jax.lax.associative_scan(after, (keep_BT1, add_BTD), axis=1)
    mean_BTD = keep_BT1 * before_BD[:, None] + add_BTD
    earlier_BTD = jnp.concatenate([before_BD[:, None], mean_BTD[:, :-1]], axis=1)
    return jnp.where(starts_BT[..., None], 0.0, earlier_BTD), mean_BTD[:, -1]
