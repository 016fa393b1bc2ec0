"""What is minimised: which token each position predicts, the options of the loss, the layers' own terms."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.llama_pair import llama_pair
from helpers.training import MODEL, packed_batch
from helpers.variants import init

from stellarbyte_jax.config import LossConfig
from stellarbyte_jax.model.decoder import ByteTransformer, forward, logits
from stellarbyte_jax.model.io import Aux, Inputs
from stellarbyte_jax.training.loss import auxiliary_loss, batch_loss, count_targets, next_token_targets, target_weights
from stellarbyte_jax.training.metrics import validation_metrics

loss_of = jax.jit(batch_loss, static_argnums=(0, 3), static_argnames=("prompt_weight", "train"))


def test_labels_are_shifted_once():
    batch = {
        "tokens": jax.device_put(np.asarray([[5, 6, 7, 8, 9, 0]], np.int32)),
        "segment_ids": jax.device_put(np.asarray([[1, 1, 1, 2, 2, 0]], np.int32)),
        "loss_mask": jnp.asarray([[False, True, True, True, True, False]]),
    }
    np.testing.assert_array_equal(next_token_targets(batch), [[6, 7, -1, 9, -1, -1]])
    outside = {"tokens": batch["tokens"], "labels": jax.device_put(np.asarray([[5, -100, 7, 8, 9, -100]], np.int32))}
    np.testing.assert_array_equal(next_token_targets(outside), [[-1, 7, 8, 9, -1, -1]])


def test_padding_predicts_nothing():
    """Neither from padding to padding nor across it, even where the mask does not say so."""
    batch = {
        "tokens": jax.device_put(np.asarray([[5, 6, 7, 8, 9]], np.int32)),
        "segment_ids": jax.device_put(np.asarray([[1, 1, 0, 0, 0]], np.int32)),
    }
    np.testing.assert_array_equal(next_token_targets(batch), [[6, -1, -1, -1, -1]])


def test_loss_equals_transformers_with_the_same_labels():
    torch = pytest.importorskip("torch", reason="the peer of this test")
    model, params, peer = llama_pair()
    tokens = np.random.default_rng(1).integers(0, MODEL.vocab_size, (3, 16), dtype=np.int32)
    labels = np.where(np.random.default_rng(2).random((3, 16)) < 0.3, -100, tokens).astype(np.int32)
    total, sums, _ = loss_of(model, params, {"tokens": tokens, "labels": labels}, LossConfig())
    with torch.no_grad():
        theirs = peer(torch.from_numpy(tokens).long(), labels=torch.from_numpy(labels).long()).loss
    assert float(total / sums["tokens"]) == pytest.approx(float(theirs), abs=1e-5)


def test_options_of_the_loss():
    """Label smoothing, z-loss and the padding of the vocabulary; what is reported has none of the first two."""
    model = ByteTransformer(dataclasses.replace(MODEL, vocab_size_multiple=16))
    params = init(model)
    assert params["lm_head"]["kernel"].shape[1] == 80
    batch = {name: jax.device_put(x) for name, x in packed_batch().items()}
    total, sums, out = loss_of(model, params, batch, LossConfig(label_smoothing=0.1, z_loss=0.01))

    inputs = Inputs(batch["tokens"], batch["positions"], batch["segment_ids"])
    scores = np.asarray(logits(model, params, forward(model, params, inputs).hidden_BTD), np.float64)
    log_z = np.log(np.sum(np.exp(scores), axis=-1))
    targets = np.asarray(next_token_targets(batch))
    counts = targets >= 0
    of_target = np.take_along_axis(scores, np.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    nll = log_z - of_target
    smooth = log_z - scores.mean(axis=-1)
    assert float(total) == pytest.approx(np.sum((0.9 * nll + 0.1 * smooth + 0.01 * log_z**2)[counts]), rel=1e-5)
    assert float(sums["cross_entropy"]) == pytest.approx(np.sum(nll[counts]), rel=1e-5)
    assert float(sums["tokens"]) == counts.sum()
    assert float(sums["correct"]) == np.sum((scores.argmax(axis=-1) == targets)[counts])
    assert out.state.memory is None and out.aux.losses == {}


def test_terms_of_the_layers_are_added_by_their_weights():
    aux = Aux.of({"xpos_regularization": jnp.float32(3.0)}, {"something": jnp.float32(7.0)})
    assert float(auxiliary_loss(LossConfig(xpos_regularization=0.5), aux)) == 1.5
    assert float(auxiliary_loss(LossConfig(), aux)) == 0.0
    assert float(auxiliary_loss(LossConfig(), Aux())) == 0.0


def test_a_term_is_a_mean_over_the_layers_that_tell_it():
    layers = [Aux.of({"xpos_regularization": jnp.float32(x)}) for x in (1.0, 5.0)]
    aux = layers[0] + Aux() + layers[1]
    assert float(auxiliary_loss(LossConfig(xpos_regularization=0.5), aux)) == 1.5


def test_a_term_without_a_setting_for_its_weight_is_an_error():
    with pytest.raises(AttributeError, match="balance"):
        auxiliary_loss(LossConfig(), Aux.of({"balance": jnp.float32(1.0)}))


def test_a_term_of_weight_zero_is_left_out():
    """Not multiplied: a term that is not finite would make the loss so."""
    aux = Aux.of({"xpos_regularization": jnp.float32(np.inf)})
    assert float(auxiliary_loss(LossConfig(), aux)) == 0.0


def test_prompts_count_as_much_as_is_asked_for():
    """A target has the weight of what the target is, not of where it is predicted."""
    batch = {
        "tokens": jax.device_put(np.asarray([[5, 6, 7, 8, 9, 0]], np.int32)),
        "segment_ids": jax.device_put(np.asarray([[1, 1, 1, 1, 1, 0]], np.int32)),
        "loss_mask": jnp.asarray([[False, True, True, True, True, False]]),
        "replies": jax.device_put(np.asarray([[0, 0, 1, 1, 0, 0]], np.int32)),
    }
    assert target_weights(batch, 0.0) is None and float(count_targets(batch)) == 4
    np.testing.assert_allclose(target_weights(batch, 0.25), [[0.25, 1, 1, 0.25, 0.25, 0.25]])
    assert float(count_targets(batch, 0.25)) == 2.5
    model = ByteTransformer(MODEL)
    params = init(model)
    total, sums, out = loss_of(model, params, batch, LossConfig(), prompt_weight=0.25, train=True)
    each = -jax.nn.log_softmax(logits(model, params, out.hidden_BTD))[0, jnp.arange(4), batch["tokens"][0, 1:5]]
    np.testing.assert_allclose(total, jnp.dot(each, jnp.asarray([0.25, 1, 1, 0.25])), rtol=1e-5)
    assert float(sums["tokens"]) == 2.5


def test_replies_are_measured_each_by_itself():
    """The fifth reply counts with the fourth."""
    batch = {
        "tokens": jax.device_put(np.asarray([[5, 6, 7, 8, 9, 4], [3, 2, 1, 2, 3, 4]], np.int32)),
        "loss_mask": jnp.asarray([[False, True, True, False, True, True], [False] + [True] * 5]),
        "replies": jax.device_put(np.asarray([[0, 1, 1, 0, 2, 2], [0, 1, 2, 3, 4, 5]], np.int32)),
    }
    model = ByteTransformer(MODEL)
    params = init(model)
    total, sums, out = loss_of(model, params, batch, LossConfig())
    scores = jax.nn.log_softmax(logits(model, params, out.hidden_BTD))[:, :-1]
    each = -jnp.take_along_axis(scores, batch["tokens"][:, 1:, None], axis=-1)[..., 0]
    of_replies = [each[0, 0] + each[0, 1] + each[1, 0], each[0, 3] + each[0, 4] + each[1, 1], each[1, 2]]
    of_replies.append(each[1, 3] + each[1, 4])
    np.testing.assert_allclose(sums["reply_losses"], of_replies, rtol=1e-5)
    np.testing.assert_array_equal(sums["reply_tokens"], [3, 3, 1, 2])
    plain = {name: x for name, x in batch.items() if name != "replies"}
    expected, expected_sums, _ = batch_loss(model, params, plain, LossConfig())
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    for name, value in expected_sums.items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-6, err_msg=name)
    told = validation_metrics({name: np.asarray(x, np.float64) for name, x in sums.items()})
    assert told["loss_reply_2"] == pytest.approx(float(of_replies[1]) / 3, rel=1e-5)
    assert "loss_reply_1" not in validation_metrics(
        {"tokens": 2.0, "cross_entropy": 3.0, "correct": 0.0, "reply_tokens": [2, 0], "reply_losses": [3.0, 0.0]}
    ), "one reply alone is the loss"


def test_the_implementation_of_the_head_is_the_one_that_is_named():
    model = ByteTransformer(MODEL)
    params = init(model)
    batch = {"tokens": jax.device_put(np.ones((2, 8), np.int32))}

    def loss(params):
        return batch_loss(model, params, batch, LossConfig(implementation="pallas"))[0]

    with pytest.raises(NotImplementedError, match=r"loss\.implementation: pallas refused: "):
        jax.eval_shape(jax.grad(loss), params)
