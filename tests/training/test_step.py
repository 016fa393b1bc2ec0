"""Is a step the step that torch takes, is accumulation the large batch, does what is random differ where it should?"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.llama_pair import llama_pair
from helpers.training import (
    MODEL,
    RECORDER,
    assert_close,
    compiled_step,
    first_state,
    flat,
    nested,
    packed_batch,
    rate_at,
    settings,
    start,
)

from stellarbyte_jax.config import DataConfig, LossConfig
from stellarbyte_jax.model.decoder import ByteTransformer, forward, logits
from stellarbyte_jax.model.io import Aux, Inputs, State
from stellarbyte_jax.training import step as step_module
from stellarbyte_jax.training.loss import batch_loss
from stellarbyte_jax.training.metrics import validation_metrics
from stellarbyte_jax.training.optimizer import make_optimizer, make_schedule
from stellarbyte_jax.training.state import create_state
from stellarbyte_jax.training.step import make_eval_step, make_train_step


def test_fifty_steps_equal_torch():
    """The same tiny Llama, weights, batches, AdamW with decay on matrices only, clipping, warm-up and cosine."""
    torch = pytest.importorskip("torch", reason="the peer of this test")
    config = settings()
    _, params, peer = llama_pair()
    state, step = start(config)
    state = state.replace(params=params)
    matrices = [p for p in peer.parameters() if p.ndim == 2]
    vectors = [p for p in peer.parameters() if p.ndim == 1]
    o = config.optimizer
    theirs = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": o.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=1.0,
        betas=(o.b1, o.b2),
        eps=o.eps,
    )
    random = np.random.default_rng(7)
    losses, peer_losses = [], []
    for number in range(50):
        tokens = random.integers(0, 12, (4, 16), dtype=np.int32)  # few tokens, so that there is something to learn
        state, metrics = step(state, {"tokens": jax.device_put(tokens)})
        losses.append(float(metrics["loss"]))
        loss = peer(torch.from_numpy(tokens).long(), labels=torch.from_numpy(tokens).long()).loss
        theirs.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(peer.parameters(), o.gradient_clip_norm)
        for group in theirs.param_groups:
            group["lr"] = float(rate_at(config, number))
        theirs.step()
        peer_losses.append(loss.item())
        assert float(metrics["gradient_norm"]) == pytest.approx(norm.item(), rel=2e-3)
    np.testing.assert_allclose(losses, peer_losses, atol=1e-3)
    assert losses[-1] < losses[0] - 1


def test_accumulation_equals_the_large_batch():
    """Parts with different numbers of targets, so that a mean of means would be wrong."""
    batch = packed_batch()
    batch["loss_mask"][:1] = False
    results = []
    for parts in (1, 2, 4):
        state, step = first_state(settings()), compiled_step(settings(gradient_accumulation_steps=parts))
        for _ in range(2):
            state, metrics = step(state, batch)
        results.append((state.params, metrics))
    for params, metrics in results[1:]:
        assert_close(params, results[0][0], atol=2e-5)
        assert metrics.keys() == results[0][1].keys()
        for name, value in metrics.items():
            np.testing.assert_allclose(value, results[0][1][name], rtol=1e-4, err_msg=name)


def test_metrics_of_a_step():
    """The loss has what is minimised in it, the cross-entropy has not; both are means over the batch's targets."""
    plain = settings()
    state, step = start(plain)
    smoothed = compiled_step(dataclasses.replace(plain, loss=LossConfig(label_smoothing=0.1, z_loss=0.01)))
    batch = packed_batch()
    metrics = {name: float(x) for name, x in smoothed(state, batch)[1].items()}
    expected = {name: float(x) for name, x in step(state, batch)[1].items()}
    assert metrics["loss"] > metrics["cross_entropy"] + 0.05
    assert metrics["cross_entropy"] == pytest.approx(expected["loss"], rel=1e-5)
    assert metrics["accuracy"] == pytest.approx(expected["accuracy"])
    continues = batch["segment_ids"][:, 1:] == batch["segment_ids"][:, :-1]
    assert metrics["target_tokens"] == np.sum(batch["loss_mask"][:, 1:] & continues)


def test_a_batch_without_targets_gives_zero_and_not_nan():
    state, step = start(settings())
    batch = packed_batch()
    after, metrics = step(state, {**batch, "loss_mask": np.zeros_like(batch["loss_mask"])})
    assert float(metrics["loss"]) == float(metrics["gradient_norm"]) == float(metrics["target_tokens"]) == 0
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(after.params))


XPOS = dataclasses.replace(MODEL, position_embedding="xpos", xpos_learnable=True)


