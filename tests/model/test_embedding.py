"""The embedding and the head: padding of the vocabulary, and dropout of what is looked up."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from helpers.variants import BASE, call, init, make, run, some_tokens

from stellarbyte_jax.model.decoder import ByteTransformer
from stellarbyte_jax.model.io import Inputs


def test_padding_of_the_vocabulary_changes_nothing():
    plain, params = make("llama", vocab_size=61)
    padded, _ = make("llama", vocab_size_multiple=32)
    assert padded.config.padded_vocab_size == 64
    more = {
        **params,
        "embed": {"embedding": jnp.pad(params["embed"]["embedding"], ((0, 3), (0, 0)), constant_values=9.0)},
        "lm_head": {"kernel": jnp.pad(params["lm_head"]["kernel"], ((0, 0), (0, 3)), constant_values=9.0)},
    }
    tokens = some_tokens(2, 7)
    np.testing.assert_allclose(run(padded, more, tokens), run(plain, params, tokens), atol=1e-6)


def test_embedded_tokens_are_dropped_in_training():
    """Channel by channel; seen where the layers add nothing and the norm leaves zeros."""
    model = ByteTransformer(dataclasses.replace(BASE, hidden_dropout=0.5))
    params = init(model)
    params = {**params, "layers": jax.tree.map(jnp.zeros_like, params["layers"])}
    params["embed"] = {"embedding": jnp.ones((BASE.vocab_size, BASE.hidden_size))}
    plain = call(model, params, Inputs(some_tokens(4, 16)))[1].hidden_BTD
    np.testing.assert_allclose(plain, 1, atol=1e-4)
    dropped = np.asarray(call(model, params, Inputs(some_tokens(4, 16)), None, jax.random.key(0))[1].hidden_BTD) == 0
    assert 0.45 < dropped.mean() < 0.55
    assert not np.array_equal(dropped[0], dropped[1]) and not np.array_equal(dropped[:, 0], dropped[:, 1])


def test_dropout_acts_everywhere_it_is_set_and_only_in_training():
    tokens = some_tokens(1, 10)
    plain = run(*make("llama"), tokens)
    names = ("hidden_dropout", "residual_dropout", "attention_dropout")
    np.testing.assert_array_equal(run(*make("llama", **dict.fromkeys(names, 0.5)), tokens), plain)
    for name in names:
        model, params = make("llama", **{name: 0.5})
        a, b, again = (run(model, params, tokens, dropout_key=jax.random.key(k)) for k in (1, 2, 1))
        assert not np.allclose(a, plain) and not np.allclose(a, b)
        np.testing.assert_array_equal(a, again)
