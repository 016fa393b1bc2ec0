"""All layers of the network: for each group one scan over its stacked weights.

B batch, T positions, D model, L layers of a group, R repeats of its period of P layers.
"""

from typing import NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from stellarbyte_jax.config import ByteConfig, LayerGroup, LayerSpec
from stellarbyte_jax.model.attention import AttentionContext
from stellarbyte_jax.model.block import Block
from stellarbyte_jax.model.io import Aux
from stellarbyte_jax.model.state.layer_cache import LayerCache
from stellarbyte_jax.model.state.memory import LayerMemory

Caches = tuple[LayerCache, ...]
Memories = tuple[LayerMemory, ...]


class GroupOutput(NamedTuple):
    """What a group of layers gives.

    Attributes:
      x_BTD: activations.
      caches: of each place of the period; None without a cache.
      inputs: for each place that remembers the inputs [R, B, T, D] of its layers, else None.
      aux: losses and statistics, as means over all layers of the network.
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
        ctx: AttentionContext,
        caches: tuple[Caches, ...] | None,
        memories: tuple[Memories, ...] | None,
        train: bool,
    ) -> tuple[Float[Array, "B T D"], tuple[Caches, ...] | None, tuple[tuple[Array | None, ...], ...], Aux]:
        """Maps [B, T, D] to [B, T, D], caches by group and place, layer inputs to be remembered, and losses."""
        c = self.config
        found = []
        depth, aux = 0, Aux()
        for number, group in enumerate(c.layer_groups):
            if self.is_initializing():
                make_layer = nn.scan(
                    lambda block, x_BTD, _: (block(x_BTD, ctx, None, None, jnp.zeros((), jnp.int32), False)[0], None),
                    variable_axes={"params": 0},
                    split_rngs={"params": True},
                    length=len(group.specs),
                    metadata_params={nn.PARTITION_NAME: "layers"},
                )
                x_BTD, _ = make_layer(Block(c, LayerSpec(None), name=str(number)), x_BTD, None)
                continue
            drops = train and max(c.attention_dropout, c.hidden_dropout, c.residual_dropout, c.drop_path) > 0
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
                train,
            )
            x_BTD, aux = out.x_BTD, aux + out.aux
            depth += len(group.specs)
            found.append(out)
        after = None if caches is None else tuple(out.caches for out in found)
        return x_BTD, after, tuple(out.inputs for out in found), aux


def run_group(
    config: ByteConfig,
    group: LayerGroup,
    params: dict[str, object],
    x_BTD: Float[Array, "B T D"],
    ctx: AttentionContext,
    caches: Caches | None,
    memories: Memories | None,
    dropout_key: Array | None,
    depth: int,
    train: bool,
) -> GroupOutput:
    """Applies the layers of a group, with stacked ``params`` [L, ...]; ``depth`` is that of the first layer."""
    period, R = group.period, group.repeats
    P = len(period)
    by_period = jax.tree.map(lambda x: x.reshape(R, P, *x.shape[1:]), params)
    keys_RP = None if dropout_key is None else jax.random.split(dropout_key, (R, P))

    def body(carry, xs):
        x_BTD, caches = carry
        repeat, weights, states, keys_P = xs
        caches = list(caches) if caches is not None else None
        inputs, told = [], []
        for place, (spec, layer_weights) in enumerate(zip(period, unstack(weights, P), strict=True)):
            cache = None if caches is None else caches[place].at(repeat)
            memory = None
            if memories is not None and states is not None and spec.memory_slots:
                memory = LayerMemory(states[place], memories[place].valid_BM)
            inputs.append(x_BTD if memory is not None and cache is None else None)
            rngs = None if keys_P is None else {"dropout": keys_P[place]}
            at = depth + repeat * P + place
            block = Block(config, spec, parent=None)
            applied = block.apply({"params": layer_weights}, x_BTD, ctx, cache, memory, at, train, rngs=rngs)
            x_BTD, cache, aux = cast(tuple[Array, LayerCache | None, Aux], applied)
            told.append(aux)
            if caches is not None:
                caches[place] = cache
        carry = (x_BTD, None if caches is None else tuple(caches))
        return carry, (tuple(inputs), jax.tree.map(lambda *layers: sum(layers), *told))

    if config.remat != "none":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if config.remat == "dots" else None
        body = jax.checkpoint(body, policy=policy, prevent_cse=False)
    states = None if memories is None else tuple(memory.states for memory in memories)
    repeats = jnp.arange(R, dtype=jnp.int32)
    (x_BTD, caches), (inputs, aux) = jax.lax.scan(
        body, (x_BTD, caches), (repeats, by_period, states, keys_RP), unroll=config.scan_unroll or R
    )
    return GroupOutput(x_BTD, caches, inputs, aux.mean_over_layers(config.num_hidden_layers))


def unstack(tree: dict[str, object], layers: int) -> list[dict[str, object]]:
    """A tree of stacks [P, ...] as P trees. By a split, whose gradient is one concatenation."""
    leaves, structure = jax.tree.flatten(tree)
    split = [jax.lax.split(x, [1] * layers) for x in leaves]
    return [structure.unflatten([parts[i][0] for parts in split]) for i in range(layers)]