@pytest.mark.parametrize("parts", [1, 2])
def test_learned_rates_are_pulled_to_the_papers(parts):
    """The mean over layers and pairs of the squared distance, by its weight, once in the loss and once in its slope."""
    plain = settings(model=XPOS, gradient_accumulation_steps=parts)
    state, free = first_state(settings(model=XPOS), RECORDER), compiled_step(plain, RECORDER)
    pulled = compiled_step(dataclasses.replace(plain, loss=LossConfig(xpos_regularization=0.5)), RECORDER)
    weights = flat(state.params)
    path = "layers/0/attn/xpos_rate"
    distance = np.array([[0.3, 0.3, 0.3, 0.3], [0.1, 0.0, 0.0, -0.2]], np.float32)
    moved = state.replace(params=nested({**weights, path: weights[path] + distance}))
    value = (4 * 0.09 + 0.01 + 0.04) / 8

    batch = packed_batch()
    (pulled_state, with_term), (free_state, without) = pulled(moved, batch), free(moved, batch)
    assert float(with_term["xpos_regularization"]) == pytest.approx(value, rel=1e-5)
    assert float(without["xpos_regularization"]) == pytest.approx(value, rel=1e-5)  # reported, not added
    assert float(without["loss"]) == pytest.approx(float(without["cross_entropy"]), rel=1e-6)
    assert float(with_term["loss"]) == pytest.approx(float(without["loss"]) + 0.5 * value, rel=1e-6)
    assert float(with_term["cross_entropy"]) == pytest.approx(float(without["cross_entropy"]), rel=1e-6)
    slopes, free_slopes = flat(pulled_state.opt_state), flat(free_state.opt_state)
    np.testing.assert_allclose(slopes.pop(path) - free_slopes.pop(path), 0.5 * 2 * distance / 8, atol=1e-6)
    assert_close(nested(slopes), nested(free_slopes), atol=1e-6)

    at_the_papers = pulled(state, batch)[1]
    assert float(at_the_papers["xpos_regularization"]) == 0
    assert float(at_the_papers["loss"]) == pytest.approx(float(at_the_papers["cross_entropy"]), rel=1e-6)


def test_a_model_without_learned_rates_reports_none():
    state, step = start(settings())
    assert "xpos_regularization" not in step(state, packed_batch())[1]


def with_a_statistic(monkeypatch, name):
    """A step whose layers tell a number besides: the number of the batch's rows."""

    def told(*args, **kwargs):
        total, sums, out = batch_loss(*args, **kwargs)
        rows = jnp.float32(args[2]["tokens"].shape[0])
        return total, sums, out.replace(aux=out.aux + Aux.of(statistics={name: rows}))

    monkeypatch.setattr(step_module, "batch_loss", told)
    config = settings(gradient_accumulation_steps=2)
    model = ByteTransformer(config.model)
    optimizer = make_optimizer(config, model)
    step = make_train_step(config, model, optimizer, make_schedule(config))
    state = jax.jit(lambda: create_state(config, model, optimizer))()
    return jax.eval_shape if name == "loss" else jax.jit, step, state


def test_what_layers_tell_is_a_mean_over_the_parts_of_a_batch(monkeypatch):
    run, step, state = with_a_statistic(monkeypatch, "rows")
    batch = packed_batch()
    assert float(run(step)(state, batch)[1]["rows"]) == batch["tokens"].shape[0] / 2


def test_what_layers_tell_may_not_hide_a_metric(monkeypatch):
    run, step, state = with_a_statistic(monkeypatch, "loss")
    with pytest.raises(ValueError, match="loss: the name of a metric and of something that layers tell"):
        run(step, state, packed_batch())


def one_step(optimizer=None, **changes):
    config = settings(ema_decay=0.5, **changes)
    model = ByteTransformer(config.model)
    optimizer = optimizer or make_optimizer(config, model)
    state = jax.jit(lambda: create_state(config, model, optimizer))()
    step = jax.jit(make_train_step(config, model, optimizer, make_schedule(config)))
    return state, *step(state, packed_batch())


@pytest.mark.parametrize("parts", [1, 2])
def test_an_update_of_a_gradient_that_is_no_number_is_not_applied(monkeypatch, parts):
    def with_infinite_slope(*args, **kwargs):
        total, sums, out = batch_loss(*args, **kwargs)
        return total + jnp.sqrt(0 * jnp.sum(out.hidden_BTD)), sums, out

    monkeypatch.setattr(step_module, "batch_loss", with_infinite_slope)
    before, after, metrics = one_step(gradient_accumulation_steps=parts)
    assert np.isfinite(metrics["loss"]) and not np.isfinite(metrics["gradient_norm"]) and not metrics["finite"]
    for name in ("params", "opt_state", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(before, name))


