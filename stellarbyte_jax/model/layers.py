"""All layers of the network: for each group one scan over its stacked weights.

B batch, T positions, D model, L layers of a group, R repeats of its period of P layers.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from stellarbyte_jax.config import ByteConfig, LayerGroup, LayerSpec
from stellarbyte_jax.model.block import Block
from stellarbyte_jax.model.context import LayerContext
from stellarbyte_jax.model.experts import Experts
from stellarbyte_jax.model.io import Aux, LayerState, sum_of
from stellarbyte_jax.model.state.layer_cache import LayerCache
from stellarbyte_jax.model.state.memory import LayerMemory
from stellarbyte_jax.model.state.router import RouterState
from stellarbyte_jax.model.trees import Params
from stellarbyte_jax.sharding import current_mesh

POOL = "pool"
Tree = TypeVar("Tree")

Caches = tuple[LayerCache, ...]
Memories = tuple[LayerMemory, ...]
Carry = tuple[Array, Caches | None]
Stack = Params | tuple[Params, ...]  # weights [L, ...], or those of each layer


class Repeat(NamedTuple):
    """What a turn of the scan has of its own.

    Attributes:
      number: of the turn.
      weights: those of its layers, a stack or a list for each kind of layer.
      states: memory of its layers.
      routers: what the routers of its layers carry, stacked.
      keys: of dropout, one a layer.
    """

    number: Array
    weights: tuple[Params | list[Params], ...]
    states: tuple[Array, ...] | None
    routers: RouterState | None
    keys: Array | None


class Told(NamedTuple):
    """What a turn of the scan gives besides activations and caches.

    Attributes:
      inputs: of the layers, for each place that remembers them.
      routers: what the routers of its layers carry, stacked.
      aux: losses and statistics of its layers.
    """

    inputs: tuple[Array | None, ...]
    routers: RouterState | None
    aux: Aux


# What the backward pass has of the forward pass, besides all of it. Where weights that were gathered from other devices
# are kept, those of all layers are whole on every device.
_POLICIES = {
    "weights": lambda primitive, *_, **__: primitive.name not in ("sharding_constraint", "all_gather"),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": None,
}
Body = Callable[[Carry, Repeat], tuple[Carry, Told]]


class Given(NamedTuple):
    """What all layers have besides activations and weights.

    Attributes:
      caches: by group and place.
      memories: likewise.
      routers: what the routers of the layers with experts carry, stacked.
    """

    caches: tuple[Caches, ...] | None = None
    memories: tuple[Memories, ...] | None = None
    routers: RouterState | None = None


class OfGroup(NamedTuple):
    """The same of a group.

    Attributes:
      caches: by place.
      memories: likewise.
      routers: of the group's layers with experts.
    """

    caches: Caches | None = None
    memories: Memories | None = None
    routers: RouterState | None = None


class GroupOutput(NamedTuple):
    """What the layers of a group give.

    Attributes:
      x_BTD: activations.
      caches: of each place of the period; None without a cache.
      inputs: for each place that remembers the inputs [R, B, T, D] of its layers, else None.
      routers: what the routers of the layers with experts carry, stacked.
      aux: losses and statistics of the layers.
    """

    x_BTD: Array
    caches: Caches | None
    inputs: tuple[Array | None, ...]
    routers: RouterState | None
    aux: Aux


class LayersOutput(NamedTuple):
    """What all layers give.

    Attributes:
      x_BTD: activations.
      caches: by group and place; None without a cache.
      inputs: those of groups, see :class:`GroupOutput`.
      routers: what the routers of the layers with experts carry, stacked.
      aux: losses and statistics of the layers.
    """

    x_BTD: Array
    caches: tuple[Caches, ...] | None
    inputs: tuple[tuple[Array | None, ...], ...]
    routers: RouterState | None
    aux: Aux


class Layers(nn.Module):
    """The blocks of every group, whose weights are stacks ``[L, ...]`` under the number of the stack.

    Weights are made by ``nn.scan`` and used by ``lax.scan``: a stack depends on the layers' weights alone, while the
    loop's body depends on their windows and memories too, P layers at a time. Experts that all layers share are no
    stack; their name is ``pool``.
    """

    config: ByteConfig

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"], ctx: LayerContext, given: Given) -> LayersOutput:
        """Maps [B, T, D] to [B, T, D], and updates what layers have."""
        c = self.config
        if c.moe.shared_pool:
            ctx = ctx.replace(pool=self._pool())  # type: ignore[attr-defined]
        if self.is_initializing():
            for group in c.layer_groups:
                for stack in group.stacks:
                    x_BTD = self._make(x_BTD, ctx, stack, group.of_stack(stack))
            return LayersOutput(x_BTD, None, (), None, Aux())
        found: list[GroupOutput] = []
        depth, routed = 0, 0
        for number, group in enumerate(c.layer_groups):
            experts = sum(spec.moe for spec in group.specs)
            out = run_group(
                c,
                group,
                {stack: self.get_variable("params", str(stack)) for stack in group.stacks},
                x_BTD,
                ctx,
                OfGroup(
                    None if given.caches is None else given.caches[number],
                    None if given.memories is None else given.memories[number],
                    jax.tree.map(lambda x, at=routed, n=experts: x[at : at + n], given.routers) if experts else None,
                ),
                self.make_rng("dropout") if ctx.train and c.is_random else None,
                depth,
            )
            x_BTD = out.x_BTD
            depth, routed = depth + len(group.specs), routed + experts
            found.append(out)
        caches = None if given.caches is None else tuple(out.caches for out in found if out.caches is not None)
        routers = [out.routers for out in found if out.routers is not None]
        after = jax.tree.map(lambda *parts: jnp.concatenate(parts), *routers) if routers else None
        inputs = tuple(out.inputs for out in found)
        return LayersOutput(x_BTD, caches, inputs, after, sum_of(out.aux for out in found))

    def _make(self, x_BTD: Array, ctx: LayerContext, stack: int, specs: tuple[LayerSpec, ...]) -> Array:
        make_layer = nn.scan(
            lambda block, x_BTD, _: (block(x_BTD, ctx, LayerState(), jnp.zeros((), jnp.int32))[0], None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=len(specs),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return make_layer(Block(self.config, specs[0], name=str(stack)), x_BTD, None)[0]

    def _pool(self) -> Params:
        experts = Experts(self.config, name=POOL)
        if self.is_initializing():
            experts()
        return self.get_variable("params", POOL)


def run_group(
    config: ByteConfig,
    group: LayerGroup,
    params: Mapping[int, Stack],
    x_BTD: Float[Array, "B T D"],
    ctx: LayerContext,
    given: OfGroup,
    dropout_key: Array | None,
    depth: int,
) -> GroupOutput:
    """Applies the layers of a group.

    Args:
      config: of the network.
      group: the layers.
      params: stacks of weights [L, ...], or a tree for each layer: then there is no loop.
      x_BTD: activations.
      ctx: the tokens.
      given: what the layers have besides.
      dropout_key: None for none.
      depth: of the first layer.
    """
    P, R = len(group.period), group.repeats
    keys = None if dropout_key is None else jax.random.split(dropout_key, len(group.specs))
    memories = given.memories
    states = None if memories is None else tuple(memory.states for memory in memories)
    routed = sum(spec.moe for spec in group.period)
    counts = {stack: sum(group.stack_of(spec) == stack for spec in group.period) for stack in group.stacks}

    def body_of(specs: tuple[LayerSpec, ...]) -> Body:
        """The layers of a period, or of the beginning of one."""

        def body(carry: Carry, xs: Repeat) -> tuple[Carry, Told]:
            x_BTD, caches = carry
            caches = None if caches is None else list(caches)
            inputs, after, aux = [], [], Aux()
            stacks = zip(group.stacks, xs.weights, strict=True)
            weights = {stack: iter(layers_of(tree, counts[stack])) for stack, tree in stacks}
            routers = iter(() if xs.routers is None else layers_of(xs.routers, routed))
            keys = None if xs.keys is None else layers_of(xs.keys, P)
            for place, spec in enumerate(specs):
                cache = None if caches is None else caches[place].at(xs.number)
                memory = None
                if memories is not None and xs.states is not None and spec.memory_slots:
                    memory = LayerMemory(xs.states[place], memories[place].valid_BM)
                inputs.append(x_BTD if memory is not None and cache is None else None)
                rngs = None if keys is None else {"dropout": keys[place]}
                at = depth + xs.number * P + place
                block = Block(config, spec, parent=None)
                state = LayerState(cache, memory, next(routers, None) if spec.moe else None)
                applied = block.apply({"params": next(weights[group.stack_of(spec)])}, x_BTD, ctx, state, at, rngs=rngs)
                x_BTD, state, told = cast(tuple[Array, LayerState, Aux], applied)
                aux += told
                if state.router is not None:
                    after.append(state.router)
                if caches is not None and state.cache is not None:
                    caches[place] = state.cache
            carried = jax.tree.map(lambda *xs: jnp.stack(xs), *after) if after else None
            return (x_BTD, None if caches is None else tuple(caches)), Told(tuple(inputs), carried, aux)

        if config.remat == "none" or (config.remat == "weights" and current_mesh() is None):
            return body
        return jax.checkpoint(body, policy=_POLICIES[config.remat], prevent_cse=False)

    def turns(tree: Tree, layers: int) -> Tree:
        """Stacks of all layers as stacks [R, layers, ...]; the last layers are left out where they are cut short.

        One layer a turn has no axis: XLA on a CPU would copy all weights for the sake of an axis of size one.
        """
        each = () if layers == 1 else (layers,)
        return jax.tree.map(lambda x: x[: R * layers].reshape(R, *each, *x.shape[1:]), tree)

    def rest(tree: Tree, layers: int) -> Tree:
        return jax.tree.map(lambda x: x[-1] if layers == 1 else x[R * layers :], tree)

    def layers_of(tree: Tree | list[Tree], layers: int) -> list[Tree]:
        if isinstance(tree, list):
            return tree
        return [tree] if layers == 1 else unstack(tree)

    def weights_of(turn: int) -> tuple[list[Params], ...]:
        """Where layers are apart, those of a turn; in the last one there may be fewer."""
        return tuple(list(params[stack][turn * n : (turn + 1) * n]) for stack, n in counts.items())  # type: ignore[index]

    apart = any(isinstance(params[stack], tuple) for stack in group.stacks)
    xs = Repeat(
        jnp.arange(R, dtype=jnp.int32),
        () if apart else tuple(turns(cast(Params, params[stack]), n) for stack, n in counts.items()),
        None if states is None else tuple(x[:R] for x in states),
        turns(given.routers, routed),
        turns(keys, P),
    )
    body, first = body_of(group.period), (x_BTD, given.caches)
    if apart:
        scanned = _in_turns(body, first, xs, [weights_of(turn) for turn in range(R)])
    else:
        scanned = jax.lax.scan(body, first, xs, unroll=config.scan_unroll or R)
    carry, (inputs, routers, aux) = scanned
    routers = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), routers)
    aux = aux.over_first_axis()
    if group.tail:
        last = Repeat(
            jnp.asarray(R, jnp.int32),
            weights_of(R) if apart else tuple(rest(cast(Params, params[stack]), n) for stack, n in counts.items()),
            None if states is None else tuple(x[-1] for x in states[: len(group.tail)]),
            rest(given.routers, routed),
            rest(keys, P),
        )
        carry, (more, after, told) = body_of(group.tail)(carry, last)
        inputs = tuple(map(_with_last, inputs, [*more, *[None] * (P - len(more))]))
        if after is not None:
            routers = jax.tree.map(lambda *parts: jnp.concatenate(parts), routers, after)
        aux += told
    return GroupOutput(*carry, inputs, routers, aux)


def with_layers_apart(params: Params) -> Params:
    """The weights of a network with a tree for each layer in place of each stack of them: copies.

    A program reads weights of a stack only by copying them, but for some products.
    """
    layers = {name: tree if name == POOL else tuple(unstack(tree)) for name, tree in params["layers"].items()}
    return {**params, "layers": layers}


def layers_are_apart(params: Params) -> bool:
    """Whether the weights are those of :func:`with_layers_apart`."""
    return any(isinstance(tree, tuple) for tree in params["layers"].values())


def _in_turns(body: Body, carry: Carry, xs: Repeat, weights: Sequence[tuple[list[Params], ...]]) -> tuple[Carry, Told]:
    """What ``lax.scan`` gives, with weights for each turn."""
    told = []
    for turn, mine in enumerate(weights):
        own = jax.tree.map(lambda x, turn=turn: x[turn], xs)
        carry, more = body(carry, own._replace(number=jnp.asarray(turn, jnp.int32), weights=mine))
        told.append(more)
    return carry, jax.tree.map(lambda *xs: jnp.stack(xs), *told)


def _with_last(inputs: Array | None, last: Array | None) -> Array | None:
    """The inputs of a place's layers, of which the last one came after the scan."""
    return inputs if inputs is None or last is None else jnp.concatenate([inputs, last[None]])


def unstack(tree: Tree) -> list[Tree]:
    """A tree of stacks [P, ...] as P trees. By a split, whose gradient is one concatenation."""
    leaves, structure = jax.tree.flatten(tree)
    layers = leaves[0].shape[0]
    split = [jax.lax.split(x, [1] * layers) for x in leaves] if layers else []
    return [structure.unflatten([parts[i][0] for parts in split]) for i in range(layers)]
