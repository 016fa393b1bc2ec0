"""The decoder: blocks, scanned over depth, between an embedding and a head.

B batch, T positions, M memory slots, D model, V vocabulary, R layers of one kind.
"""

import dataclasses
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from stellarbyte_jax.config import ByteConfig, LayerKind
from stellarbyte_jax.model.attention import Attention, Place
from stellarbyte_jax.model.cache import pattern
from stellarbyte_jax.model.layers import MLP, Embed, Head, RMSNorm, param
from stellarbyte_jax.model.memory import Memory
from stellarbyte_jax.model.positions import rotation


class Block(nn.Module):
    """One layer, in one of three residual styles.

    - sequential: ``x = x + attn(norm(x))``, then ``x = x + mlp(norm(x))``;
    - parallel: ``n = norm(x); x = x + attn(n) + mlp(n)`` (Wang and Komatsuzaki 2021, GPT-J);
    - deepnorm: ``x = norm(a x + attn(x))``, then ``x = norm(a x + mlp(x))`` with ``a = (2L)^(1/4)`` (Wang et al. 2022,
      https://arxiv.org/abs/2203.00555).

    Each branch passes LayerScale (Touvron et al. 2021, https://arxiv.org/abs/2103.17239), the original StellarByte's
    factor ``1 / sqrt(2L)`` and DropPath (Huang et al. 2016, https://arxiv.org/abs/1603.09382), where they are set.
    """

    config: ByteConfig
    kind: LayerKind
    index: int

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        memory_BMD: jax.Array | None,
        where: Place,
        cache: Any,
        layer: jax.Array,
        deterministic: bool,
    ) -> tuple[jax.Array, Any]:
        """Maps [B, T, D] to [B, T, D] and the updated cache."""
        c = self.config
        attn = Attention(c, self.kind, self.index, name="attn")
        mlp = MLP(c, name="mlp")
        attn_norm = RMSNorm(c, name="attn_norm")
        depth = layer * len(pattern(c)) + self.index

        def branch(out_BTD: jax.Array, name: str) -> jax.Array:
            if c.layer_scale_init is not None:
                init = nn.initializers.constant(c.layer_scale_init)
                out_BTD *= param(self, f"{name}_scale", init, embed=c.hidden_size).astype(out_BTD.dtype)[None, None]
            if c.residual_scaling == "branch":
                out_BTD *= (2 * c.num_hidden_layers) ** -0.5
            return out_BTD

        def drop_path(out_BTD: jax.Array) -> jax.Array:
            if c.drop_path == 0 or deterministic:
                return out_BTD
            keep = 1 - c.drop_path * depth.astype(jnp.float32) / max(1, c.num_hidden_layers - 1)
            kept_B11 = jax.random.bernoulli(self.make_rng("dropout"), keep, (out_BTD.shape[0], 1, 1))
            return jnp.where(kept_B11, out_BTD / keep.astype(out_BTD.dtype), 0)

        if c.residual_scaling == "deepnorm":
            alpha = (2 * c.num_hidden_layers) ** 0.25
            h_BTD, cache = attn(x_BTD, memory_BMD, where, cache, layer, deterministic)
            x_BTD = attn_norm(alpha * x_BTD + drop_path(branch(h_BTD, "attn")))
            h_BTD = mlp(x_BTD, deterministic)
            return RMSNorm(c, name="mlp_norm")(alpha * x_BTD + drop_path(branch(h_BTD, "mlp"))), cache
        n_BTD = attn_norm(x_BTD)
        # The same norm of the same module: memory holds inputs of the layer, as x is one.
        memory_BMD = None if memory_BMD is None else attn_norm(memory_BMD)
        h_BTD, cache = attn(n_BTD, memory_BMD, where, cache, layer, deterministic)
        if c.parallel_residual:
            return x_BTD + drop_path(branch(h_BTD, "attn") + branch(mlp(n_BTD, deterministic), "mlp")), cache
        x_BTD = x_BTD + drop_path(branch(h_BTD, "attn"))
        n_BTD = RMSNorm(c, name="mlp_norm")(x_BTD)
        return x_BTD + drop_path(branch(mlp(n_BTD, deterministic), "mlp")), cache