def test_an_update_of_a_loss_that_is_no_number_is_not_applied(monkeypatch):
    def infinite(*args, **kwargs):
        total, sums, out = batch_loss(*args, **kwargs)
        return total + jnp.inf, sums, out

    monkeypatch.setattr(step_module, "batch_loss", infinite)
    before, after, metrics = one_step(model=dataclasses.replace(MODEL, num_hidden_layers=1))
    assert np.isfinite(metrics["gradient_norm"]) and not metrics["finite"]
    for name in ("params", "opt_state", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(before, name))


def test_padding_counts_as_one_more_document(monkeypatch):
    """Kernels for packed rows leave out the documents beyond the number that they are told."""
    told = []

    def watched(*args, **kwargs):
        told.append(kwargs["max_segments"])
        return batch_loss(*args, **kwargs)

    monkeypatch.setattr(step_module, "batch_loss", watched)
    config = settings(data=DataConfig(sequence_length=16, max_documents_per_sequence=3))
    model = ByteTransformer(config.model)
    state = jax.eval_shape(lambda: create_state(config, model, RECORDER))
    jax.eval_shape(make_train_step(config, model, RECORDER, make_schedule(config)), state, packed_batch())
    jax.eval_shape(make_eval_step(config, model, None), state.params, packed_batch(), State())
    assert told == [4, 4]


def test_weights_that_overflow_are_told():
    huge = optax.chain(optax.scale(1e38), optax.scale(1e38))
    _, after, metrics = one_step(huge)
    assert np.isfinite(metrics["gradient_norm"]) and not metrics["finite"]
    assert not all(np.isfinite(x).all() for x in jax.tree.leaves(after.params))
    assert one_step()[2]["finite"]


@pytest.mark.parametrize("name", ["hidden_dropout", "residual_dropout", "attention_dropout", "drop_path"])
def test_each_kind_of_dropout_acts_in_a_step(name):
    state = first_state(settings(), RECORDER)
    noisy = compiled_step(settings(model=dataclasses.replace(MODEL, **{name: 0.9})), RECORDER)
    without = compiled_step(settings())(first_state(settings()), packed_batch())[1]["loss"]
    assert float(noisy(state, packed_batch())[1]["loss"]) != pytest.approx(float(without), rel=1e-5)


def test_dropout_differs_by_step_and_part_and_repeats_with_the_seed():
    config = settings(model=dataclasses.replace(MODEL, hidden_dropout=0.3), gradient_accumulation_steps=2)
    half = {name: x[:2] for name, x in packed_batch().items()}
    batch = {name: np.concatenate([x, x]) for name, x in half.items()}

    def loss(config, batch, number=0):
        state = first_state(settings(), RECORDER).replace(step=jax.device_put(np.asarray(number, np.int32)))
        return float(compiled_step(config, RECORDER)(state, batch)[1]["loss"])

    found = loss(config, batch)
    assert found == loss(config, batch) != loss(config, batch, number=1)
    assert loss(dataclasses.replace(config, seed=1), batch) != found
    # If both parts dropped the same units, their mean would equal the loss of one of them.
    one_part = loss(dataclasses.replace(config, gradient_accumulation_steps=1, global_batch_size=2), half)
    assert found != pytest.approx(one_part, rel=1e-4)


MEMORY = settings(
    model=dataclasses.replace(MODEL, memory={"length": (12, 6), "recent_share": 0.5}),
    data=DataConfig(sequence_length=16, arrangement="contiguous"),
)


def contiguous_batch(seed):
    """The second part of four rows, of which row 1 begins a new document."""
    begin = np.array([16, 0, 32, 16], np.int32)[:, None] if seed else np.zeros((4, 1), np.int32)
    return {
        "tokens": np.random.default_rng(seed).integers(0, MODEL.vocab_size, (4, 16), dtype=np.int32),
        "positions": begin + np.arange(16, dtype=np.int32),
        "segment_ids": np.ones((4, 16), np.int32),
    }


def test_memory_is_carried_through_accumulation_by_rows():
    results = []
    for parts in (1, 2):
        step = compiled_step(dataclasses.replace(MEMORY, gradient_accumulation_steps=parts), RECORDER)
        state, _ = step(first_state(MEMORY, RECORDER), contiguous_batch(0))
        state, metrics = step(state, contiguous_batch(1))
        results.append((state, metrics))
    (whole, metrics), (cut, cut_metrics) = results
    assert float(cut_metrics["loss"]) == pytest.approx(float(metrics["loss"]), rel=1e-5)
    assert_close(cut.opt_state, whole.opt_state, atol=1e-6)
    assert jax.tree.structure(cut.carried) == jax.tree.structure(whole.carried)
    for x, y in zip(jax.tree.leaves(cut.carried), jax.tree.leaves(whole.carried), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)
    assert [int(n) for n in whole.carried.memory.lengths_B] == [32, 16, 32, 32]
    # Without the memory the loss differs.
    state, step = start(MEMORY, RECORDER)
    assert float(step(state, contiguous_batch(1))[1]["loss"]) != pytest.approx(float(metrics["loss"]), rel=1e-5)


