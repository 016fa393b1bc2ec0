"""Figures of the report: bytes per token, round trips, tokens without use."""

import pytest
from helpers.tokenizer_samples import CHINESE, ENGLISH, FIXED, samples_of

from stellarbyte_jax.tokenizer.training.evaluation import BASELINES, cutter, evaluate, measure, unused
from stellarbyte_jax.tokenizer.training.format import build
from stellarbyte_jax.tokenizer.training.stages import Stage, train


def test_report_tells_lossy_from_lossless():
    samples = samples_of(english=ENGLISH.title(), chinese=CHINESE)
    stages = [Stage(FIXED + 40, {"english": 1, "chinese": 1})]
    merges = train(samples, stages)
    report = evaluate(merges, samples, stages)
    assert report["tokenizer"]["english"]["round_trip"] == 1
    size, tokens = len(CHINESE.encode()), len(build(merges).encode(CHINESE, add_special_tokens=False).ids)
    assert report["tokenizer"]["chinese"]["bytes_per_token"] == pytest.approx(size / tokens, abs=1e-3)
    lossy, gpt2 = (BASELINES[name][0](()) for name in ("lossy", "gpt2_like"))
    assert measure(lossy, [ENGLISH.title()])["round_trip"] == 0
    assert measure(gpt2, [ENGLISH.title()])["round_trip"] == 1
    assert "THE" not in "".join(cutter(lossy)("THE"))


def test_unused_tokens():
    merges = [("t", "h"), ("th", "e"), ("c", "a")]
    assert unused(merges, ["the", "cat"]) == 1  # "th" was only a step to "the"
