"""Generation: equal to the full pass, to itself in other batches, and to transformers; bounded compilation; errors."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers.full_pass import full_pass

from stellarbyte_jax import ByteConfig, ByteTransformer, from_pretrained, generate
from stellarbyte_jax.inference import capacity, programs
from stellarbyte_jax.inference.api import stream_generate, warm_up
from stellarbyte_jax.inference.request import Request
from stellarbyte_jax.model.decoder import init_params

BASE = ByteConfig(
    vocab_size=61,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    max_position_embeddings=64,
    compute_dtype="float32",
    initializer_range=0.3,
)
PROMPTS = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]]


def make(**changes):
    model = ByteTransformer(dataclasses.replace(BASE, **changes))
    return model, jax.jit(lambda: init_params(model, jax.random.key(1)))()


@pytest.fixture(scope="module")
def base():
    return make()


def full_logits(model, params, tokens):
    """Logits [T, V] of one pass without a cache."""
    padded = np.zeros((1, BASE.max_position_embeddings), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.array(full_pass(model, params, padded)[0, : len(tokens)])


VARIANTS = {
    "gqa": {},
    "alternating": {"sliding_window": 5, "layer_types": ("sliding_attention", "full_attention")},
    "tied": {"tie_word_embeddings": True, "qk_norm": True, "attention_bias": True, "rope_pairing": "interleaved"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_decoding_equals_the_full_pass(variant):
    model, params = make(**VARIANTS[variant])
    result = generate(model, params, PROMPTS, max_new_tokens=20, stream=lambda new: None, log_probs=True)
    assert result.log_probs is not None
    assert len(set(result.tokens.ravel().tolist())) > 5, "a model that repeats itself would hide mistakes"
    for prompt, new, scores in zip(PROMPTS, result.sequences, result.log_probs, strict=True):
        logits = full_logits(model, params, prompt + new)[len(prompt) - 1 : -1]
        assert new == logits.argmax(axis=1).tolist()
        expected = np.asarray(jax.nn.log_softmax(logits))[np.arange(len(new)), new]
        np.testing.assert_allclose(scores, expected, atol=2e-5)

    request = Request.make(model.config, PROMPTS, max_new_tokens=20, short_blocks=True, log_probs=True)
    decoding = programs.start(model, params, request)
    for step in range(0, 20, capacity.SHORT_BLOCK):
        for b, (prompt, new) in enumerate(zip(PROMPTS, result.sequences, strict=True)):
            logits_V = full_logits(model, params, prompt + new[:step])[-1]
            np.testing.assert_allclose(decoding.logits_BV[b], logits_V, atol=2e-4)
        decoding, _ = programs.decode_block(
            model,
            params,
            decoding,
            request.keys_B,
            request.sampler,
            request.capacity.max_new_tokens_B,
            np.asarray(0, np.int32),
            steps=capacity.SHORT_BLOCK,
            log_probs=True,
        )


def test_a_row_does_not_depend_on_its_batch(base):
    together = generate(*base, PROMPTS, max_new_tokens=12).sequences
    assert together == [generate(*base, p, max_new_tokens=12).sequences[0] for p in PROMPTS]
    sampled = generate(*base, PROMPTS, max_new_tokens=12, temperature=1.5, seed=[3, 4, 5]).sequences
    assert sampled != together
    for prompt, seed, row in zip(PROMPTS, (3, 4, 5), sampled, strict=True):
        again = generate(*base, [prompt], max_new_tokens=12, temperature=1.5, seed=[seed]).sequences
        assert again == [row]


def test_seeds_repeat_and_differ(base):
    def draw(seed):
        return generate(*base, [[1, 2]] * 3, max_new_tokens=12, temperature=1.5, seed=seed).sequences

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(1)[0] != draw(1)[1], "two rows with one prompt must not draw the same"
    hot = generate(*base, [[1, 2]] * 3, max_new_tokens=12, temperature=1e6).sequences
    assert min(len(set(row)) for row in hot) > 6, "steps must not draw with the same random numbers"


def test_repetition_penalty_counts_prompt_and_output(base):
    for prompt, new in zip(
        PROMPTS, generate(*base, PROMPTS, max_new_tokens=20, repetition_penalty=1e6).sequences, strict=True
    ):
        row = list(prompt)
        for token, logits in zip(new, full_logits(*base, prompt + new)[len(prompt) - 1 :], strict=False):
            logits[row] = np.where(logits[row] < 0, logits[row] * 1e6, logits[row] / 1e6)
            assert token == logits.argmax()
            row.append(token)
        assert len(set(row)) == len(row)


def test_a_stop_token_ends_its_row_alone(base):
    free = generate(*base, PROMPTS, max_new_tokens=12).sequences
    stop = free[0][3]
    result = generate(*base, PROMPTS, max_new_tokens=12, stop_tokens=[stop, 60], pad_token=13, log_probs=True)
    for row, (new, length) in enumerate(zip(free, result.lengths, strict=True)):
        end = next((i + 1 for i, token in enumerate(new) if token in (stop, 60)), 12)
        assert length == end
        assert result.sequences[row] == new[:end]
        assert (result.tokens[row, end:] == 13).all()
        assert result.log_probs is not None
        assert (result.log_probs[row, end:] == 0).all() and (result.log_probs[row, :end] < 0).all()
    assert len(set(result.lengths.tolist())) > 1


def test_all_rows_stopped_ends_early(base, monkeypatch):
    first = generate(*base, [5, 9], max_new_tokens=62).sequences[0][0]
    blocks = []
    decode = programs.decode_block
    monkeypatch.setattr(programs, "decode_block", lambda *a, **k: blocks.append(k["steps"]) or decode(*a, **k))
    result = generate(*base, [5, 9], max_new_tokens=62, stop_tokens=first)
    assert result.tokens.shape == (1, 62)
    assert result.lengths.tolist() == [1]
    assert blocks == [capacity.LONG_BLOCK]


def test_max_length_counts_each_prompt(base):
    result = generate(*base, PROMPTS, max_length=14)
    assert result.lengths.tolist() == [11, 13, 3]
    more = generate(*base, PROMPTS, max_new_tokens=13).sequences
    assert result.sequences == [row[:n] for row, n in zip(more, (11, 13, 3), strict=True)]


@pytest.mark.parametrize("new", [1, 5, 37])
def test_any_number_of_tokens_and_streaming_give_the_same(base, new):
    settings = dict(temperature=1.5, seed=3)
    whole = generate(*base, PROMPTS, max_new_tokens=new, **settings)
    assert whole.tokens.shape == (3, new) and whole.tokens.dtype == np.int32
    parts: list[list[list[int]]] = []
    again = generate(*base, PROMPTS, max_new_tokens=new, stream=parts.append, **settings)
    iterated = list(stream_generate(*base, PROMPTS, max_new_tokens=new, **settings))
    assert parts == iterated and len(parts) == -(-new // capacity.SHORT_BLOCK)
    joined = [[token for part in parts for token in part[row]] for row in range(3)]
    assert joined == whole.sequences == again.sequences


def test_a_stream_that_returns_true_ends_generation(base):
    result = generate(*base, PROMPTS, max_new_tokens=20, stream=lambda new: True)
    assert result.lengths.tolist() == [capacity.SHORT_BLOCK] * 3
    assert result.tokens.shape == (3, 20)


def test_prompts_and_weights_may_be_arrays_of_numpy(base):
    model, params = base
    expected = generate(model, params, [[4, 5, 6]], max_new_tokens=6).sequences
    numpy_params = jax.tree.map(np.asarray, params)
    assert generate(model, numpy_params, np.asarray([4, 5, 6]), max_new_tokens=6).sequences == expected


def test_the_whole_cache_can_be_filled(base):
    model, params = base
    new = generate(model, params, [8, 3], max_length=64).sequences[0]
    assert len(new) == 62
    assert new == full_logits(model, params, [8, 3, *new])[1:-1].argmax(axis=1).tolist()


def test_compiled_programs_are_bounded_and_warming_up_makes_them():
    model, params = make(hidden_size=16, num_hidden_layers=1)
    programs.prefill.clear_cache()
    programs.decode_block.clear_cache()
    settings = dict(max_new_tokens=34, temperature=1.0, top_p=0.8)
    assert warm_up(model, params, [[1, 2, 3]], **settings) > 0
    assert programs.prefill._cache_size() == 1
    assert programs.decode_block._cache_size() == 2
    for length in (1, 2, 5, 6):
        for temperature in (0.5, 1.4):
            settings = dict(max_new_tokens=34, temperature=temperature, top_p=temperature / 2, seed=length)
            generate(model, params, [list(range(length))], stop_tokens=[length], **settings)
    assert programs.prefill._cache_size() == 1
    assert programs.decode_block._cache_size() == 2


def test_buckets_are_few_and_close():
    sizes = [capacity.bucket(n, 4096) for n in range(1, 4097)]
    assert all(n <= size for n, size in enumerate(sizes, start=1))
    assert all(size <= 1.25 * n for n, size in enumerate(sizes, start=1) if n > 32)
    assert len(set(sizes)) == 1 + 4 * 7
    assert capacity.bucket(100, 110) == 110 and capacity.bucket(3, 16) == 16


def test_prompts_in_parts_are_padded_to_whole_parts():
    for longest, chunk, width in ((33, None, 40), (3, 8, 8), (33, 36, 36), (33, 40, 40), (33, 64, 40), (33, 16, 48)):
        assert capacity.prompt_width(capacity.limits_of(BASE), longest, chunk) == width
    assert capacity.prompt_width(capacity.Limits(36, None, True), 33, None) == 36


@pytest.mark.parametrize(
    ("tokens", "settings", "message"),
    [
        ([[1, 61]], {}, "row 0: token id 61 is not in the model's vocabulary of 61"),
        ([[1], [1] * 64], {}, "row 1: the prompt of 64 tokens is longer than the cache: the model has 64 positions"),
        (
            [[1] * 60],
            {"max_new_tokens": 5},
            "row 0: 60 prompt tokens and 5 new .* 64 positions .* a max_new_tokens of at most 4,",
        ),
        ([[1] * 9], {"max_new_tokens": None, "max_length": 9}, "prompt of 9 tokens leaves no room below max_length=9"),
        ([[1]], {"max_new_tokens": None, "max_length": 65}, "the model has 64 positions"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens must be an integer of at least 1, got 0"),
        ([[1]], {"max_new_tokens": 2.0}, "max_new_tokens must be an integer"),
        ([[1]], {"max_new_tokens": None}, "give either max_new_tokens .* or max_length"),
        ([[1]], {"max_length": 9}, "give either max_new_tokens .* or max_length"),
        ([[1]], {"top_k": 3}, "top_k=3 has no effect at temperature 0"),
    ],
)
def test_bad_requests_have_one_clear_error(base, tokens, settings, message):
    with pytest.raises(ValueError, match=message):
        generate(*base, tokens, **{"max_new_tokens": 5, **settings})
    settings = {"max_new_tokens": 5, **settings}
    with pytest.raises(ValueError, match=message):
        stream_generate(*base, tokens, **settings)


def test_greedy_tokens_equal_transformers(tmp_path):
    torch = pytest.importorskip("torch", reason="transformers' Llama needs torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=BASE.vocab_size,
        hidden_size=BASE.hidden_size,
        num_hidden_layers=BASE.num_hidden_layers,
        num_attention_heads=BASE.num_attention_heads,
        num_key_value_heads=BASE.num_key_value_heads,
        intermediate_size=BASE.mlp_size,
        max_position_embeddings=BASE.max_position_embeddings,
        rms_norm_eps=BASE.rms_norm_eps,
        rope_theta=BASE.rope_theta,
        initializer_range=BASE.initializer_range,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    peer = LlamaForCausalLM(config)
    peer.save_pretrained(tmp_path)
    model, params = from_pretrained(tmp_path, compute_dtype="float32")
    plain = generate(model, params, PROMPTS, max_new_tokens=20).sequences
    penalised = generate(model, params, PROMPTS, max_new_tokens=20, repetition_penalty=1.4).sequences
    assert plain != penalised
    for prompt, ours, ours_penalised in zip(PROMPTS, plain, penalised, strict=True):
        mask = torch.ones(1, len(prompt), dtype=torch.long)
        settings = dict(attention_mask=mask, max_new_tokens=20, do_sample=False)
        ids = torch.tensor([prompt])
        assert ours == peer.generate(ids, **settings)[0, len(prompt) :].tolist()
        assert ours_penalised == peer.generate(ids, repetition_penalty=1.4, **settings)[0, len(prompt) :].tolist()
