"""The network: an embedding, groups of layers and a head.

B batch, T tokens, D model, V vocabulary.
"""

import dataclasses
import functools
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.model.context import LayerContext
from stellarbyte_jax.model.embedding import Embed, Head
from stellarbyte_jax.model.io import Inputs, Output, State
from stellarbyte_jax.model.layers import Given, Layers
from stellarbyte_jax.model.lora import SCALE, LowRank, is_learnt
from stellarbyte_jax.model.norm import RMSNorm
from stellarbyte_jax.model.params import Weight, WeightUse, weight_uses
from stellarbyte_jax.model.positions import position_scheme
from stellarbyte_jax.model.state.storage import split_by
from stellarbyte_jax.model.trees import Axes, IsTrainable, Params, Shapes, Uses, all_trainable


class ByteTransformer(nn.Module):
    """Decoder-only language model. A pure description: weights are a plain dict beside it.

    :func:`init_params` makes the weights, :func:`forward` and :func:`logits` use them.
    """

    config: ByteConfig

    def setup(self) -> None:
        """Names the parts; ``setup`` and not ``compact``, because three methods use the head."""
        c = self.config
        self.embed = Embed(c)
        self.layers = Layers(c)
        # After a post-norm the stream is normalised already.
        self.final_norm = None if c.residual_scaling == "deepnorm" else RMSNorm(c)
        self.embed_dropout = nn.Dropout(c.hidden_dropout)
        self.lm_head = None if c.tie_word_embeddings else Head(c)

    def __call__(self, inputs: Inputs, state: State | None = None, *, train: bool = False) -> Output:
        """Runs tokens through all layers.

        Args:
          inputs: tokens [B, T] and what belongs to them.
          state: cache and memory of earlier tokens; None where there are none.
          train: applies dropout and needs ``rngs={"dropout": key}`` where the config has any.

        Raises:
          ValueError: arguments that exclude each other, tokens that do not fit, or a memory of another batch.
        """
        c = self.config
        if not isinstance(inputs, Inputs):
            raise TypeError(f"the network takes Inputs(tokens_BT), got {type(inputs).__name__}")
        state = State() if state is None else state.by_axes(split_by)
        check_call(c, inputs, state, train)
        B, T = inputs.tokens_BT.shape
        offsets_1T = jnp.arange(T, dtype=jnp.int32)[None, :] if inputs.rows_1T is None else inputs.rows_1T
        valid_mask_BT = jnp.ones((B, T), bool)
        if inputs.lengths_B is not None:
            valid_mask_BT = offsets_1T < inputs.lengths_B[:, None]
        positions_BT, cache, memory = inputs.positions_BT, state.cache, state.memory
        if memory is not None:
            memory = memory.match_batch(B, c.memory.batch_policy)
            if positions_BT is None:
                positions_BT = memory.lengths_B[:, None] + offsets_1T
            memory = memory.reset_new_documents(positions_BT[:, 0] > 0)
        if cache is not None:
            cache, positions_BT = cache.begin(valid_mask_BT, memory)
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(offsets_1T, (B, T))
        cached = cache is not None and not cache.fresh
        rope = position_scheme(c).frequencies(
            positions_BT, inputs.segment_ids_BT, valid_mask_BT, cached=cached, rows_1T=inputs.rows_1T
        )
        if inputs.segment_ids_BT is not None:
            valid_mask_BT = inputs.segment_ids_BT > 0
        ctx = LayerContext(
            positions_BT,
            offsets_1T,
            inputs.segment_ids_BT,
            rope,
            inputs.max_segments,
            train,
            valid_mask_BT,
            dealt=inputs.rows_1T is not None,
        )

        x_BTD = self.embed_dropout(self.embed.look_up(inputs.tokens_BT), deterministic=not train)
        caches = None if cache is None else cache.groups
        out = self.layers(x_BTD, ctx, Given(caches, None if memory is None else memory.groups, state.router))
        x_BTD, caches, layer_inputs, router, aux = out
        hidden_BTD = x_BTD if self.final_norm is None else self.final_norm(x_BTD)
        if self.is_initializing():
            self.head_kernel()
        elif cache is not None and caches is not None:
            cache, memory = cache.end(caches, positions_BT, valid_mask_BT), None
        elif memory is not None:
            memory = memory.update(c, layer_inputs, inputs.segment_ids_BT, T)
        return Output(hidden_BTD, State(cache, memory, router).by_axes(split_by), aux)

    def head_kernel(self) -> Float[Array, "D V"]:
        """The matrix from hidden states to logits, in the compute dtype. Columns from ``vocab_size`` on are padding."""
        return self._head.kernel()

    def head_factors(self, hidden: Float[Array, "*batch D"]) -> tuple[Float[Array, "D V"], LowRank | None]:
        """The matrix of the head without its adapter, and what that adds to the logits; None: nothing."""
        return self._head.factors(hidden)

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """float32 logits of normalised hidden states, without the padding of the vocabulary."""
        with jax.named_scope("head"):
            return self._head.logits(hidden)[..., : self.config.vocab_size]

    @property
    def _head(self) -> Embed | Head:
        return self.embed if self.lm_head is None else self.lm_head


