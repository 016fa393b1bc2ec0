"""Generation past the trained length: windows, sinks, XPos, rotary scaling, memory."""

import jax
import numpy as np
import pytest
from helpers.full_pass import full_pass
from helpers.grids import REPEATS, mostly_slow
from helpers.tiny_generation import LONG, PROMPTS, TRAINED, continue_to, make, some_rows

from stellarbyte_jax.config import CacheConfig, MemoryConfig, RopeScaling
from stellarbyte_jax.inference import capacity
from stellarbyte_jax.inference.api import remember
from stellarbyte_jax.model.state.memory import Memory

STRETCHED = {"factor": 4.0, "original_max_position_embeddings": TRAINED}
LINEAR, YARN, LLAMA3, DYNAMIC = (
    RopeScaling(name="linear", factor=4.0),
    RopeScaling(name="yarn", **STRETCHED),
    RopeScaling(name="llama3", **STRETCHED),
    RopeScaling(name="dynamic", factor=4.0),
)
# What a text of LONG tokens needs in a model of TRAINED positions.
VARIANTS = {
    "window, more sinks than a chunk": {"sliding_window": 3, "sink_tokens": 6},
    "window, yarn": {"sliding_window": 11, "rope_scaling": YARN, "max_position_embeddings": LONG},
    "some layers with window and sinks, xpos": {
        "sliding_window": 5,
        "sink_tokens": 2,
        "layer_types": ("sliding_attention", "full_attention"),
        "position_embedding": "xpos",
        "xpos_scale_base": 8.0,
    },
    "linear": {"rope_scaling": LINEAR},
    "the original's own, window": {
        "position_embedding": "stellarbyte",
        "mlp_style": "stellarbyte",
        "sliding_window": 7,
        "max_position_embeddings": LONG,
    },
    "memory": {"memory": MemoryConfig(length=4)},
    "memory of some layers, xpos": {"memory": MemoryConfig(length=(4, 0)), "position_embedding": "xpos"},
    "heavy hitters, room for all, llama3": {
        "cache": CacheConfig(heavy_hitters=40, recent=24),
        "rope_scaling": LLAMA3,
        "max_position_embeddings": LONG,
    },
    "heavy hitters, window, sinks": {
        "cache": CacheConfig(heavy_hitters=40, recent=24),
        "sliding_window": 3,
        "sink_tokens": 6,
    },
}


def pass_over(model, params, tokens_BT, lengths_B):
    """Logits of one pass without a cache over texts of these lengths."""
    segment_ids = (np.arange(tokens_BT.shape[1])[None, :] < lengths_B[:, None]).astype(np.int32)
    return full_pass(model, params, tokens_BT, segment_ids)


def padded(rows, length=LONG):
    tokens = np.zeros((len(rows), length), np.int32)
    for into, row in zip(tokens, rows, strict=True):
        into[: len(row)] = row
    return tokens, np.asarray([len(row) for row in rows], np.int32)


def assert_greedy(result, logits):
    """Tokens and log-probabilities are those of the logits [B, new, V] that a full pass gives for each new token."""
    assert len(set(result.tokens.ravel().tolist())) > 8, "a model that repeats itself would hide mistakes"
    for new, scores, logits_XV in zip(result.sequences, result.log_probs, logits, strict=True):
        assert new == logits_XV.argmax(axis=1).tolist()
        expected = np.asarray(jax.nn.log_softmax(logits_XV))[np.arange(len(new)), new]
        np.testing.assert_allclose(scores[: len(new)], expected, atol=5e-5)