def test_validation_is_weighted_by_tokens():
    config = settings(loss=LossConfig(label_smoothing=0.3, z_loss=0.1))  # training's alone
    config = dataclasses.replace(config, model=dataclasses.replace(MODEL, hidden_dropout=0.5))
    model, state = ByteTransformer(config.model), first_state(settings(), RECORDER)
    sizes = jnp.arange(MODEL.vocab_size, dtype=jnp.int32) % 4 + 1
    evaluate = jax.jit(make_eval_step(config, model, sizes))
    small, large = packed_batch(1), packed_batch(2)
    small["loss_mask"][1:] = False
    sums = [evaluate(state.averaged, b, State())[0] for b in (small, large)]
    total = {name: float(sums[0][name]) + float(sums[1][name]) for name in sums[0]}
    found = validation_metrics(total)
    nll, count, right, size = 0.0, 0, 0, 0
    for batch in (small, large):
        inputs = Inputs(*(jax.device_put(batch[name]) for name in ("tokens", "positions", "segment_ids")))
        scores = logits(model, state.params, forward(model, state.params, inputs).hidden_BTD)
        log_p = np.asarray(jax.nn.log_softmax(scores, axis=-1))
        for row, place in zip(*np.nonzero(batch["loss_mask"]), strict=True):
            if place == 0 or batch["segment_ids"][row, place] != batch["segment_ids"][row, place - 1]:
                continue
            target = batch["tokens"][row, place]
            nll -= log_p[row, place - 1, target]
            right += int(log_p[row, place - 1].argmax() == target)
            size += target % 4 + 1
            count += 1
    assert found["loss"] == pytest.approx(nll / count, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nll / count), rel=1e-5)
    assert found["accuracy"] == pytest.approx(right / count)
    assert found["bits_per_byte"] == pytest.approx(nll / math.log(2) / size, rel=1e-5)


def test_validation_carries_memory():
    state, step = start(MEMORY, RECORDER)
    evaluate = jax.jit(make_eval_step(MEMORY, ByteTransformer(MEMORY.model), jnp.ones(MODEL.vocab_size, jnp.int32)))
    _, carried = evaluate(state.averaged, contiguous_batch(0), state.carried)
    sums, carried = evaluate(state.averaged, contiguous_batch(1), carried)
    trained, _ = step(state, contiguous_batch(0))
    trained, metrics = step(trained, contiguous_batch(1))
    assert float(sums["cross_entropy"] / sums["tokens"]) == pytest.approx(float(metrics["loss"]), rel=1e-5)
    for x, y in zip(jax.tree.leaves(carried), jax.tree.leaves(trained.carried), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_validation_does_not_depend_on_accumulation():
    state, _ = start(MEMORY, RECORDER)
    sizes = jnp.ones(MODEL.vocab_size, jnp.int32)
    found = []
    for parts in (1, 2, 4):
        config = dataclasses.replace(MEMORY, gradient_accumulation_steps=parts)
        evaluate = jax.jit(make_eval_step(config, ByteTransformer(config.model), sizes))
        _, carried = evaluate(state.averaged, contiguous_batch(0), state.carried)
        found.append(evaluate(state.averaged, contiguous_batch(1), carried))
    for sums, carried in found[1:]:
        assert {name: float(x) for name, x in sums.items()} == pytest.approx(
            {name: float(x) for name, x in found[0][0].items()}, rel=1e-5
        )
        for x, y in zip(jax.tree.leaves(carried), jax.tree.leaves(found[0][1]), strict=True):
            np.testing.assert_allclose(x, y, atol=1e-5)


def test_validation_without_known_bytes_has_none():
    state, _ = start(settings(), RECORDER)
    evaluate = jax.jit(make_eval_step(settings(), ByteTransformer(MODEL), None))
    sums, _ = evaluate(state.averaged, packed_batch(), State())
    found = validation_metrics({name: float(x) for name, x in sums.items()})
    assert "bits_per_byte" not in found and found["loss"] > 0


def test_the_share_of_padding_is_told():
    state, step = start(settings())
    batch = packed_batch()
    assert float(step(state, batch)[1]["padding"]) == pytest.approx(np.mean(batch["segment_ids"] == 0))
    batch["segment_ids"][:, 8:] = 0
    assert float(step(state, batch)[1]["padding"]) > 0.3
