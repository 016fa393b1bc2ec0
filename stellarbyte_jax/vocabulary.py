"""A model's vocabulary made larger or smaller: the rows of its embedding and of its head.

V tokens, Vp rows with padding, D model.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from stellarbyte_jax.config import ByteConfig

_SPREAD = 1e-9**0.5  # deviation of new rows, as a share of that of the old ones
_SUMMANDS = 32


class _Tokenizer(Protocol):
    @property
    def vocab_size(self) -> int: ...


def resize_vocabulary(
    config: ByteConfig,
    params: Mapping[str, Any],
    vocab_size: int,
    *,
    seed: int = 0,
    vocab_size_multiple: int | None = None,
) -> tuple[ByteConfig, dict[str, Any]]:
    """Gives embedding and head rows for ``vocab_size`` tokens; rows of tokens that stay are equal to the bit.

    A new row is ``m + s / sqrt(k) * sum_j (e_j - m)``, with the mean m of all V old rows, k = 32 of them e_j drawn with
    replacement, and s = 10^-4.5: so it has their mean and ``s^2`` of their covariance. The logit of a new token is then
    the mean of the old logits, and its probability at most ``1 / V``, whatever the context (Jensen's inequality;
    Hewitt 2021, https://nlp.stanford.edu/~johnhew/vocab-expansion.html); the spread only tells new tokens apart.
    Rows of padding are zero. When the vocabulary shrinks the last rows are cut off, whether or not a tokenizer uses
    them.

    Args:
      config: of the model.
      params: its weights, ``embed/embedding`` [Vp, D] and, where the head is not tied, ``lm_head/kernel`` [D, Vp],
        numpy or jax arrays. They are not changed; leaves that stay the same are shared with the result.
      vocab_size: tokens from now on.
      seed: of the rows drawn.
      vocab_size_multiple: of the rows, padding included; None: as before.

    Returns:
      Settings and weights of the resized model, in the arrays' own kind and dtype.

    Raises:
      ValueError: a size is not positive, or the weights do not fit the settings.
    """
    multiple = config.vocab_size_multiple if vocab_size_multiple is None else vocab_size_multiple
    resized = dataclasses.replace(config, vocab_size=vocab_size, vocab_size_multiple=multiple)
    embedding_VD = _weight(config, params, "embed", "embedding", (config.padded_vocab_size, config.hidden_size))
    out = dict(params)
    out["embed"] = {**params["embed"], "embedding": _resize(embedding_VD, 0, config, resized, [seed, 0])}
    if not config.tie_word_embeddings:
        kernel_DV = _weight(config, params, "lm_head", "kernel", (config.hidden_size, config.padded_vocab_size))
        out["lm_head"] = {**params["lm_head"], "kernel": _resize(kernel_DV, 1, config, resized, [seed, 1])}
    return resized, out


def fit_tokenizer(
    config: ByteConfig,
    params: Mapping[str, Any],
    tokenizer: _Tokenizer,
    *,
    seed: int = 0,
    vocab_size_multiple: int | None = None,
) -> tuple[ByteConfig, Mapping[str, Any]]:
    """Grows the vocabulary to the tokenizer's size; a model that is large enough comes back as it is.

    Args:
      config: of the model.
      params: its weights, as in :func:`resize_vocabulary`.
      tokenizer: anything with a ``vocab_size``, the highest id plus one.
      seed: of the rows drawn.
      vocab_size_multiple: of the rows, padding included; None: as before.

    Raises:
      ValueError: the multiple is not positive, or the weights do not fit the settings.
    """
    wanted = max(config.vocab_size, tokenizer.vocab_size)
    if wanted == config.vocab_size and vocab_size_multiple in (None, config.vocab_size_multiple):
        return config, params
    return resize_vocabulary(config, params, wanted, seed=seed, vocab_size_multiple=vocab_size_multiple)


def _weight(config: ByteConfig, params: Mapping[str, Any], part: str, name: str, shape: tuple[int, int]) -> Any:
    leaf = params.get(part, {}).get(name)
    found = "is missing" if leaf is None else f"has shape {tuple(leaf.shape)}"
    if leaf is None or tuple(leaf.shape) != shape:
        raise ValueError(
            f"the weights do not fit the settings: {part}/{name} {found}, vocab_size {config.vocab_size}, "
            f"vocab_size_multiple {config.vocab_size_multiple} and hidden_size {config.hidden_size} ask for {shape}"
        )
    return leaf


def _resize(leaf: Any, axis: int, config: ByteConfig, resized: ByteConfig, seed: list[int]) -> Any:
    old = np.asarray(leaf)
    new = np.zeros([resized.padded_vocab_size if i == axis else n for i, n in enumerate(old.shape)], old.dtype)
    old_VD, new_VD = np.moveaxis(old, axis, 0)[: config.vocab_size], np.moveaxis(new, axis, 0)
    copied = min(config.vocab_size, resized.vocab_size)
    new_VD[:copied] = old_VD[:copied]
    mean_D = old_VD.mean(axis=0, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(0, len(old_VD), (resized.vocab_size - copied, _SUMMANDS))
    for row, numbers in enumerate(drawn, copied):
        away_D = old_VD[numbers].sum(axis=0, dtype=np.float64) - _SUMMANDS * mean_D
        new_VD[row] = (mean_D + _SPREAD / _SUMMANDS**0.5 * away_D).astype(old.dtype)
    return jnp.asarray(new) if isinstance(leaf, jax.Array) else new