@pytest.mark.parametrize(
    "variant",
    mostly_slow(
        VARIANTS,
        "window, more sinks than a chunk",
        "some layers with window and sinks, xpos",
        "the original's own, window",
        "memory of some layers, xpos",
        "heavy hitters, window, sinks",
    ),
)
def test_long_texts_equal_the_pass_over(variant):
    """Several times round the rings, for rows of different lengths; prompts are read at once, then in parts."""
    model, params = make(**VARIANTS[variant])
    result = continue_to(LONG, model, params, PROMPTS)
    rows = [prompt + new for prompt, new in zip(PROMPTS, result.sequences, strict=True)]
    logits = np.asarray(pass_over(model, params, *padded(rows)))
    assert_greedy(result, [row[len(p) - 1 : -1] for p, row in zip(PROMPTS, logits, strict=True)])
    in_parts = continue_to(LONG, model, params, PROMPTS, prefill_chunk=4)
    assert in_parts.sequences == result.sequences
    np.testing.assert_allclose(in_parts.log_probs, result.log_probs, atol=5e-5)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="full"),
        pytest.param({"sliding_window": 7, "sink_tokens": 2}, id="ring", marks=REPEATS),
        pytest.param({"cache": CacheConfig(heavy_hitters=40, recent=24)}, id="pruned"),
    ],
)
def test_dynamic_scaling_equals_a_full_pass_over_each_text(changes):
    """Every longer text turns all tokens anew. One layer: deeper ones read what a shorter text made of its tokens."""
    model, params = make(rope_scaling=DYNAMIC, num_hidden_layers=1, **changes)
    assert capacity.limits_of(model.config).positions == (None if changes else LONG)
    prompts = [PROMPTS[0], PROMPTS[1]]
    result = continue_to(40, model, params, prompts)
    pairs = zip(prompts, result.sequences, strict=True)
    beginnings = [prompt + new[:n] for prompt, new in pairs for n in range(len(new))]
    tokens, lengths = padded(beginnings)
    logits = np.asarray(pass_over(model, params, tokens, lengths))[np.arange(len(lengths)), lengths - 1]
    assert_greedy(result, np.split(logits, [len(result.sequences[0])]))
    whole = [p + new for p, new in zip(prompts, result.sequences, strict=True)]
    at = TRAINED + 4
    later = np.asarray(pass_over(model, params, *padded(whole)))[0, at - 1]
    assert np.abs(later - logits[at - len(prompts[0])]).max() > 1e-2, "the length of the text must make a difference"
    with pytest.raises(ValueError, match=r"prompt of 19 tokens is longer than the 16 .* leave prefill_chunk out"):
        continue_to(40, model, params, PROMPTS, prefill_chunk=4)
    in_parts = continue_to(40, model, params, prompts, prefill_chunk=4)
    assert in_parts.sequences == result.sequences


