"""Layers in stacks: the weights decide the layout, windows and memories do not; depth and place count."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.groups import apart, grouped
from helpers.numpy_decoder import decoder
from helpers.variants import BASE, call, init, make, make_model, mean_nll, run, run_on, slopes_of_nll, some_tokens
from jax.extend.core import jaxprs_in_params

from stellarbyte_jax.model.context import LayerContext
from stellarbyte_jax.model.decoder import ByteTransformer, forward, param_shapes
from stellarbyte_jax.model.io import Inputs, State
from stellarbyte_jax.model.layers import Given, Layers
from stellarbyte_jax.model.positions import position_scheme
from stellarbyte_jax.model.state.cache import make_cache
from stellarbyte_jax.model.state.memory import LayerMemory, Memory

SLIDING, FULL = "sliding_attention", "full_attention"
PATTERNS = {
    "full": {},
    "windows": {"sliding_window": 5},
    "period 2": {"sliding_window": 5, "layer_types": (SLIDING, FULL) * 2},
    "period 2, sinks": {"sliding_window": 5, "sink_tokens": 1, "layer_types": (FULL, SLIDING) * 2},
    "a period that does not divide": {"sliding_window": 5, "layer_types": (SLIDING, SLIDING, FULL, SLIDING)},
    "memory": {"memory": {"length": 6}},
    "a memory of its own in each layer": {"memory": {"length": (3, 0, 7, 4), "recent_share": 0.5}},
}
CUT_SHORT = {"sliding_window": 5, "num_hidden_layers": 5, "layer_types": (SLIDING, FULL, SLIDING, FULL, SLIDING)}


def config_of(pattern, **more):
    return dataclasses.replace(BASE, **(CUT_SHORT if pattern == "cut short" else PATTERNS[pattern]), **more)


def test_windows_and_memories_do_not_change_the_tree_or_the_initial_weights():
    plain = init(ByteTransformer(BASE))
    for pattern in PATTERNS:
        found = param_shapes(ByteTransformer(config_of(pattern)))
        assert jax.tree.map(np.shape, found) == jax.tree.map(np.shape, plain)
    for pattern in ("a period that does not divide", "a memory of its own in each layer"):
        jax.tree.map(np.testing.assert_array_equal, init(ByteTransformer(config_of(pattern))), plain)
    assert plain["layers"].keys() == {"0"}
    assert all(x.shape[0] == BASE.num_hidden_layers for x in jax.tree.leaves(plain["layers"]))
    assert not np.allclose(plain["layers"]["0"]["attn"]["q"][0], plain["layers"]["0"]["attn"]["q"][1])


@pytest.mark.parametrize("pattern", ["full", "period 2, sinks", "a period that does not divide"])
def test_weights_may_be_given_other_windows(pattern):
    _, params = make_model(BASE)
    tokens = some_tokens(1, 11)
    config = config_of(pattern)
    np.testing.assert_allclose(
        run(ByteTransformer(config), params, tokens)[0], decoder(config, params, tokens[0]), atol=3e-5
    )


def scans(jaxpr):
    """Number of loops in a program, inner ones included."""
    return sum(
        (eqn.primitive.name == "scan") + sum(scans(sub) for sub in jaxprs_in_params(eqn.params)) for eqn in jaxpr.eqns
    )


SOME = [("windows", (1, 0)), ("period 2", (1, 0)), ("period 2, sinks", (1, 1, 1, 1))]
SOME += [("a memory of its own in each layer", (1, 0)), ("a memory of its own in each layer", (1, 1, 1, 1))]


@pytest.mark.parametrize(("pattern", "sizes"), [*((pattern, (0,)) for pattern in PATTERNS), *SOME])
def test_each_group_is_one_loop(pattern, sizes):
    with grouped(*sizes):
        model = ByteTransformer(config_of(pattern))
        program = jax.make_jaxpr(lambda p, t: forward(model, p, Inputs(t)).hidden_BTD)(
            param_shapes(model), some_tokens(1, 8)
        )
    assert scans(program.jaxpr) == len(sizes)


def other_program(model, sizes):
    """The same network for jax.jit, to which a grouping is no argument."""
    seen_only_by_init = float(f"0.0{''.join(map(str, sizes))}")
    return ByteTransformer(dataclasses.replace(model.config, initializer_range=seen_only_by_init))


def test_several_groups_equal_one():
    """Logits, gradients and cached decoding, with a window pattern that the groups cut."""
    sizes = (1, 3)
    model, params = make_model(config_of("period 2, sinks"))
    tokens = some_tokens(2, 12)

    def everything(model, params):
        found = np.asarray(call(model, params, Inputs(tokens))[0])
        steps, state = run_on(model, params, tokens[:, :7], cache=make_cache(model.config, 2, 16))
        for at in range(7, 10):
            step, state = run_on(model, params, tokens[:, at : at + 1], cache=state.cache)
            steps = np.concatenate([steps, step], axis=1)
        return found, steps, slopes_of_nll(params, model, tokens)

    logits, steps, slopes = everything(model, params)
    np.testing.assert_allclose(steps, logits[:, :10], atol=2e-5)
    with grouped(*sizes):
        found, found_steps, found_slopes = everything(other_program(model, sizes), apart(params, *sizes))
    np.testing.assert_allclose(found, logits, atol=1e-5)
    np.testing.assert_allclose(found_steps, steps, atol=1e-5)
    for a, b in zip(jax.tree.leaves(found_slopes), jax.tree.leaves(apart(slopes, *sizes)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    ("lengths", "sizes"),
    [((3, 0, 7, 4), (1, 2, 1)), ((3, 0, 7, 3, 0, 7, 3, 0), (6, 2))],
    ids=["one period", "a tail"],
)
def test_several_groups_carry_the_memory_of_one(lengths, sizes):
    memory = {"length": lengths, "recent_share": 0.5}
    model, params = make_model(dataclasses.replace(BASE, memory=memory, num_hidden_layers=len(lengths)))
    tokens = some_tokens(2, 16)

    def in_segments(model, params):
        state = State(memory=Memory.create(model.config, 2))
        outs = []
        for at in (0, 8):
            found, out = call(model, params, Inputs(tokens[:, at : at + 8]), state)
            outs, state = [*outs, found], out.state
        return np.concatenate(outs, axis=1), state.memory

    expected, memory = in_segments(model, params)
    with grouped(*sizes):
        found, cut = in_segments(other_program(model, sizes), apart(params, *sizes))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    places = len(memory.groups[0])
    assert memory.slots == lengths[:places]
    layer_by_layer = [
        LayerMemory(stack.states[i], stack.valid_BM)
        for groups in (memory.groups, cut.groups)
        for group in groups
        for i in range(len(group[0].states))
        for stack in group
        if i < len(stack.states)
    ]
    ours, theirs = layer_by_layer[: len(lengths)], layer_by_layer[len(lengths) :]
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a.valid_BM, b.valid_BM)
        np.testing.assert_allclose(a.states, b.states, atol=1e-5)


def test_layers_after_the_last_whole_period_come_after_the_scan():
    """Logits against numpy; cached decoding against it, gradients against a last layer that is a group of its own."""
    settings, alone = {**CUT_SHORT, "sliding_window": 4, "sink_tokens": 1}, (4, 1)
    model, params = make_model(dataclasses.replace(BASE, **settings))
    tokens = some_tokens(2, 10)
    program = jax.make_jaxpr(lambda p: forward(model, p, Inputs(tokens)).hidden_BTD)(params).jaxpr
    assert [eqn.params["length"] for eqn in program.eqns if eqn.primitive.name == "scan"] == [2]
    found = np.asarray(run(model, params, tokens))
    for row in range(2):
        np.testing.assert_allclose(found[row], decoder(model.config, params, tokens[row]), atol=3e-5)

    state, steps = State(make_cache(model.config, 2, 12)), []
    for first, end in ((0, 6), (6, 7), (7, 10)):
        step, state = run_on(model, params, tokens[:, first:end], cache=state.cache)
        steps.append(step)
    np.testing.assert_allclose(np.concatenate(steps, axis=1), found, atol=2e-5)

    slopes = slopes_of_nll(params, model, tokens)
    with grouped(*alone):
        expected = slopes_of_nll(apart(params, *alone), other_program(model, alone), tokens)
    for a, b in zip(jax.tree.leaves(apart(slopes, *alone)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_scan_unroll_and_remat_change_nothing():
    tokens = some_tokens(2, 10)

    def loss_and_slope(**settings):
        model, params = make("mixed windows, qk norm, bias", **settings)
        return jax.jit(jax.value_and_grad(mean_nll), static_argnums=1)(params, model, tokens)

    plain = loss_and_slope()
    for settings in ({"scan_unroll": None, "remat": "full"}, {"remat": "dots"}):
        for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(loss_and_slope(**settings)), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_remat_saves_memory():
    """The compiled gradient of a deep model keeps fewer bytes alive."""
    tokens = some_tokens(4, 64)

    def bytes_kept(remat):
        model = ByteTransformer(dataclasses.replace(BASE, remat=remat, num_hidden_layers=8))
        program = slopes_of_nll.lower(param_shapes(model), model, tokens).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert bytes_kept("full") < 0.7 * bytes_kept("none")


def stream_of_biases(config, rows, dropout_key):
    """What layers add to an empty stream, when layer l's feed-forward layer gives 3^l and its attention nothing."""
    model = ByteTransformer(dataclasses.replace(config, mlp_bias=True, attention_output_bias=True))
    layers = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), param_shapes(model)["layers"])
    part, name = ("attn", "o_bias") if config.residual_dropout > 0 else ("mlp", "down_bias")
    depth = 0
    for group in layers.values():
        L = len(group[part][name])
        group[part][name] += 3 ** np.arange(depth, depth + L, dtype=np.float32)[:, None]
        depth += L

    @jax.jit
    def stream(layers, key):
        positions = jnp.broadcast_to(jnp.arange(3, dtype=jnp.int32)[None], (rows, 3))
        rope = position_scheme(config).frequencies(positions, None, positions >= 0, cached=False)
        ctx = LayerContext(positions, positions[:1], None, rope, train=key is not None)
        x, rngs = jnp.zeros((rows, 3, config.hidden_size)), None if key is None else {"dropout": key}
        return Layers(model.config).apply({"params": layers}, x, ctx, Given(), rngs=rngs).x_BTD

    return np.asarray(stream(layers, dropout_key))