def check_call(config: ByteConfig, inputs: Inputs, state: State, train: bool) -> None:
    """Raises ValueError where arguments of a call exclude each other."""
    cache, memory = state.cache, state.memory
    if cache is not None and train:
        raise ValueError("a cache is for generation, which has no dropout: leave train at False")
    if cache is not None and inputs.segment_ids_BT is not None:
        raise ValueError("a cache holds one document a row: give segment_ids_BT or a cache, not both")
    if inputs.lengths_B is not None and cache is None:
        raise ValueError("lengths_B belongs to a cache: without one, give segment_ids_BT with 0 for padding")
    if memory is not None and not config.has_memory:
        raise ValueError("this model has no memory: set model.memory.length before training it")
    if memory is not None and cache is not None and not cache.fresh:
        raise ValueError("the cache already holds tokens, which a memory cannot come before: give a new cache")
    if inputs.positions_BT is not None and cache is not None:
        raise ValueError("with a cache, positions follow from it: leave positions_BT out")
    if inputs.rows_1T is not None and (cache is not None or memory is not None):
        raise ValueError("tokens that are dealt out by position have no cache and no memory: leave rows_1T out")
    if config.moe.history_decay and cache is not None and (state.router is None or state.router.history_LBD is None):
        raise ValueError("the gates read the history of a text, which the state lacks: begin with State.empty")


def forward(
    model: ByteTransformer,
    params: Params,
    inputs: Inputs,
    state: State | None = None,
    *,
    dropout_key: Array | None = None,
    train: bool = False,
) -> Output:
    """:meth:`ByteTransformer.__call__` with these weights; a ``dropout_key`` makes it a call of training too."""
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    train = train or dropout_key is not None
    return cast(Output, model.apply({"params": params}, inputs, state, train=train, rngs=rngs))


def logits(model: ByteTransformer, params: Params, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
    """:meth:`ByteTransformer.logits` with these weights."""
    return cast(jax.Array, model.apply({"params": params}, hidden, method="logits"))


def head_kernel(model: ByteTransformer, params: Params) -> Float[Array, "D V"]:
    """:meth:`ByteTransformer.head_kernel` with these weights."""
    return cast(jax.Array, model.apply({"params": params}, method="head_kernel"))


def head_factors(
    model: ByteTransformer, params: Params, hidden: Float[Array, "*batch D"], *, dropout_key: Array | None = None
) -> tuple[Float[Array, "D V"], LowRank | None]:
    """:meth:`ByteTransformer.head_factors` with these weights, as :func:`forward`."""
    rngs = None if dropout_key is None else {"dropout": jax.random.fold_in(dropout_key, 1)}
    found = model.apply({"params": params}, hidden, method="head_factors", rngs=rngs)
    return cast(tuple[jax.Array, LowRank | None], found)


def init_params(model: ByteTransformer, key: Array) -> Params:
    """Fresh float32 weights as a plain nested dict."""
    return _with_layers(model.config, cast(Params, nn.meta.unbox(_init(model, key))))


def _with_layers(config: ByteConfig, params: Params) -> Params:
    """Factors of adapters are 0 in layers that are to have none: those of a stack have one shape."""
    if config.lora.layers is None:
        return params
    depth = 0
    layers = dict(params["layers"])
    for group in config.layer_groups:
        for stack in group.stacks:
            own = [depth + n for n, spec in enumerate(group.specs) if group.stack_of(spec) == stack]
            has_L = jnp.asarray([layer in config.lora.layers for layer in own], jnp.float32)
            layers[str(stack)] = jax.tree_util.tree_map_with_path(
                lambda path, x, has_L=has_L: x * has_L if path[-1].key.endswith(SCALE) else x, layers[str(stack)]
            )
        depth += len(group.specs)
    return {**params, "layers": layers}


def param_uses(model: ByteTransformer) -> Uses:
    """The :class:`WeightUse` of each weight, in a tree like :func:`init_params`'s. Computes nothing."""
    return weight_uses(_abstract(model.config))


def weights_alone(model: ByteTransformer) -> IsTrainable:
    """Which leaves are weights, and not what training keeps beside them."""
    uses = jax.tree_util.tree_leaves_with_path(param_uses(model), is_leaf=lambda x: isinstance(x, WeightUse))
    tracked = {tuple(key.key for key in path) for path, use in uses if use.tracked}
    return lambda path: path not in tracked


def trained(model: ByteTransformer, is_trainable: IsTrainable = all_trainable) -> IsTrainable:
    """Which of the leaves that may be trained are; with adapters the weights that they belong to are not."""
    lora, is_weight = model.config.lora, weights_alone(model)
    return lambda path: is_weight(path) and is_trainable(path) and (not lora.r or is_learnt(lora, path))


def logical_axes(model: ByteTransformer) -> Axes:
    """For each weight the names of its axes, in a tree like :func:`init_params`'s. Computes nothing."""
    return jax.tree.map(lambda use: use.axes, param_uses(model), is_leaf=lambda x: isinstance(x, WeightUse))


def param_shapes(model: ByteTransformer) -> Shapes:
    """``jax.ShapeDtypeStruct`` of each weight, in a tree like :func:`init_params`'s. Computes nothing."""
    return jax.tree.map(lambda box: box.value, _abstract(model.config), is_leaf=lambda x: isinstance(x, Weight))


@functools.lru_cache(maxsize=128)
def _abstract(config: ByteConfig) -> Params:
    """Shapes of the weights with their uses: a run asks for them a dozen times, and tracing the network takes time."""
    return jax.eval_shape(lambda: _init(ByteTransformer(config), jax.random.key(0)))


def _init(model: ByteTransformer, key: Array) -> Params:
    # Weights do not depend on the attention that is asked for, and a named kernel might refuse so few tokens.
    model = ByteTransformer(dataclasses.replace(model.config, attention_implementation="reference"))
    return cast(Params, model.init(key, Inputs(jnp.zeros((1, 8), jnp.int32)))["params"])


def forward_step(
    model: ByteTransformer, params: Params, tokens_B: Array, state: State
) -> tuple[Float[Array, "B V"], State]:
    """One token of each row through the model: logits of the next one, and the state with this one."""
    out = forward(model, params, Inputs(tokens_B[:, None]), state)
    return logits(model, params, out.hidden_BTD[:, 0]), out.state