@pytest.mark.parametrize("chunk", [None, 3])
def test_a_memory_stands_for_the_text_before(chunk):
    """Every token sees as many before it as if all had been one text; rows have other lengths."""
    model, params = make(memory=MemoryConfig(length=4))
    before = [list(range(1, 24)), [7, 3, 9]]
    after = [[4, 4, 8, 1, 2], [6]]
    memory = remember(model, params, before, segment_length=8)
    assert memory.lengths_B.tolist() == [23, 3]
    result = continue_to(30, model, params, after, memory=memory, prefill_chunk=chunk)
    whole = [b + a + new for b, a, new in zip(before, after, result.sequences, strict=True)]
    logits = np.asarray(pass_over(model, params, *padded(whole)))
    begin = [len(b) + len(a) for b, a in zip(before, after, strict=True)]
    assert_greedy(result, [row[n - 1 : len(w) - 1] for row, n, w in zip(logits, begin, whole, strict=True)])
    assert result.sequences != continue_to(30, model, params, after).sequences
    memory_of_first = memory.select([0])
    memory = remember(model, params, before[0][:16], segment_length=8)
    again = remember(model, params, before[0][16:], segment_length=8, memory=memory)
    for found, expected in zip(jax.tree.leaves(again), jax.tree.leaves(memory_of_first), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_compressed_memory_reaches_further_than_the_window_in_generation():
    model, params = make(memory=MemoryConfig(length=8, recent_share=0.5))
    early = [[5, 6, 7, 8], [25, 36, 27, 38]]
    memory = remember(model, params, [e + list(range(1, 21)) for e in early], segment_length=8)
    result = continue_to(40, model, params, [[9, 2]] * 2, memory=memory)
    assert np.abs(result.log_probs[0, 0] - result.log_probs[1, 0]) > 1e-6
    alone = continue_to(40, model, params, [9, 2], memory=memory.select([1]))
    assert alone.sequences[0] == result.sequences[1]
    in_parts = continue_to(40, model, params, [[9, 2]] * 2, memory=memory, prefill_chunk=1)
    np.testing.assert_allclose(in_parts.log_probs[:, 0], result.log_probs[:, 0], atol=5e-5)


@pytest.mark.parametrize("chunk", [None, 3])
def test_a_model_with_compressed_memory_generates_without_one_as_in_a_full_pass(chunk):
    """Its first tokens are no memory: the window hides them."""
    model, params = make(memory=MemoryConfig(length=8, recent_share=0.5))
    result = continue_to(30, model, params, PROMPTS[:2], prefill_chunk=chunk)
    rows = [prompt + new for prompt, new in zip(PROMPTS, result.sequences, strict=False)]
    logits = np.asarray(pass_over(model, params, *padded(rows)))
    pairs = zip(PROMPTS, rows, logits, strict=False)
    assert_greedy(result, [row_XV[len(prompt) - 1 : len(row) - 1] for prompt, row, row_XV in pairs])


@pytest.mark.parametrize(("policy", "rows"), [("select", [0, 1, 0, 1]), ("repeat", [0, 0, 1, 1])])
def test_a_memory_for_more_rows(policy, rows):
    model, params = make(memory=MemoryConfig(length=4, batch_policy=policy))
    memory = remember(model, params, [[5, 6, 7], [8, 9]], segment_length=4)
    result = continue_to(20, model, params, [[4]] * 4, memory=memory)
    expected = continue_to(20, model, params, [[4]] * 4, memory=memory.select(rows))
    assert result.sequences == expected.sequences
    assert result.sequences[0] != result.sequences[rows.index(1)]


def test_long_xpos_prompts_are_read_in_parts():
    model, params = make(position_embedding="xpos", xpos_scale_base=1.0)
    at_once = capacity.limits_of(model.config).at_once
    prompt = some_rows(1, at_once + 9)[0].tolist()
    with pytest.raises(
        ValueError, match=f"at most {at_once} tokens of a prompt at once, got {at_once + 9}: give a pre"
    ):
        continue_to(at_once + 20, model, params, prompt)
    in_parts = continue_to(at_once + 20, model, params, prompt, prefill_chunk=at_once)
    again = continue_to(at_once + 20, model, params, prompt, prefill_chunk=16)
    assert in_parts.sequences == again.sequences
    np.testing.assert_allclose(in_parts.log_probs, again.log_probs, atol=5e-5)
    assert len(continue_to(at_once + 4, model, params, prompt[:at_once]).sequences[0]) == 4


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({}, {}, "longer than the cache.*rope_scaling.*sliding_window and sink_tokens.*position_embedding xpos"),
        ({"rope_scaling": RopeScaling(name="linear", factor=1.5)}, {}, "the model has 24 positions in all"),
        ({"position_embedding": "stellarbyte", "sliding_window": 4}, {}, "at most 16, or shorten the prompt$"),
        ({"sliding_window": 25}, {}, "longer than the cache"),  # wider than the 24 positions of training
        (
            {"position_embedding": "xpos", "xpos_scale_base": 0.5, "memory": MemoryConfig(length=80)},
            {},
            "a memory of 80 slots is longer than the row .* larger xpos_scale_base",
        ),
        ({"sliding_window": 4}, {"prefill_chunk": 0}, "prefill_chunk must be an integer of at least 1, got 0"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(changes, settings, message):
    model, params = make(**changes)
    with pytest.raises(ValueError, match=message) as caught:
        continue_to(30, model, params, [5, 6, 7], **settings)
    assert "\n" not in str(caught.value)


def test_remembering_checks_its_arguments():
    model, params = make(memory=MemoryConfig(length=2))
    with pytest.raises(ValueError, match="segment_length must be an integer of at least 1, got 0"):
        remember(model, params, [1, 2], segment_length=0)
    with pytest.raises(ValueError, match="memory has 2 rows, the batch 1"):
        remember(model, params, [1, 2], segment_length=4, memory=Memory.create(model.config, 2))
    plain, weights = make()
    with pytest.raises(ValueError, match=r"this model has no memory: set memory.length"):
        remember(plain, weights, [1, 2], segment_length=4)


@pytest.mark.parametrize(("window", "positions"), [(TRAINED, None), (TRAINED + 1, TRAINED)])
def test_a_window_frees_texts_from_the_trained_length_that_it_lies_within(window, positions):
    assert capacity.limits_of(make(sliding_window=window)[0].config).positions == positions