# One layer a turn, several, a last turn cut short, and a group after another.
PLACES = [("full", (0,)), ("period 2", (0,)), ("a period that does not divide", (0,)), ("cut short", (0,))]
PLACES += [("full", (1, 0))]
NAMES = ["hidden_dropout", "residual_dropout", "hidden_dropout", "residual_dropout", "hidden_dropout"]


@pytest.mark.parametrize(("pattern", "sizes", "name"), [(*place, x) for place, x in zip(PLACES, NAMES, strict=True)])
def test_each_layer_has_a_dropout_mask_of_its_own(pattern, sizes, name):
    config = config_of(pattern, **{name: 0.5})
    with grouped(*sizes):
        stream = stream_of_biases(config, 8, jax.random.key(0))
    numbers = np.round(stream / 2).astype(int)  # kept ones are doubled
    np.testing.assert_allclose(stream, 2 * numbers, atol=1e-4)
    masks = [numbers // 3**layer % 3 for layer in range(config.num_hidden_layers)]
    for mask in masks:
        assert set(np.unique(mask)) == {0, 1} and 0.35 < mask.mean() < 0.65
    for a in range(len(masks)):
        for b in range(a):
            assert 0.35 < (masks[a] == masks[b]).mean() < 0.65


@pytest.mark.parametrize(("pattern", "sizes"), [PLACES[1], *PLACES[3:]])
def test_drop_path_leaves_out_whole_rows_more_often_in_deep_layers(pattern, sizes):
    """The share of rows without layer i's branch is rate * i / (L - 1); kept branches are scaled up."""
    rate, rows = 0.6, 600
    config = config_of(pattern, drop_path=rate)
    L = config.num_hidden_layers
    with grouped(*sizes):
        stream = stream_of_biases(config, rows, jax.random.key(1))
    assert np.ptp(stream, axis=(1, 2)).max() == 0
    keep = 1 - rate * np.arange(L) / (L - 1)
    choices = np.stack(np.meshgrid(*[[0, 1]] * L, indexing="ij"), axis=-1).reshape(-1, L)
    sums = choices @ (3.0 ** np.arange(L) / keep)
    nearest = np.argmin(np.abs(stream[:, 0, :1] - sums[None]), axis=1)
    np.testing.assert_allclose(stream[:, 0, 0], sums[nearest], rtol=1e-5)
    np.testing.assert_allclose(choices[nearest].mean(axis=0), keep, atol=0.08)
    assert np.all(choices[nearest][:, 0] == 1)
    if pattern == "cut short":  # off in evaluation
        np.testing.assert_allclose(stream_of_biases(config, 2, None), np.sum(3.0 ** np.arange(L)))
