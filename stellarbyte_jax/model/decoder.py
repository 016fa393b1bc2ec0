"""The decoder: blocks, scanned over depth, between an embedding and a head.

B batch, T positions, D model, V vocabulary, R layers of one kind.
"""

import dataclasses
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.model.attention import Attention, Place, place
from stellarbyte_jax.model.cache import KVCache, pattern
from stellarbyte_jax.model.layers import MLP, Embed, Head, RMSNorm


class Block(nn.Module):
    """One layer: ``x + attn(norm(x))``, then ``x + mlp(norm(x))``."""

    config: ByteConfig
    window: int | None
    kind: int

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, where: Place, cache: KVCache | None, layer: jax.Array, deterministic: bool
    ) -> tuple[jax.Array, KVCache | None]:
        """Maps [B, T, D] to [B, T, D] and the updated cache."""
        c = self.config
        h_BTD = RMSNorm(c, name="attn_norm")(x_BTD)
        h_BTD, cache = Attention(c, self.window, self.kind, name="attn")(h_BTD, where, cache, layer, deterministic)
        x_BTD = x_BTD + h_BTD
        h_BTD = RMSNorm(c, name="mlp_norm")(x_BTD)
        return x_BTD + MLP(c, name="mlp")(h_BTD, deterministic), cache


class Period(nn.Module):
    """The layers of one repetition of the layer pattern: the body of the scan over depth."""

    config: ByteConfig
    deterministic: bool

    @nn.compact
    def __call__(self, carry: tuple[jax.Array, KVCache | None], layer: jax.Array, where: Place) -> tuple[Any, None]:
        """Maps activations and cache to the same after these layers."""
        x_BTD, cache = carry
        for kind, window in enumerate(pattern(self.config)):
            block = Block(self.config, window, kind, name=str(kind))
            x_BTD, cache = block(x_BTD, where, cache, layer, self.deterministic)
        return (x_BTD, cache), None


class ByteTransformer(nn.Module):
    """Decoder-only language model. A pure description: weights are a plain dict beside it.

    ``model.apply({"params": params}, tokens)`` gives logits; :func:`init_params` makes the weights.
    """

    config: ByteConfig

    @nn.compact
    def __call__(
        self,
        tokens_BT: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: KVCache | None = None,
        lengths: jax.Array | None = None,
        max_segments: int | None = None,
        deterministic: bool = True,
        head: bool = True,
    ) -> Any:
        """Logits of the next token at every position.

        Args:
          tokens_BT: int32 [B, T].
          positions: int32 [B, T], where they do not simply count from 0 (or go on from the cache).
          segment_ids: int32 [B, T], where several documents share a row; no token sees another document.
          cache: keys and values of earlier tokens. The new tokens follow each row's earlier ones.
          lengths: int32 [B], with a cache: how many of the T tokens of each row are real, the rest is padding on the
            right. All of them where it is not given.
          max_segments: static upper bound on the documents of a row; lets packed rows use the cuDNN kernel.
          deterministic: False applies dropout and needs ``rngs={"dropout": key}``.
          head: False returns the normalised hidden states [B, T, D] instead of logits.

        Returns:
          float32 logits [B, T, V]; with a cache, the pair of them and the updated cache.

        Raises:
          ValueError: a cache and segment ids are both given, or lengths without a cache, or the tokens do not fit.
        """
        c = self.config
        B, T = tokens_BT.shape
        if cache is not None and segment_ids is not None:
            raise ValueError("a cache holds one document a row: give segment_ids or a cache, not both")
        if lengths is not None and cache is None:
            raise ValueError("lengths belong to a cache: without one, give segment_ids with 0 for padding")
        if positions is None:
            positions = jnp.arange(T, dtype=jnp.int32)[None, :]
            if cache is not None:
                positions = positions + cache.lengths[:, None]
            positions = jnp.broadcast_to(positions, (B, T))

        x_BTD, embedding_VD = Embed(c, name="embed")(tokens_BT)
        x_BTD = nn.Dropout(c.hidden_dropout, deterministic=deterministic)(x_BTD)
        where = place(c, positions, segment_ids, max_segments)
        repeats = c.num_hidden_layers // len(pattern(c))
        body: Any = Period
        if c.remat != "none":
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if c.remat == "dots" else None
            body = nn.remat(Period, policy=policy, prevent_cse=False)
        layers = nn.scan(
            body,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=repeats,
            unroll=c.scan_unroll or repeats,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, deterministic, name="layers")
        (x_BTD, cache), _ = layers((x_BTD, cache), jnp.arange(repeats, dtype=jnp.int32), where)
        out = RMSNorm(c, name="final_norm")(x_BTD)
        if cache is not None:
            cache = cache.advance(jnp.full(B, T, jnp.int32) if lengths is None else lengths)
        if c.tie_word_embeddings:
            kernel_DV = embedding_VD.T
        else:
            kernel_DV = Head(c, name="lm_head")()
        if head:
            with jax.named_scope("head"):
                out = jnp.einsum("BTD,DV->BTV", out, kernel_DV.astype(out.dtype), preferred_element_type=jnp.float32)
        return out if cache is None else (out, cache)


def init_params(model: ByteTransformer, key: jax.Array) -> dict[str, Any]:
    """Fresh float32 weights as a plain nested dict."""
    return cast(dict[str, Any], nn.meta.unbox(_init(model, key)))


def logical_axes(model: ByteTransformer) -> dict[str, Any]:
    """For each weight the names of its axes, in a tree like :func:`init_params`'s. Computes nothing."""
    boxed = jax.eval_shape(lambda: _init(model, jax.random.key(0)))
    return jax.tree.map(lambda box: box.names, boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))


def param_shapes(model: ByteTransformer) -> dict[str, Any]:
    """``jax.ShapeDtypeStruct`` of each weight, in a tree like :func:`init_params`'s. Computes nothing."""
    return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))


def _init(model: ByteTransformer, key: jax.Array) -> dict[str, Any]:
    # Twelve unrolled copies of the initializers compile for half a minute on a GPU, and give the same weights.
    model = ByteTransformer(dataclasses.replace(model.config, scan_unroll=1))
    return cast(dict[str, Any], model.init(key, jnp.zeros((1, 8), jnp.int32))["params"])


def head_kernel(config: ByteConfig, params: dict[str, Any]) -> jax.Array:
    """The kernel [D, V] that turns hidden states into logits."""
    return params["embed"]["embedding"].T if config.tie_word_embeddings else params["lm_head"]["kernel"]


def forward_step(
    model: ByteTransformer, params: dict[str, Any], tokens_B: jax.Array, cache: KVCache
) -> tuple[jax.Array, KVCache]:
    """One token of each row through the model: logits [B, V] of the next one, and the cache with this one."""
    logits_B1V, cache = cast(tuple[jax.Array, KVCache], model.apply({"params": params}, tokens_B[:, None], cache=cache))
    return logits_B1V[:, 0], cache
