"""Stages: each keeps the merges of the one before, shares are of bytes, and impossible ones are refused."""

from collections import Counter

import pytest
from helpers.tokenizer_samples import CHINESE, ENGLISH, FIXED, samples_of

from stellarbyte_jax.tokenizer.training.stages import Sample, Stage, mix, train


def test_earlier_stages_are_a_prefix_and_have_an_effect():
    samples = samples_of(english=ENGLISH, chinese=CHINESE)
    first, second = Stage(FIXED + 12, {"english": 1}), Stage(FIXED + 40, {"english": 1, "chinese": 3})
    short, long = train(samples, [first]), train(samples, [first, second])
    alone = train(samples, [second])
    assert (len(short), len(long)) == (12, 40)
    assert long[:12] == short != alone[:12]
    assert any("å" in left + right for left, right in long[12:])
    assert train(samples, [first, second]) == long


def test_shares_do_not_depend_on_corpus_size():
    pieces = {"a": Sample(Counter({"x": 10, "y": 10}), 20, []), "b": Sample(Counter({"z": 1000}), 1000, [])}
    mixed = mix(pieces, {"a": 3, "b": 1})
    assert mixed["x"] + mixed["y"] == 3 * mixed["z"]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "at least one stage"),
        ([Stage(100, {"english": 1})], "leaves no room for merges"),
        ([Stage(400, {"english": 1}), Stage(300, {"english": 1})], "leaves no room"),
        ([Stage(400, {"latin": 1})], r"names corpora \['latin'\], known are \['chinese', 'english'\]"),
        ([Stage(400, {"english": 0})], "every share must be positive"),
        ([Stage(9999, {"english": 1})], "no pair left after"),
    ],
)
def test_impossible_stages(stages, message):
    with pytest.raises(ValueError, match=message):
        train(samples_of(english=ENGLISH, chinese=CHINESE), stages)
