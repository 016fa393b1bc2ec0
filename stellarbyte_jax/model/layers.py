"""All layers of the network: for each group one scan over its stacked weights.

B batch, T positions, D model, L layers of a group, R repeats of its period of P layers.
"""

from collections.abc import Callable
from typing import NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from stellarbyte_jax.config import ByteConfig, LayerGroup, LayerSpec
from stellarbyte_jax.model.block import Block
from stellarbyte_jax.model.context import LayerContext
from stellarbyte_jax.model.io import Aux, LayerState
from stellarbyte_jax.model.state.layer_cache import LayerCache
from stellarbyte_jax.model.state.memory import LayerMemory
from stellarbyte_jax.model.trees import Params

Caches = tuple[LayerCache, ...]
Memories = tuple[LayerMemory, ...]
Carry = tuple[Array, Caches | None]
Repeat = tuple[Array, Params, tuple[Array, ...] | None, Array | None]  # number, weights, memory, dropout keys
Body = Callable[[Carry, Repeat], tuple[Carry, tuple[tuple[Array | None, ...], Aux]]]


class GroupOutput(NamedTuple):
    """What a group of layers gives.

    Attributes:
      x_BTD: activations.
      caches: of each place of the period; None without a cache.
      inputs: for each place that remembers the inputs [R, B, T, D] of its layers, else None.
      aux: losses and statistics of its layers.
    """

    x_BTD: Array
    caches: Caches | None
    inputs: tuple[Array | None, ...]
    aux: Aux


class Layers(nn.Module):
    """The blocks of every group, whose weights are stacks ``[L, ...]`` under the number of the group.

    Weights are made by ``nn.scan`` and used by ``lax.scan``: a stack depends on the layers' weights alone, while the
    loop's body depends on their windows and memories too, P layers at a time.
    """

    config: ByteConfig

    @nn.compact
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        ctx: LayerContext,
        caches: tuple[Caches, ...] | None,
        memories: tuple[Memories, ...] | None,
    ) -> tuple[Float[Array, "B T D"], tuple[Caches, ...] | None, tuple[tuple[Array | None, ...], ...], Aux]:
        """Maps [B, T, D] to [B, T, D], caches by group and place, layer inputs to be remembered, and losses."""
        c = self.config
        found = []
        depth, aux = 0, Aux()
        for number, group in enumerate(c.layer_groups):
            if self.is_initializing():
                make_layer = nn.scan(
                    lambda block, x_BTD, _: (block(x_BTD, ctx, LayerState(), jnp.zeros((), jnp.int32))[0], None),
                    variable_axes={"params": 0},
                    split_rngs={"params": True},
                    length=len(group.specs),
                    metadata_params={nn.PARTITION_NAME: "layers"},
                )
                x_BTD, _ = make_layer(Block(c, group.specs[0], name=str(number)), x_BTD, None)
                continue
            drops = ctx.train and max(c.attention_dropout, c.hidden_dropout, c.residual_dropout, c.drop_path) > 0
            out = run_group(
                c,
                group,
                self.get_variable("params", str(number)),
                x_BTD,
                ctx,
                None if caches is None else caches[number],
                None if memories is None else memories[number],
                self.make_rng("dropout") if drops else None,
                depth,
            )
            x_BTD, aux = out.x_BTD, aux + out.aux
            depth += len(group.specs)
            found.append(out)
        after = None if caches is None else tuple(out.caches for out in found)
        return x_BTD, after, tuple(out.inputs for out in found), aux


def run_group(
    config: ByteConfig,
    group: LayerGroup,
    params: Params,
    x_BTD: Float[Array, "B T D"],
    ctx: LayerContext,
    caches: Caches | None,
    memories: Memories | None,
    dropout_key: Array | None,
    depth: int,
) -> GroupOutput:
    """Applies the layers of a group, with stacked ``params`` [L, ...]; ``depth`` is that of the first layer."""
    P, R = len(group.period), group.repeats
    keys = None if dropout_key is None else jax.random.split(dropout_key, len(group.specs))
    states = None if memories is None else tuple(memory.states for memory in memories)

    def body_of(specs: tuple[LayerSpec, ...]) -> Body:
        """The layers of a period, or of the beginning of one."""

        def body(carry: Carry, xs: Repeat) -> tuple[Carry, tuple[tuple[Array | None, ...], Aux]]:
            x_BTD, caches = carry
            repeat, weights, states, keys = xs
            caches = None if caches is None else list(caches)
            inputs, aux = [], Aux()
            for place, (spec, layer_weights) in enumerate(zip(specs, unstack(weights, len(specs)), strict=True)):
                cache = None if caches is None else caches[place].at(repeat)
                memory = None
                if memories is not None and states is not None and spec.memory_slots:
                    memory = LayerMemory(states[place], memories[place].valid_BM)
                inputs.append(x_BTD if memory is not None and cache is None else None)
                rngs = None if keys is None else {"dropout": keys[place]}
                at = depth + repeat * P + place
                block = Block(config, spec, parent=None)
                applied = block.apply({"params": layer_weights}, x_BTD, ctx, LayerState(cache, memory), at, rngs=rngs)
                x_BTD, state, told = cast(tuple[Array, LayerState, Aux], applied)
                aux += told
                if caches is not None and state.cache is not None:
                    caches[place] = state.cache
            return (x_BTD, None if caches is None else tuple(caches)), (tuple(inputs), aux)

        if config.remat == "none":
            return body
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if config.remat == "dots" else None
        return jax.checkpoint(body, policy=policy, prevent_cse=False)

    def repeated(x: Array) -> Array:
        return (x[: R * P] if group.tail else x).reshape(R, P, *x.shape[1:])

    whole_states = None if states is None else tuple(x[:R] for x in states)
    xs = (jnp.arange(R, dtype=jnp.int32), jax.tree.map(repeated, params), whole_states, jax.tree.map(repeated, keys))
    carry, (inputs, aux) = jax.lax.scan(body_of(group.period), (x_BTD, caches), xs, unroll=config.scan_unroll or R)
    aux = aux.over_first_axis()
    if group.tail:
        weights, keys = jax.tree.map(lambda x: x[R * P :], (params, keys))
        rest = None if states is None else tuple(x[-1] for x in states[: len(group.tail)])
        carry, (more, told) = body_of(group.tail)(carry, (jnp.asarray(R, jnp.int32), weights, rest, keys))
        inputs = tuple(map(_with_last, inputs, [*more, *[None] * (P - len(more))]))
        aux += told
    return GroupOutput(*carry, inputs, aux)


def _with_last(inputs: Array | None, last: Array | None) -> Array | None:
    """The inputs of a place's layers, of which the last one came after the scan."""
    return inputs if inputs is None or last is None else jnp.concatenate([inputs, last[None]])


def unstack(tree: Params, layers: int) -> list[Params]:
    """A tree of stacks [P, ...] as P trees. By a split, whose gradient is one concatenation."""
    leaves, structure = jax.tree.flatten(tree)
    split = [jax.lax.split(x, [1] * layers) for x in leaves]
    return [structure.unflatten([parts[i][0] for parts in split]) for i in range(layers)]
