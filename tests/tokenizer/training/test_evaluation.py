"""Figures of the report: bytes per token, round trips, tokens without use."""

import pytest
from helpers.tokenizer_samples import CHINESE, ENGLISH, FIXED, samples_of

from stellarbyte_jax.tokenizer.training import evaluation
from stellarbyte_jax.tokenizer.training.bpe import TooLittleTextError, learn_merges
from stellarbyte_jax.tokenizer.training.evaluation import BASELINES, cutter, evaluate, gpt2_like, measure, unused
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


def test_baselines_that_the_text_is_too_small_for_are_told_and_the_others_measured(monkeypatch):
    """Whichever of both sizes is the larger one."""
    size = FIXED + 10
    samples = samples_of(both=ENGLISH + CHINESE)
    stages = [Stage(size, {"both": 1})]
    merges = train(samples, stages)
    baselines = {"gpt2_like": (gpt2_like, 50_257), "small": (gpt2_like, 260)}
    monkeypatch.setattr(evaluation, "BASELINES", baselines)
    report = evaluate(merges, samples, stages, lambda cut: samples)
    assert set(report["baselines"]) == {f"gpt2_like_{size}", "small_260", f"small_{size}"}
    assert report["baselines"][f"small_{size}"] == report["baselines"][f"gpt2_like_{size}"]
    assert report["baselines"]["small_260"] != report["baselines"][f"small_{size}"]
    with pytest.raises(TooLittleTextError) as caught:
        learn_merges(samples["both"].pieces, 50_001)
    reason = f"the corpus has pairs for {len(caught.value.merges)} merges, 50001 are needed: give more text"
    assert report["skipped_baselines"] == {"gpt2_like_50257": reason}


def test_unused_tokens():
    merges = [("t", "h"), ("th", "e"), ("c", "a")]
    assert unused(merges, ["the", "cat"]) == 1  # "th" was only a step to "the"
