"""Log-likelihoods of networks with experts against float64 loops: what gates remember goes to each continuation."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers import numpy_decoder
from helpers.variants import BASE, VARIANTS, make_model

from stellarbyte_jax.evaluation.likelihood import log_likelihoods
from stellarbyte_jax.evaluation.texts import Pair

MODELS = {
    "a gate with history": VARIANTS["experts in every second layer, by context, priority and temperature"],
    "rooms for few tokens in training": {
        "moe": {"num_experts": 6, "intermediate_size": 24, "dispatch": "capacity", "capacity_factor": 0.5}
    },
}


@pytest.mark.parametrize(
    ("name", "batch_size"),
    [("a gate with history", 2), ("a gate with history", 16), ("rooms for few tokens in training", 16)],
)
def test_each_continuation_has_the_score_of_a_text_of_its_own(name, batch_size):
    """Contexts of several continuations are read once, rows are padded, and few or many stand in a batch."""
    model, params = make_model(dataclasses.replace(BASE, **MODELS[name]))
    random = np.random.default_rng(0)
    contexts = [tuple(random.integers(0, 61, n).tolist()) for n in (3, 9, 14)]
    pairs = [Pair(context, tuple(random.integers(0, 61, n).tolist())) for context in contexts for n in (1, 4, 6)]
    found = log_likelihoods(model, params, pairs, batch_size=batch_size, max_length=32)
    wide = jax.tree.map(np.asarray, params)
    for pair, (log_prob, _) in zip(pairs, found, strict=True):
        text = [*pair.context, *pair.continuation]
        logits = numpy_decoder.decoder(model.config, wide, text[:-1])[-len(pair.continuation) :]
        logits -= np.log(np.exp(logits).sum(1, keepdims=True))
        assert log_prob == pytest.approx(logits[np.arange(len(logits)), list(pair.continuation)].sum(), abs=1e-4)
