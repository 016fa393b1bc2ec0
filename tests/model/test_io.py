"""States are cut by rows, and what layers tell is added up."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.variants import BASE, call, make, run_on, some_tokens

from stellarbyte_jax.model.io import Aux, Inputs, Mean, State
from stellarbyte_jax.model.state.memory import Memory


def test_a_state_is_cut_into_its_rows_and_joined_again():
    config = dataclasses.replace(BASE, memory={"length": (3, 0, 7, 4)})
    memory = Memory.create(config, 4).replace(lengths_B=jnp.arange(4, dtype=jnp.int32))
    cut = State(memory=memory).split(2)
    assert cut.memory.lengths_B.tolist() == [[0, 2], [1, 3]]
    jax.tree.map(np.testing.assert_array_equal, cut.joined(), State(memory=memory))
    assert State().split(2) == State() == State().joined()


def test_rows_of_a_state_have_their_own_history():
    """As continuations have that of the context they share."""
    config = dataclasses.replace(BASE, moe={"num_experts": 4, "gate": "context", "history_decay": 0.5})
    state = State.empty(config, 3, 8)
    assert state.router.history_LBD.shape == (4, 3, BASE.hidden_size)
    history = jnp.arange(4 * 3 * 2.0).reshape(4, 3, 2)
    found = state.replace(router=state.router.replace(history_LBD=history)).select([2, 0, 2, 2])
    np.testing.assert_array_equal(found.router.history_LBD, np.asarray(history)[:, [2, 0, 2, 2]])
    assert found.cache.batch_size == 4


def test_what_layers_tell_is_added_by_name():
    a = Aux.of({"x": jnp.asarray(1.0)}, {"s": jnp.asarray(3.0)})
    b = Aux.of({"x": jnp.asarray(2.0), "y": jnp.asarray(5.0)})
    assert (a + b).losses == {"x": Mean(3.0, 2.0), "y": Mean(5.0, 1.0)}
    assert (a + b).statistics == {"s": Mean(3.0, 1.0)}
    assert (a + b + a).values() == {"x": pytest.approx(4 / 3), "y": 5.0, "s": 3.0}


def test_what_the_repeats_of_a_scan_tell_is_one_mean():
    """Also of vectors, and of names that only some layers tell."""
    stacked = Aux({"x": Mean(jnp.asarray([1.0, 2.0]), jnp.asarray([1.0, 3.0]))})
    assert stacked.over_first_axis().values() == {"x": 0.75}
    vectors = Aux.of(statistics={"load": jnp.asarray([1.0, 5.0])}) + Aux.of(
        statistics={"load": jnp.asarray([3.0, 1.0])}
    )
    np.testing.assert_array_equal(vectors.values()["load"], [2.0, 3.0])


def test_a_name_has_one_meaning():
    with pytest.raises(ValueError, match="x: the name of a loss and of a statistic"):
        Aux.of({"x": jnp.asarray(1.0)}, {"x": jnp.asarray(1.0)}).values()


def test_a_state_names_what_it_holds():
    memory = Memory.create(dataclasses.replace(BASE, memory={"length": 3}), 2)
    assert State().parts() == {} and State(memory=memory).parts() == {"memory": memory}
    assert State.initial(BASE, 2) == State()


@pytest.mark.parametrize("types", [None, ("sliding_attention", "full_attention") * 2 + ("sliding_attention",)])
def test_the_loss_of_learned_rates_is_a_mean_over_layers(types):
    """Those after the scan among them, where a pattern of windows is cut short."""
    windows = {} if types is None else {"layer_types": types, "sliding_window": 3, "num_hidden_layers": 5}
    model, params = make("deepnorm, learned xpos, padded vocabulary", **windows)
    _, out = call(model, params, Inputs(some_tokens(1, 4)))
    pair = np.arange(0, 8, 2) / 8
    away = np.asarray(params["layers"]["0"]["attn"]["xpos_rate"]) + np.log((pair + 0.4) / 1.4)
    np.testing.assert_allclose(out.aux.losses["xpos_regularization"].value, np.mean(away**2), rtol=1e-5)
    assert out.aux.statistics == {}


def test_every_call_gives_the_same_kind_of_result():
    model, params = make("llama")
    _, out = call(model, params, Inputs(some_tokens(1, 4)))
    assert out.state == State() and out.aux == Aux()
    _, state = run_on(model, params, some_tokens(1, 4))
    assert state == State()