class Period(nn.Module):
    """The layers of one repetition of the layer pattern: the body of the scan over depth."""

    config: ByteConfig
    deterministic: bool

    @nn.compact
    def __call__(
        self, carry: tuple[jax.Array, Any], layer: jax.Array, states: Any, where: Place
    ) -> tuple[Any, tuple[jax.Array | None, ...]]:
        """Maps activations and cache to the same after these layers, and gives the inputs of those that remember."""
        x_BTD, cache = carry
        inputs = []
        for index, kind in enumerate(pattern(self.config)):
            memory_BMD = states[index] if states is not None and kind.sliding > 0 else None
            inputs.append(x_BTD if memory_BMD is not None and cache is None else None)
            block = Block(self.config, kind, index, name=str(index))
            x_BTD, cache = block(x_BTD, memory_BMD, where, cache, layer, self.deterministic)
        return (x_BTD, cache), tuple(inputs)


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
        cache: Any = None,
        memory: Memory | None = None,
        lengths: jax.Array | None = None,
        max_segments: int | None = None,
        deterministic: bool = True,
        head: bool = True,
    ) -> Any:
        """Logits of the next token at every position.

        Args:
          tokens_BT: int32 [B, T].
          positions: int32 [B, T], where they do not simply count from 0 (or go on from the cache or the memory). With a
            memory a row goes on with its document where its first position is not 0.
          segment_ids: int32 [B, T], where several documents share a row; no token sees another document.
          cache: a KVCache or PrunedCache with earlier tokens. The new tokens follow each row's earlier ones.
          memory: states of earlier segments. With an empty cache too, the cache begins with the memory's content.
          lengths: int32 [B], with a cache: how many of the T tokens of each row are real, the rest is padding on the
            right. All of them where it is not given.
          max_segments: static upper bound on the documents of a row; lets packed rows use the cuDNN kernel.
          deterministic: False applies dropout and needs ``rngs={"dropout": key}``.
          head: False returns the normalised hidden states [B, T, D] instead of logits.

        Returns:
          float32 logits [B, T, V]; with a cache or a memory, the pair of them and that, updated. With both it is the
          cache, which holds what the memory held.

        Raises:
          ValueError: arguments that exclude each other, tokens that do not fit, or a memory of another batch.
        """
        c = self.config
        B, T = tokens_BT.shape
        self._check(cache, memory, segment_ids, positions, lengths, deterministic)
        real_BT = jnp.ones((B, T), bool)
        if lengths is not None:
            real_BT = jnp.arange(T, dtype=jnp.int32)[None, :] < lengths[:, None]
        memory_slots = valid = plans = states = None
        if memory is not None:
            memory = memory.fit(B, c.memory.batch_policy)
            if positions is None:
                positions = memory.lengths[:, None] + jnp.arange(T, dtype=jnp.int32)[None, :]
            memory = memory.continued(positions[:, 0] > 0)
            states, valid = memory.states, memory.valid
            if cache is not None:
                cache, memory_slots = cache.behind_memory(valid)
                positions = None
        before_B1 = jnp.zeros((B, 1), jnp.int32) if cache is None else cache.lengths[:, None]
        following_BT = before_B1 + jnp.arange(T, dtype=jnp.int32)[None, :]
        positions_BT = following_BT if positions is None else positions
        if cache is not None:
            plans = cache.plan(positions_BT, real_BT)
        continues = cache is not None and not cache.fresh
        how = rotation(c, positions_BT, segment_ids, real_BT, continues)
        where = Place(positions_BT, segment_ids, how, valid, memory_slots, plans, max_segments)

        x_BTD, embedding_VD = Embed(c, name="embed")(tokens_BT)
        x_BTD = nn.Dropout(c.hidden_dropout, deterministic=deterministic)(x_BTD)
        repeats = c.num_hidden_layers // len(pattern(c))
        body: Any = Period
        if c.remat != "none":
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if c.remat == "dots" else None
            body = nn.remat(Period, policy=policy, prevent_cse=False)
        layers = nn.scan(
            body,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, 0, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=repeats,
            unroll=c.scan_unroll or repeats,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, deterministic, name="layers")
        (x_BTD, cache), inputs = layers((x_BTD, cache), jnp.arange(repeats, dtype=jnp.int32), states, where)
        # After a post-norm the stream is normalised already.
        out = x_BTD if c.residual_scaling == "deepnorm" else RMSNorm(c, name="final_norm")(x_BTD)
        if cache is not None:
            cache = cache.finish(plans, jnp.sum(real_BT, axis=1, dtype=jnp.int32))
        elif memory is not None:
            memory = memory.update(c, inputs, segment_ids, T)
        kernel_DV = embedding_VD.T if c.tie_word_embeddings else Head(c, name="lm_head")()
        if head:
            out = logits(c, kernel_DV, out)
        if cache is not None:
            return out, cache
        return out if memory is None else (out, memory)

    def _check(
        self, cache: Any, memory: Any, segment_ids: Any, positions: Any, lengths: Any, deterministic: bool
    ) -> None:
        if cache is not None and not deterministic:
            raise ValueError("a cache is for generation, which has no dropout: leave deterministic at True")
        if cache is not None and segment_ids is not None:
            raise ValueError("a cache holds one document a row: give segment_ids or a cache, not both")
        if lengths is not None and cache is None:
            raise ValueError("lengths belong to a cache: without one, give segment_ids with 0 for padding")
        if memory is not None and not self.config.has_memory:
            raise ValueError("this model has no memory: set model.memory.length before training it")
        if memory is not None and cache is not None and not cache.fresh:
            raise ValueError("the cache already holds tokens, which a memory cannot come before: give a new cache")
        if positions is not None and cache is not None:
            raise ValueError("with a cache, positions follow from it: leave positions out")


def logits(config: ByteConfig, kernel_DV: jax.Array, hidden: jax.Array) -> jax.Array:
    """float32 logits [..., V] of normalised hidden states [..., D], without the padding of the vocabulary."""
    with jax.named_scope("head"):
        kernel_DV = kernel_DV.astype(hidden.dtype)
        out = jnp.einsum("...D,DV->...V", hidden, kernel_DV, preferred_element_type=jnp.float32)
        return out[..., : config.vocab_size]


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
    """The kernel [D, V] that turns hidden states into logits; from ``vocab_size`` on its columns are padding."""
    return params["embed"]["embedding"].T if config.tie_word_embeddings else params["lm_head"]["kernel"]


def forward_step(
    model: ByteTransformer, params: dict[str, Any], tokens_B: jax.Array, cache: Any
) -> tuple[jax.Array, Any]:
    """One token of each row through the model: logits [B, V] of the next one, and the cache with this one."""
    logits_B1V, cache = cast(tuple[jax.Array, Any], model.apply({"params": params}, tokens_B[:, None], cache=cache))
    return logits_B1V[:, 0], cache
