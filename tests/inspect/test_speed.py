"""Measured speed: what is run, what is counted."""

import numpy as np
import pytest
from helpers.tiny_generation import make

from stellarbyte_jax.config import ConfigError
from stellarbyte_jax.inference.api import Generated
from stellarbyte_jax.inspect import speed
from stellarbyte_jax.inspect.speed import measure_speed


def test_tokens_over_the_median_of_the_times(monkeypatch):
    calls = []
    seconds = iter([(0.5, 9.0), (0.25, 1.0), (4.0, 2.0), (0.1, 0.1), (0.1, 0.1), (0.1, 0.1)])

    def generate(model, params, prompts, *, max_new_tokens):
        calls.append((prompts.shape, max_new_tokens))
        return Generated(np.zeros((1, 1)), np.zeros(1), None, *next(seconds))

    monkeypatch.setattr(speed, "generate", generate)
    monkeypatch.setattr(speed, "warm_up", lambda *_, max_new_tokens: calls.append("compiled"))
    found = list(measure_speed(*make(), [2, 1], prompt_length=5, new_tokens=3))
    assert [(s.batch_size, s.prefill, s.decode) for s in found] == [(2, 10 / 0.5, 6 / 2.0), (1, 50.0, 30.0)]
    assert calls == ["compiled", *[((2, 5), 3)] * 3, "compiled", *[((1, 5), 3)] * 3]


def test_a_real_model_is_measured():
    found = list(measure_speed(*make(), [1, 2], prompt_length=4, new_tokens=4, repeats=1))
    assert [s.batch_size for s in found] == [1, 2] and all(s.prefill > 0 and s.decode > 0 for s in found)


@pytest.mark.parametrize("wrong", [{"batch_sizes": [1, 0]}, {"batch_sizes": []}, {"repeats": 0}])
def test_numbers_that_cannot_be(wrong):
    settings = {"batch_sizes": [1], "repeats": 1} | wrong
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))} must be at least 1"):
        list(measure_speed(*make(), settings.pop("batch_sizes"), **settings))
