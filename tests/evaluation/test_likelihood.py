"""Log-likelihoods against transformers' Llama with the same weights, whatever is shared, padded or cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.hf_models import small_config
from helpers.llama_pair import llama_pair

from stellarbyte_jax.config import CacheConfig
from stellarbyte_jax.evaluation import likelihood
from stellarbyte_jax.evaluation.batches import Shared, Whole, batches, rounded
from stellarbyte_jax.evaluation.likelihood import log_likelihoods
from stellarbyte_jax.evaluation.texts import Pair
from stellarbyte_jax.inference.reconfigure import reconfigure
from stellarbyte_jax.model.decoder import ByteTransformer

LENGTH = 32  # positions of the model


def ids(numbers, count):
    return tuple(numbers.integers(0, 67, count).tolist())


def requests():
    """Contexts with one continuation and with several, of one token and of more, short and long ones."""
    numbers = np.random.default_rng(0)
    made = []
    for number in range(16):
        context = ids(numbers, int(numbers.integers(1, 20)))
        longest = 2 if number % 3 == 0 else 12
        made += [Pair(context, ids(numbers, int(numbers.integers(1, longest)))) for _ in range(1 + number % 4)]
    return made


@pytest.fixture(scope="module")
def peer():
    return llama_pair()


def expected(peer, pair, length=LENGTH):
    """As lm-eval's backend for transformers: one row, without a cache or padding."""
    import torch

    whole = [*pair.context, *pair.continuation][-(length + 1) :]
    with torch.no_grad():
        logits_TV = peer[2](torch.tensor([whole[:-1]])).logits[0].double().numpy()
    logits_MV = logits_TV[-len(pair.continuation) :]
    log_probs_MV = logits_MV - np.log(np.exp(logits_MV).sum(-1, keepdims=True))
    greedy = logits_MV.argmax(-1).tolist() == list(pair.continuation)
    return log_probs_MV[np.arange(len(pair.continuation)), list(pair.continuation)].sum(), greedy


def assert_as_expected(peer, pairs, found, length=LENGTH):
    for pair, (log_prob, greedy) in zip(pairs, found, strict=True):
        wanted, wanted_greedy = expected(peer, pair, length)
        assert log_prob == pytest.approx(wanted, abs=2e-5)
        assert greedy == wanted_greedy


@pytest.mark.parametrize("batch_size", [1, 8])
def test_every_continuation_as_in_the_peer(peer, batch_size):
    model, params, _ = peer
    pairs = requests()
    kinds = [type(batch) for batch in batches(pairs, batch_size, LENGTH)]
    assert set(kinds) == ({Whole} if batch_size == 1 else {Whole, Shared})
    assert_as_expected(peer, pairs, log_likelihoods(model, params, pairs, batch_size=batch_size, max_length=LENGTH))


def test_greedy_continuations_are_told(peer):
    """Those that the peer makes, alone, shared, and with a wrong last or first token."""
    model, params, _ = peer
    context = (3, 5, 8, 13, 21, 34, 55)
    made = []
    for _ in range(4):
        made.append(next(token for token in range(67) if expected(peer, Pair((*context, *made), (token,)))[1]))
    continuations = [tuple(made), tuple(made[:1]), (*made[:3], (made[3] + 1) % 67), ((made[0] + 1) % 67, *made[1:])]
    for pairs in ([Pair(context, each)] for each in continuations):
        assert_as_expected(peer, pairs, log_likelihoods(model, params, pairs, batch_size=4, max_length=LENGTH))
    found = log_likelihoods(model, params, [Pair(context, c) for c in continuations], batch_size=4, max_length=LENGTH)
    assert [greedy for _, greedy in found] == [True, True, False, False]


def test_of_equal_logits_the_first_is_the_greedy_one(peer):
    """As argmax; with zeros in the head all are equal. Logits that are no numbers make nothing greedy."""
    model, params, _ = peer
    context = (3, 5, 8, 13, 21, 34, 55)
    for scale, wanted in ((0.0, [True, False, False, True, False]), (np.nan, [False] * 5)):
        broken = {**params, "lm_head": {"kernel": scale * np.asarray(params["lm_head"]["kernel"])}}
        pairs = [Pair(context, continuation) for continuation in ((0,), (1,), (66,), (0, 0), (0, 1))]
        found = log_likelihoods(model, broken, pairs, batch_size=8, max_length=LENGTH)
        assert [greedy for _, greedy in found] == wanted
        alone = [log_likelihoods(model, broken, [pair], batch_size=1, max_length=LENGTH)[0] for pair in pairs]
        assert [greedy for _, greedy in alone] == wanted


def test_what_is_too_long_loses_its_beginning(peer):
    model, params, _ = peer
    numbers = np.random.default_rng(1)
    context = ids(numbers, 40)
    pairs = [Pair(context, ids(numbers, count)) for count in (1, 5, 32)] + [Pair(ids(numbers, 1), ids(numbers, 32))]
    for length in (32, 9):
        fitting = [pair for pair in pairs if len(pair.continuation) <= length]
        found = log_likelihoods(model, params, fitting, batch_size=4, max_length=length)
        assert_as_expected(peer, fitting, found, length)
    with pytest.raises(ValueError, match=r"^a continuation has 32 tokens, and the model reads 9: "):
        log_likelihoods(model, params, pairs, batch_size=4, max_length=9)


def test_likelihoods_are_of_the_network_whatever_its_cache(peer):
    model, params, _ = peer
    pairs = requests()[:20]
    plain = log_likelihoods(model, params, pairs, batch_size=8, max_length=LENGTH)
    for settings in (["cache.dtype=int8"], ["cache.recent=2", "cache.heavy_hitters=2"]):
        narrow = reconfigure(model, settings)
        assert narrow.config.cache != CacheConfig()
        assert log_likelihoods(narrow, params, pairs, batch_size=8, max_length=LENGTH) == plain


