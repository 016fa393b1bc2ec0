"""A call of generation is checked once: prompts of every form, ids of the vocabulary, a memory that fits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stellarbyte_jax.config import ByteConfig, MemoryConfig
from stellarbyte_jax.inference.request import Request, check_memory, checked_prompts
from stellarbyte_jax.model.state.memory import Memory

BASE = ByteConfig(
    vocab_size=61,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=64,
)
REMEMBERS = dataclasses.replace(BASE, memory=MemoryConfig(length=2))


def of_rows(rows):
    return Memory.create(REMEMBERS, rows)


@pytest.mark.parametrize(
    ("tokens", "rows"),
    [
        ([4, 5, 6], [[4, 5, 6]]),
        ((4, 5, 6), [[4, 5, 6]]),
        ([np.int64(4), np.int32(5)], [[4, 5]]),
        (np.asarray([4, 5, 6], np.uint16), [[4, 5, 6]]),
        (np.asarray([[4, 5], [6, 7]], np.int64), [[4, 5], [6, 7]]),
        ([[4, 5], [6]], [[4, 5], [6]]),
        (([4], (5, 6, 7)), [[4], [5, 6, 7]]),
        ([np.asarray([4, 5], np.uint8), np.asarray([6])], [[4, 5], [6]]),
        ([[0, 60]], [[0, 60]]),
    ],
)
def test_prompts_of_every_form_become_vectors(tokens, rows):
    found = checked_prompts(tokens, 61)
    assert [prompt.tolist() for prompt in found] == rows
    assert all(prompt.dtype == np.int32 for prompt in found)
    as_arrays = jax.device_put(tokens) if isinstance(tokens, np.ndarray) else [jax.device_put(row) for row in rows]
    found = checked_prompts(as_arrays, 61)
    assert [prompt.tolist() for prompt in found] == rows
    assert all(type(prompt) is np.ndarray and prompt.dtype == np.int32 for prompt in found)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "tokens holds no prompt: give at least one"),
        (np.zeros((0, 3), np.int32), "tokens holds no prompt"),
        ([[1], []], "row 1: the prompt is empty; start it with the tokenizer's bos token"),
        (np.zeros((2, 0), np.int32), "row 0: the prompt is empty"),
        (
            [[1, 61]],
            r"row 0: token id 61 is not in the model's vocabulary of 61 tokens; is this the model's tokenizer\?",
        ),
        ([[1], [60, -2, 70]], "row 1: token id -2 is not"),
        ([[1, 2**40]], "token id 1099511627776 is not"),
        ([[1.5, 2.0]], r"row 0: a prompt must be a list of token ids, got \[1\.5, 2\.0\]"),
        ([[1], [True]], "row 1: a prompt must be a list of token ids"),
        ([[[1, 2]]], r"row 0: a prompt must be a list of token ids, got \[\[1, 2\]\]"),
        ("text", "tokens must be a list of token ids, or one such list for each row; got 'text'"),
        (["one", "two"], "row 0: a prompt must be a list of token ids"),
        (np.zeros((1, 2, 3), np.int32), r"tokens must be an array \[B, T\] or \[T\], got shape \(1, 2, 3\)"),
        (np.asarray(3), r"tokens must be an array \[B, T\] or \[T\], got shape \(\)"),
    ],
)
def test_what_is_no_prompt_is_named_with_its_row(tokens, message):
    with pytest.raises(ValueError, match=message):
        checked_prompts(tokens, 61)
    with pytest.raises(ValueError, match=message):
        Request.make(BASE, tokens, max_new_tokens=5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stop_tokens": [61]}, "stop_tokens 61 is not in the vocabulary of 61 tokens"),
        ({"stop_tokens": [3, 60, 99]}, "stop_tokens 99 is not"),
        ({"pad_token": 99}, "pad_token 99 is not in the vocabulary of 61 tokens"),
        ({"pad_token": -1}, "pad_token -1 is not"),
        ({"top_k": 3}, "top_k=3 has no effect at temperature 0"),
        ({"seed": [1, 2, 3]}, "seed holds 3 numbers for 2 rows"),
        ({"max_length": 9}, "give either max_new_tokens .* or max_length"),
        (
            {"max_new_tokens": 63},
            "row 1: 2 prompt tokens and 63 new ones are longer than the cache: the model has 64 positions in all; "
            "give a max_new_tokens of at most 62, or shorten",
        ),
        (
            {"max_new_tokens": None, "max_length": 65},
            "row 0: 1 prompt tokens and 64 new ones .* give a max_length of at most 64, or shorten",
        ),
        ({"prefill_chunk": 0}, "prefill_chunk must be an integer of at least 1, got 0"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        Request.make(BASE, [[1], [2, 3]], **{"max_new_tokens": 5, **settings})
    with pytest.raises(TypeError, match="temprature"):
        Request.make(BASE, [1], max_new_tokens=5, temprature=1.0)


def test_a_request_holds_what_was_asked_for():
    memory = of_rows(2)
    request = Request.make(
        REMEMBERS,
        [[4, 5, 6], [60]],
        max_length=50,
        pad_token=60,
        log_probs=True,
        memory=memory,
        prefill_chunk=2,
        short_blocks=True,
        temperature=0.5,
        top_k=7,
        stop_tokens=[0, 60],
        seed=3,
    )
    assert [prompt.tolist() for prompt in request.prompts] == [[4, 5, 6], [60]]
    assert request.prompt_lengths.tolist() == [3, 1] and request.prompt_lengths.dtype == np.int32
    assert (request.pad_token, request.log_probs, request.memory) == (60, True, memory)
    sizes = request.capacity
    assert sizes.max_new_tokens_B.tolist() == [47, 49]
    assert (sizes.prompt_width, sizes.prefill_chunk, sizes.block_sizes) == (4, 2, (4,) * 13)
    assert (request.sampler.temperature, request.sampler.top_k) == (0.5, 7)
    assert request.sampler.use_temperature and request.sampler.use_top_k and not request.sampler.use_top_p
    assert sorted(request.sampler.stop_tokens_X[request.sampler.stop_tokens_X >= 0]) == [0, 60]
    keys = jnp.stack([jax.random.fold_in(jax.random.key(3), row) for row in range(2)])
    assert (request.keys_B == keys).all()


def test_what_is_not_asked_for_is_left_out():
    request = Request.make(BASE, [1, 2], max_new_tokens=40)
    assert (request.pad_token, request.log_probs, request.memory) == (0, False, None)
    assert not (request.sampler.can_stop or request.sampler.use_temperature or request.sampler.use_repetition_penalty)
    assert request.capacity.block_sizes == (32, 4, 4)
    assert request.capacity.max_new_tokens_B.tolist() == [40]


def test_a_memory_must_have_the_rows_of_the_batch():
    with pytest.raises(ValueError, match=r"memory has 3 rows, the batch 1: .*memory\.select\(rows\).*batch_policy"):
        check_memory(REMEMBERS, of_rows(3), 1)
    with pytest.raises(ValueError, match="memory has 2 rows, the batch 1"):
        Request.make(REMEMBERS, [5, 6, 7], max_new_tokens=5, memory=of_rows(2))
    with pytest.raises(ValueError, match=r"this model has no memory: set memory\.length before training it"):
        Request.make(BASE, [[5], [6]], max_new_tokens=5, memory=of_rows(2))
    check_memory(REMEMBERS, of_rows(3), 3)
    check_memory(BASE, None, 3)


def test_other_numbers_of_rows_follow_the_policy():
    select, repeat = (
        dataclasses.replace(REMEMBERS, memory=MemoryConfig(length=2, batch_policy=p)) for p in ("select", "repeat")
    )
    for rows in (1, 3, 5):
        check_memory(select, of_rows(2), rows)
    check_memory(repeat, of_rows(2), 6)
    with pytest.raises(ValueError, match="memory of 2 rows cannot be repeated for 5: that is no multiple"):
        check_memory(repeat, of_rows(2), 5)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (5, "tokens must be a list of token ids, or one such list for each row; got 5"),
        ("abc", "tokens must be a list of token ids"),
        ([1, [2, 3]], "row 0: a prompt must be a list of token ids"),
        ([[1], [[2], [3, 4]]], "row 1: a prompt must be a list of token ids"),
        ([[[]]], "row 0: a prompt must be a list of token ids"),
    ],
    ids=str,
)
def test_what_is_no_prompt_is_named(tokens, message):
    with pytest.raises(ValueError, match=message):
        checked_prompts(tokens, 61)


@pytest.mark.parametrize("pad", [1.5, True, "x", None])
def test_a_pad_token_is_an_id(pad):
    with pytest.raises(ValueError, match="pad_token must be a token id, got"):
        Request.make(BASE, [1], max_new_tokens=1, pad_token=pad)
