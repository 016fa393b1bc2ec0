"""What a run carries: the first state, its views of the weights, its shapes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.training import MODEL, flat, packed_batch, settings, start

from stellarbyte_jax.config import DataConfig
from stellarbyte_jax.model.decoder import ByteTransformer, init_params
from stellarbyte_jax.model.io import State
from stellarbyte_jax.model.trees import paths
from stellarbyte_jax.training.optimizer import make_optimizer
from stellarbyte_jax.training.state import TrainState, create_state, state_shapes


def not_embedding(path):
    return path[0] != "embed"


@pytest.fixture(scope="module")
def made():
    config = settings(ema_decay=0.9)
    model = ByteTransformer(config.model)
    optimizer = make_optimizer(config, model)
    return config, model, optimizer, create_state(config, model, optimizer)


def test_the_first_state(made):
    """Weights of the seed, an average that begins with them in buffers of its own, nothing carried."""
    config, model, _, state = made
    expected = flat(init_params(model, jax.random.key(config.seed)))
    assert flat(state.params).keys() == expected.keys() == flat(state.ema).keys()
    for path, weight in flat(state.params).items():
        np.testing.assert_array_equal(weight, expected[path], err_msg=path)
        average = flat(state.ema)[path]
        np.testing.assert_array_equal(average, weight, err_msg=path)
        assert average.unsafe_buffer_pointer() != weight.unsafe_buffer_pointer(), path  # a step donates both
    assert int(state.step) == 0 and state.step.dtype == jnp.int32
    assert state.frozen == {} and state.carried == State()
    other = jax.jit(lambda: create_state(dataclasses.replace(config, seed=1), *made[1:3]).params)()
    assert np.any(flat(other)["lm_head/kernel"] != expected["lm_head/kernel"])


def test_without_an_average_none_is_kept(made):
    config, model, optimizer, _ = made
    plain = dataclasses.replace(config, ema_decay=None)
    assert jax.eval_shape(lambda: create_state(plain, model, optimizer)).ema is None


def test_weights_and_averaged_weights():
    """Validation and export read ``averaged``; both views have the frozen weights in them."""
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params={"a": {"b": 1.0}},
        opt_state=(),
        ema={"a": {"b": 2.0}},
        frozen={"a": {"c": 3.0}, "d": 4.0},
        carried=State(),
    )
    assert state.weights == {"a": {"b": 1.0, "c": 3.0}, "d": 4.0}
    assert state.averaged == {"a": {"b": 2.0, "c": 3.0}, "d": 4.0}
    assert state.replace(ema=None).averaged == state.weights


def test_the_average_of_the_weights():
    """By hand over three steps, of the trainable weights alone; the frozen ones are in the averaged view."""
    state, step = start(settings(ema_decay=0.9), is_trainable=not_embedding)
    embedding = state.frozen["embed"]["embedding"]
    expected = {path: np.float64(w) for path, w in flat(state.params).items()}
    for _ in range(3):
        state, _ = step(state, packed_batch())
        weights = flat(state.params)
        expected = {path: 0.9 * average + 0.1 * np.float64(weights[path]) for path, average in expected.items()}
    averaged = flat(state.averaged)
    np.testing.assert_array_equal(averaged.pop("embed/embedding"), embedding)
    assert averaged.keys() == expected.keys()
    for path, average in averaged.items():
        np.testing.assert_allclose(average, expected[path], atol=1e-6, err_msg=path)
    assert np.abs(averaged["lm_head/kernel"] - state.params["lm_head"]["kernel"]).max() > 1e-3


def test_what_routers_keep_is_beside_the_weights():
    """In neither the optimizer's state nor the average; the averaged view has what the last step made of it."""
    moe = {"num_experts": 4, "intermediate_size": 8, "bias_update_rate": 0.1}
    config = settings(ema_decay=0.9, model=dataclasses.replace(MODEL, num_hidden_layers=1, moe=moe))
    state, step = start(config)
    kept = {path for path in flat(state.frozen) if "/tracked/" in path}
    assert len(kept) == 6 and kept == flat(state.frozen).keys()
    before = flat(state.frozen)
    state, _ = step(state, packed_batch())
    for tree in (state.params, state.opt_state, state.ema):
        assert not any("tracked" in path for path in paths(tree))
    assert flat(state.averaged).keys() == flat(state.params).keys() | kept
    for path in kept:
        np.testing.assert_array_equal(flat(state.averaged)[path], flat(state.frozen)[path], err_msg=path)
    assert np.any(before["layers/0/moe/router/tracked/bias"] != flat(state.frozen)["layers/0/moe/router/tracked/bias"])


@pytest.mark.parametrize("is_trainable", [lambda path: True, not_embedding])
def test_shapes_are_those_of_the_state(made, is_trainable):
    config, model, _, _ = made
    optimizer = make_optimizer(config, model, is_trainable)
    shapes = state_shapes(config, model, optimizer, is_trainable)
    state = jax.jit(lambda: create_state(config, model, optimizer, is_trainable))()
    assert jax.tree.structure(shapes) == jax.tree.structure(state)
    for shape, x in zip(jax.tree.leaves(shapes), jax.tree.leaves(state), strict=True):
        assert isinstance(shape, jax.ShapeDtypeStruct)
        assert (shape.shape, shape.dtype) == (x.shape, x.dtype)


def test_memory_begins_empty_for_the_whole_batch():
    model = dataclasses.replace(MODEL, memory={"length": (0, 6)})
    config = settings(model=model, data=DataConfig(sequence_length=16, arrangement="contiguous"))
    network = ByteTransformer(model)
    memory = jax.jit(lambda: create_state(config, network, make_optimizer(config, network)).carried.memory)()
    assert memory is not None and memory.batch_size == 4 and memory.slots == (0, 6)
    assert not any(np.any(place.valid_BM) for places in memory.groups for place in places)
    assert State.initial(MODEL, 4) == State()