def test_logits_are_made_in_parts(peer, monkeypatch):
    model, params, _ = peer
    pairs = requests()[:12]
    monkeypatch.setattr(likelihood, "_LOGITS", 7 * 67)
    assert_as_expected(peer, pairs, log_likelihoods(model, params, pairs, batch_size=5, max_length=LENGTH))


def test_no_more_logits_exist_at_once_than_is_said(peer, monkeypatch):
    model, params, _ = peer
    monkeypatch.setattr(likelihood, "_LOGITS", 7 * 67)
    hidden, targets = jnp.zeros((5, 6, model.config.hidden_size)), jnp.zeros((5, 6), jnp.int32)
    program = str(jax.make_jaxpr(lambda h, t: likelihood._target_scores(model, params, h, t))(hidden, targets))
    assert "f32[6,67]" in program and "f32[30,67]" not in program, "30 tokens in five parts"


def test_a_batch_is_sent_before_the_numbers_of_the_last_one_are_read(monkeypatch):
    """So that the device never waits. Sums are exact: float32 has no number between -16777216 and -16777218."""
    events = []

    def sent(model, params, batch):
        events.append("sent")
        scores = np.where(np.arange(batch.targets_RM.shape[1]) == 0, np.float32(-(2**24)), np.float32(-1))
        return np.broadcast_to(scores, batch.targets_RM.shape), batch.targets_RM >= 0

    monkeypatch.setattr(likelihood, "_dispatch", sent)
    model, pairs = ByteTransformer(small_config()), [Pair((1, n), (3, 4)) for n in range(5)]
    found = log_likelihoods(model, {}, pairs, batch_size=2, max_length=LENGTH, progress=events.append)
    assert events == ["sent", "sent", 2, "sent", 2, 1]
    assert found == [(-16777217.0, True)] * 5


def test_the_longest_rows_come_first(peer):
    """What does not fit into memory fails at once."""
    for kind in (Whole, Shared):
        sizes = [
            batch.tokens_RT.shape[1] if isinstance(batch, Whole) else batch.contexts_BW.shape[1]
            for batch in batches([Pair(tuple(range(1, n)), (c,)) for n in (9, 300, 40, 120) for c in range(3)], 2, 512)
            if isinstance(batch, kind)
        ]
        assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) > 1


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 100])
def test_each_pair_is_in_one_batch_with_its_own_tokens(rows):
    pairs = requests() + requests()[:5]
    seen = []
    for batch in batches(pairs, rows, LENGTH):
        seen += batch.numbers
        assert len(batch.targets_RM) <= rows
        for row, number in enumerate(batch.numbers):
            context, continuation = pairs[number]
            assert batch.targets_RM[row, : len(continuation)].tolist() == list(continuation)
            assert (batch.targets_RM[row, len(continuation) :] == -1).all()
            if isinstance(batch, Shared):
                owner = batch.owners_R[row]
                assert batch.contexts_BW[owner, : batch.lengths_B[owner]].tolist() == list(context)
            else:
                whole = [*context, *continuation[:-1]]
                assert batch.tokens_RT[row, : len(whole)].tolist() == whole
                assert batch.first_R[row] == len(context) - 1
        assert (batch.targets_RM[len(batch.numbers) :] == -1).all()
    assert sorted(seen) == list(range(len(pairs)))


def test_a_context_is_read_once_where_that_saves_a_quarter_of_the_tokens():
    long, short = tuple(range(20)), (1,)
    choices = [(1, 2, 3), (4, 5, 6), (7, 8), (9, 10, 11, 12)]
    for context, kind in ((long, Shared), (short, Whole)):
        (batch,) = batches([Pair(context, choice) for choice in choices], 8, LENGTH)
        assert type(batch) is kind
    (one,) = batches([Pair(long, (7,)), Pair(long, (8,))], 8, LENGTH)
    assert isinstance(one, Shared) and one.targets_RM.shape == (2, 1)  # nothing is read behind the context


def test_shapes_are_few():
    numbers = np.random.default_rng(2)
    pairs = []
    for _ in range(200):
        context = ids(numbers, int(numbers.integers(1, 200)))
        pairs += [Pair(context, ids(numbers, int(numbers.integers(1, 15)))) for _ in range(4)]
    shapes = []
    for batch in batches(pairs, 32, 256):
        width = batch.contexts_BW if isinstance(batch, Shared) else batch.tokens_RT
        shapes.append((type(batch), *width.shape, *batch.targets_RM.shape))
    assert len(shapes) > 25
    assert len(set(shapes)) <= 20


def test_shapes_are_few_where_contexts_have_other_numbers_of_continuations():
    numbers = np.random.default_rng(3)
    pairs = []
    for number in range(100):
        context = (number % 67, *ids(numbers, 40))
        pairs += [Pair((*context, number), ids(numbers, 5)) for _ in range(int(numbers.integers(2, 12)))]
    made = list(batches(pairs, 32, 64))
    assert {type(batch) for batch in made} == {Shared}
    assert len({(batch.contexts_BW.shape, batch.targets_RM.shape) for batch in made}) == 2, "the last one is smaller"


@pytest.mark.parametrize(
    ("length", "limit", "wanted"), [(1, 99, 32), (33, 99, 48), (49, 99, 64), (65, 99, 96), (97, 99, 99), (5, 9, 9)]
)
def test_rounded_lengths(length, limit, wanted):
    assert rounded(length, 32, limit) == wanted
