"""The programs against the decoder in numpy: prompts in parts, ends of rows, scores; and how many they are."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.full_pass import full_pass
from helpers.numpy_decoder import decoder
from helpers.tiny_generation import make as make_of
from helpers.training import flat
from helpers.variants import BASE

from stellarbyte_jax import generate
from stellarbyte_jax.config import MemoryConfig
from stellarbyte_jax.inference import programs
from stellarbyte_jax.inference.request import Request
from stellarbyte_jax.model.decoder import ByteTransformer, param_shapes
from stellarbyte_jax.model.state.memory import Memory

make = functools.partial(make_of, max_position_embeddings=64)
PROMPTS = [[5, 9, 2, 7, 7], [3], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]]
PAD = 40


@pytest.fixture(scope="module")
def model():
    return make()[0]


@pytest.fixture(scope="module")
def params(model):
    """Weights of the float32 model, cast by :func:`cast_for_inference`, which leaves them as they are."""
    return programs.cast_for_inference(model, make()[1])


@pytest.fixture(scope="module")
def logits_after(model, params):
    """float64 logits [V] of the token after a text, by the decoder in numpy."""

    @functools.cache
    def after(*tokens):
        return decoder(model.config, params, tokens)[-1]

    return after


def request_for(model, **settings):
    return Request.make(model.config, PROMPTS, **{"short_blocks": True, "pad_token": PAD, **settings})


def decode(model, params, decoding, request, steps=4):
    """A block of steps; the program donates what it is given, which the tests read again."""
    decoding = jax.tree.map(jnp.copy, decoding)
    asked = request.keys_B, request.sampler, request.capacity.max_new_tokens_B, np.asarray(PAD, np.int32)
    return programs.decode_block(model, params, decoding, *asked, steps=steps, log_probs=request.log_probs)


def penalised(logits_V, tokens, penalty):
    seen_V = np.isin(np.arange(len(logits_V)), tokens)
    return np.where(seen_V, np.where(logits_V < 0, logits_V * penalty, logits_V / penalty), logits_V)


@pytest.mark.parametrize("chunk", [None, 3, 4])
def test_prompts_end_in_the_logits_of_the_token_after(chunk, model, params, logits_after):
    """Ragged prompts at once and in parts, of which short rows have none at the end."""
    request = request_for(model, max_new_tokens=8, prefill_chunk=chunk)
    decoding = programs.start(model, params, request)
    assert decoding.logits_BV.dtype == jnp.float32
    np.testing.assert_allclose(decoding.logits_BV, [logits_after(*p) for p in PROMPTS], atol=1e-4)
    assert decoding.state.cache.lengths_B.tolist() == [5, 1, 11]
    assert decoding.done_B.tolist() == [False] * 3 and decoding.step == 0 and decoding.seen_BV is None


def test_a_row_without_a_part_keeps_its_logits_and_its_cache(model, params, logits_after):
    begin, more = [[5, 9, 2, 0], [3, 0, 0, 0]], [[0, 0, 0], [8, 1, 6]]
    tokens, lengths = np.asarray(begin, np.int32), np.asarray([3, 1], np.int32)
    first_BV, state = programs.prefill(model, params, tokens, lengths, None, cache_length=16)
    kept_V = np.asarray(first_BV[0])
    tokens, lengths = np.asarray(more, np.int32), np.asarray([0, 3], np.int32)
    logits_BV, state = programs.prefill_more(model, params, tokens, lengths, first_BV, state)
    np.testing.assert_array_equal(logits_BV[0], kept_V)
    np.testing.assert_allclose(logits_BV, [logits_after(5, 9, 2), logits_after(3, 8, 1, 6)], atol=1e-4)
    assert state.cache.lengths_B.tolist() == [3, 4]


def test_tokens_of_prompts_are_marked_where_a_penalty_asks(model, params):
    request = request_for(model, max_new_tokens=8, repetition_penalty=1.3)
    seen_BV = np.asarray(programs.start(model, params, request).seen_BV)
    assert [np.flatnonzero(row).tolist() for row in seen_BV] == [sorted(set(p)) for p in PROMPTS]


def test_greedy_rows_with_a_penalty_scores_and_ends_of_their_own(model, params, logits_after):
    """Row 0 ends with a stop token, rows 1 and 2 by their length; the scores are of the model without penalty."""
    texts = [list(p) for p in PROMPTS]
    for _ in range(8):
        for text in texts:
            text.append(int(penalised(logits_after(*text), text, 1.5).argmax()))
    free = [text[len(p) :] for p, text in zip(PROMPTS, texts, strict=True)]
    stop = free[0][2]
    lengths = [3, *(min(n, row.index(stop) + 1 if stop in row else n) for row, n in ((free[1], 8), (free[2], 3)))]
    settings = {"repetition_penalty": 1.5, "stop_tokens": [stop], "log_probs": True}
    request = request_for(model, max_length=14, **settings)
    assert request.capacity.max_new_tokens_B.tolist() == [9, 13, 3]
    decoding = programs.start(model, params, request)
    blocks = []
    for steps in (4, 8):
        decoding, block = decode(model, params, decoding, request)
        blocks.append(block)
        assert decoding.step == steps
        assert decoding.done_B.tolist() == [True, lengths[1] < 8, True]
    tokens, active, scores = (
        np.concatenate([getattr(block, name) for block in blocks], axis=1)
        for name in ("tokens_BX", "active_BX", "log_probs_BX")
    )
    for row, (new, n) in enumerate(zip(free, lengths, strict=True)):
        assert tokens[row].tolist() == new[:n] + [PAD] * (8 - n)
        assert active[row].tolist() == [True] * n + [False] * (8 - n)
        expected = [jax.nn.log_softmax(logits_after(*PROMPTS[row], *new[:i]))[new[i]] for i in range(n)]
        np.testing.assert_allclose(scores[row], expected + [0.0] * (8 - n), atol=1e-4)
    seen = np.flatnonzero(decoding.seen_BV[1]).tolist()
    assert seen == sorted({*PROMPTS[1], *tokens[1].tolist()})


def test_samples_are_drawn_with_the_key_of_the_row_and_the_step(model, params, logits_after):
    request = request_for(model, max_new_tokens=8, temperature=1.5, seed=[3, 4, 5])
    decoding = programs.start(model, params, request)
    decoding, first = decode(model, params, decoding, request)
    _, second = decode(model, params, decoding, request)
    assert first.log_probs_BX is None
    tokens = np.concatenate([first.tokens_BX, second.tokens_BX], axis=1)
    for prompt, row_key, row in zip(PROMPTS, request.keys_B, tokens.tolist(), strict=True):
        for step in range(8):
            logits_V = np.float32(logits_after(*prompt, *row[:step])) / np.float32(1.5)
            assert row[step] == jax.random.categorical(jax.random.fold_in(row_key, step), logits_V)


def test_blocks_come_until_every_row_has_ended(model, params):
    def blocks_of(**settings):
        request = request_for(model, **{"max_new_tokens": 12, **settings})
        decoding = programs.start(model, params, request)
        found = list(programs.run(model, params, request, decoding, [4, 4, 4]))
        assert all(block.tokens_BX.shape == (3, 4) and block.log_probs_BX is None for block in found)
        return found

    free = blocks_of()
    assert len(free) == 3 and all(block.active_BX.all() for block in free)
    new = np.concatenate([block.tokens_BX for block in free], axis=1)
    firsts = new[:, 0].tolist()
    ended = blocks_of(stop_tokens=firsts)
    assert len(ended) == 1 and ended[0].active_BX.sum(axis=1).tolist() == [1, 1, 1]
    assert ended[0].tokens_BX.tolist() == [[token, PAD, PAD, PAD] for token in firsts]
    last = next(row for row in range(3) if not set(new[row]) & {firsts[row - 1], firsts[row - 2]})
    others = [token for row, token in enumerate(firsts) if row != last]
    assert len(blocks_of(stop_tokens=others)) == 3, "one row goes on"
    assert len(blocks_of(max_new_tokens=2)) == 3, "nothing is read between blocks without a stop token"


def test_a_segment_is_remembered_by_the_rows_that_have_one():
    """The first layer remembers what the table of embeddings gives for the newest tokens."""
    model, params = make(memory=MemoryConfig(length=4))
    table = np.asarray(params["embed"]["embedding"])
    tokens = np.asarray([[5, 6, 7, 8, 9, 1], [2, 3, 0, 0, 0, 0]], np.int32)
    lengths = np.asarray([6, 2], np.int32)
    memory = programs.read_segment(model, params, tokens, lengths, Memory.create(model.config, 2))
    assert memory.lengths_B.tolist() == [6, 2]
    place = memory.groups[0][0]
    np.testing.assert_array_equal(place.states[0, 0], table[[7, 8, 9, 1]])
    np.testing.assert_array_equal(place.states[0, 1, 2:], table[[2, 3]])
    assert place.valid_BM.tolist() == [[True] * 4, [False, False, True, True]]
    before = jax.tree.map(np.asarray, memory)
    more, lengths = np.asarray([[0] * 6, [4, 11, 12, 0, 0, 0]], np.int32), np.asarray([0, 3], np.int32)
    after = programs.read_segment(model, params, more, lengths, memory)
    assert after.lengths_B.tolist() == [6, 5]
    np.testing.assert_array_equal(after.groups[0][0].states[:, 0], before.groups[0][0].states[:, 0])
    np.testing.assert_array_equal(after.groups[0][0].states[0, 1], table[[3, 4, 11, 12]])
    assert after.groups[0][0].valid_BM.all()


def test_casting_weights_changes_no_logit():
    model, params = make(
        compute_dtype="bfloat16",
        attention_implementation="reference",
        attention_bias=True,
        qk_norm=True,
        layer_scale_init=0.3,
        position_embedding="xpos",
        xpos_learnable=True,
        xpos_scale_base=4.0,
    )
    cast = programs.cast_for_inference(model, params)
    assert cast["layers"]["0"]["attn"]["q"].dtype == jnp.bfloat16
    assert cast["final_norm"]["scale"].dtype == cast["layers"]["0"]["attn"]["q_norm"]["scale"].dtype == jnp.float32
    tokens = jax.device_put(np.asarray([[1, 2, 3, 4]], np.int32))
    np.testing.assert_array_equal(*(full_pass(model, p, tokens) for p in (params, cast)))


def test_routers_stay_float32_where_the_compute_dtype_is_bfloat16():
    """Their matrices, gates and what they keep; experts are cast."""
    moe = {"num_experts": 4, "gate": "context", "context_size": 4, "noise": "noisy_topk", "adaptive_temperature": True}
    shapes = jax.tree.map(jnp.zeros_like, param_shapes(ByteTransformer(dataclasses.replace(BASE, moe=moe))))
    cast = flat(
        programs.cast_for_inference(
            ByteTransformer(dataclasses.replace(BASE, moe=moe, compute_dtype="bfloat16")), shapes
        )
    )
    routers = {path: x.dtype for path, x in cast.items() if "/router/" in path}
    assert len(routers) == 16 and set(routers.values()) == {jnp.dtype("float32")}
    assert {cast[f"layers/0/moe/experts/{name}"].dtype for name in ("gate_up", "down")} == {jnp.dtype("bfloat16")}


PROGRAMS = (programs.prefill, programs.prefill_more, programs.decode_block)


def programs_of(model, params, *, lengths, new, **settings):
    """How many programs of each kind these prompts of two rows compile."""
    for program in PROGRAMS:
        program.clear_cache()
    for length in lengths:
        for steps in new:
            prompts = [[1] * length, [2] * max(1, length - 5)]
            generate(model, params, prompts, max_new_tokens=steps, **settings)
    return tuple(program._cache_size() for program in PROGRAMS)


def test_programs_of_all_lengths_are_bounded():
    """One prefill for each pair of buckets, which are 32, 40, 48, 56 and 64 here, two decodings for each cache."""
    model, params = make(hidden_size=8, num_hidden_layers=1)
    short = dict(stream=lambda new: None)  # one kind of blocks

    def up(length):
        return next(size for size in (32, 40, 48, 56, 64) if size >= length)

    assert programs_of(model, params, lengths=(1, 7, 20, 30), new=(1, 2), **short) == (1, 0, 1)
    lengths, new = (31, 33, 38, 40), (1, 10)
    pairs = {(up(length), up(length + steps)) for length in lengths for steps in new}
    assert len(pairs) == 5, "8 calls"
    assert programs_of(model, params, lengths=lengths, new=new, **short) == (5, 0, 4)
    assert programs_of(model, params, lengths=(3, 9, 17), new=(4, 5, 13, 14), **short) == (1, 0, 1)
    assert programs_of(model, params, lengths=(3, 10), new=(4, 33, 36, 38)) == (3, 0, 5)


def test_programs_of_prompts_in_parts_do_not_depend_on_their_length():
    model, params = make(hidden_size=8, num_hidden_layers=1)
    settings = dict(stream=lambda new: None, prefill_chunk=8)
    assert programs_of(model, params, lengths=(3, 9, 17, 22, 28), new=(1, 4), **settings) == (1, 1, 1)
    assert programs_of(model, params, lengths=(5, 12, 33, 39), new=(1,), **settings) == (2, 2, 2)


def test_programs_of_a_window_do_not_depend_on_the_text():
    """The cache is as long as the window; prompts of any length have their buckets, or parts."""
    model, params = make(hidden_size=8, num_hidden_layers=1, sliding_window=6, sink_tokens=2)
    settings = dict(stream=lambda new: None)
    assert programs_of(model, params, lengths=(1, 3, 11, 31), new=(1, 9, 99), **settings) == (1, 0, 1)
    assert programs_of(model, params, lengths=(9, 33, 39, 80, 90), new=(1, 9), **settings) == (4, 0, 1)
    in_parts = programs_of(model, params, lengths=(9, 33, 39, 80, 130), new=(1, 9), prefill_chunk=8, **settings)
    assert in_parts == (1, 1, 1)
