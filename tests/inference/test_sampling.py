"""Processors against transformers', and what sampling promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stellarbyte_jax.inference import sampling
from stellarbyte_jax.inference.sampling import Sampler, SamplingConfig

B, V = 5, 211


@pytest.fixture
def logits():
    return np.random.default_rng(0).normal(scale=3.0, size=(B, V)).astype(np.float32)


@pytest.fixture
def history():
    return np.random.default_rng(1).integers(0, V, size=(B, 17))


def seen(history):
    mask = np.zeros((B, V), bool)
    np.put_along_axis(mask, history, True, axis=1)
    return jax.device_put(mask)


def peer(processors, history, logits):
    torch = pytest.importorskip("torch", reason="transformers' processors need torch")
    from transformers.generation import logits_process

    scores = torch.tensor(logits)
    for name, values in processors:
        scores = getattr(logits_process, name)(**values)(torch.tensor(history), scores)
    return scores.numpy()


CASES = {
    "temperature": (dict(temperature=0.7), [("TemperatureLogitsWarper", dict(temperature=0.7))]),
    "top_k": (dict(temperature=1.0, top_k=7), [("TopKLogitsWarper", dict(top_k=7))]),
    "top_k_above_vocabulary": (dict(temperature=1.0, top_k=1000), [("TopKLogitsWarper", dict(top_k=1000))]),
    "top_p": (dict(temperature=1.0, top_p=0.8), [("TopPLogitsWarper", dict(top_p=0.8))]),
    "tiny_top_p": (dict(temperature=1.0, top_p=1e-6), [("TopPLogitsWarper", dict(top_p=1e-6))]),
    "whole_top_p": (dict(temperature=1.0, top_p=1.0), []),
    "min_p": (dict(temperature=1.0, min_p=0.03), [("MinPLogitsWarper", dict(min_p=0.03))]),
    "no_min_p": (dict(temperature=1.0, min_p=0.0), []),
    "penalty": (dict(repetition_penalty=1.3), [("RepetitionPenaltyLogitsProcessor", dict(penalty=1.3))]),
    "all": (
        dict(repetition_penalty=1.3, temperature=1.7, top_k=40, top_p=0.7, min_p=0.02),
        [
            ("RepetitionPenaltyLogitsProcessor", dict(penalty=1.3)),
            ("TemperatureLogitsWarper", dict(temperature=1.7)),
            ("TopKLogitsWarper", dict(top_k=40)),
            ("TopPLogitsWarper", dict(top_p=0.7)),
            ("MinPLogitsWarper", dict(min_p=0.02)),
        ],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_processors_equal_transformers(case, logits, history):
    settings, processors = CASES[case]
    ours = Sampler.of(SamplingConfig(**settings)).process(jax.device_put(logits), seen(history))
    theirs = peer(processors, history, logits)
    if settings.get("temperature"):  # ours are counted from the largest
        theirs = theirs - theirs.max(axis=1, keepdims=True)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-5)


def test_order_matters_in_the_case_above(logits, history):
    settings, _ = CASES["all"]
    sampler = Sampler.of(SamplingConfig(**settings))
    swapped = sampling.keep_top_k(sampling.keep_top_p(jax.device_put(logits) / 1.7, 0.7), 40)
    assert (np.isfinite(swapped) != np.isfinite(sampler.process(jax.device_put(logits), seen(history)))).any()


def test_ties_with_the_last_kept_token_stay_and_negative_zero_is_zero():
    tied = jnp.asarray([[1.0, 0.0, -0.0, 0.0, -1.0], [-3.0, -3.0, -jnp.inf, -4.0, -3.0]], jnp.float32)
    kept = np.isfinite(sampling.keep_top_k(tied, 2))
    np.testing.assert_array_equal(kept, [[True, True, True, True, False], [True, True, False, False, True]])


def test_temperature_zero_is_argmax(logits):
    keys_B = sampling.row_keys(0, B)
    tokens_B = sampling.sample(jax.device_put(logits), keys_B, Sampler.of(SamplingConfig()))
    np.testing.assert_array_equal(tokens_B, logits.argmax(axis=1))
    assert tokens_B.dtype == jnp.int32


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-37, 1.2e-38])
@pytest.mark.parametrize("more", [{}, {"top_p": 0.9}, {"top_k": 2}, {"min_p": 0.1}, {"top_p": 1.2e-38}], ids=str)
def test_a_tiny_temperature_takes_the_most_likely_token(temperature, more):
    logits = jax.device_put(np.asarray([[2.0, 5.0, 10.0, -3.0], [40.0, 41.0, -1.0, 41.5]], np.float32))
    sampler = Sampler.of(SamplingConfig(temperature=temperature, **more))
    assert sampling.sample(logits, sampling.row_keys(0, 2), sampler).tolist() == [2, 3]


def test_a_penalty_at_the_end_of_its_range_gives_numbers():
    logits = jax.device_put(np.asarray([[40.0, 50.0, -3.0]], np.float32))
    seen_BV = jnp.asarray([[True, True, True]])
    for penalty in (1.2e-38, 3e38):
        sampler = Sampler.of(SamplingConfig(temperature=1.0, repetition_penalty=penalty))
        assert not np.isnan(sampler.process(logits, seen_BV)).any()


def test_samples_follow_the_distribution(logits):
    n = 4000
    few = logits[:1, :6] / 3
    keys = jax.random.split(jax.random.key(3), n)
    sampler = Sampler.of(SamplingConfig(temperature=0.5, top_k=4))
    drawn = np.asarray(sampling.sample(jax.device_put(np.repeat(few, n, axis=0)), keys, sampler))
    expected = np.exp(few[0] / 0.5) * (few[0] >= np.sort(few[0])[-4])
    expected /= expected.sum()
    share = np.bincount(drawn, minlength=6) / n
    assert (share[expected == 0] == 0).all()
    np.testing.assert_allclose(share, expected, atol=5 * np.sqrt(0.25 / n))


def test_rows_draw_apart_and_a_row_seed_stands_alone():
    keys = jax.random.key_data(sampling.row_keys(7, 4))
    assert len(np.unique(np.asarray(keys), axis=0)) == 4
    alone = jax.random.key_data(sampling.row_keys((9,), 1))
    np.testing.assert_array_equal(jax.random.key_data(sampling.row_keys((5, 9), 2))[1:], alone)


def test_a_number_is_traced_and_a_switch_is_static():
    def structure(**settings):
        return jax.tree.structure(Sampler.of(SamplingConfig(**settings)))

    assert structure(temperature=0.5, top_k=3, top_p=0.3) == structure(temperature=2.0, top_k=9, top_p=0.9)
    assert structure(temperature=0.5) != structure(temperature=0.5, top_p=0.9)
    shapes = [Sampler.of(SamplingConfig(stop_tokens=tuple(range(n)))).stop_tokens_X.shape for n in (0, 1, 8, 9)]
    assert shapes == [(8,), (8,), (8,), (16,)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(temperature=-0.1), "temperature must be a number at least 0"),
        (dict(temperature=float("nan")), "temperature must be a number"),
        (dict(temperature="warm"), "temperature must be a number"),
        (dict(temperature=1e-38), "temperature must be a number .* float32 can hold, from 1.18e-38 .*; got 1e-38"),
        (dict(temperature=1e39), "temperature must be a number .* to 3.40e.38; got 1e.39"),
        (dict(temperature=1.0, top_p=1e-40), "top_p must be a number .* float32 can hold"),
        (dict(temperature=1.0, min_p=1e-60), "min_p must be a number .* float32 can hold"),
        (dict(repetition_penalty=1e-46), "repetition_penalty must be a number .* float32 can hold"),
        (dict(temperature=1.0, top_k=0), "top_k must be an integer at least 1; None keeps all"),
        (dict(temperature=1.0, top_k=2.5), "top_k must be an integer"),
        (dict(temperature=1.0, top_p=0.0), r"top_p must be a number in \(0, 1\]"),
        (dict(temperature=1.0, top_p=1.1), r"top_p must be a number in \(0, 1\]"),
        (dict(temperature=1.0, min_p=-1), r"min_p must be a number in \[0, 1\]"),
        (dict(repetition_penalty=0), "repetition_penalty must be a number above 0"),
        (dict(stop_tokens=(-1,)), "stop_tokens must be an integer"),
        (dict(stop_tokens="</s>"), "stop_tokens must be an integer"),
        (dict(seed=-1), "seed must be an integer"),
        (dict(seed=2**32), r"seed must be below 2\*\*32"),
        (dict(top_p=0.9), "top_p=0.9 has no effect at temperature 0.*give a temperature"),
    ],
)
def test_bad_settings_have_one_clear_error(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**settings)


def test_seeds_must_fit_the_batch():
    with pytest.raises(ValueError, match="seed holds 2 numbers for 3 rows"):
        sampling.row_keys((1, 2), 3)
