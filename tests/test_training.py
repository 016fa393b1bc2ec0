"""Is a step the step that torch takes, is accumulation the large batch, does the learning rate follow its schedule?"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stellarbyte_jax.config import ByteConfig, DataConfig, LossConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from stellarbyte_jax.model.decoder import ByteTransformer, init_params
from stellarbyte_jax.train import metrics
from stellarbyte_jax.train.loss import batch_loss, next_token_targets
from stellarbyte_jax.train.metrics import count_parameters, flops_per_token, speed_metrics, validation_metrics
from stellarbyte_jax.train.optimizer import make_optimizer, make_schedule
from stellarbyte_jax.train.state import create_state
from stellarbyte_jax.train.step import make_eval_step, make_train_step

MODEL = ByteConfig(
    vocab_size=67,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=64,
    max_position_embeddings=32,
    compute_dtype="float32",
)


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax mixes float and integer types inside."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def settings(**changes):
    base = TrainConfig(
        output_dir="unused",
        steps=50,
        global_batch_size=4,
        model=MODEL,
        data=DataConfig(sequence_length=16),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        schedule=ScheduleConfig(warmup_steps=5),
    )
    return dataclasses.replace(base, **changes)


def packed_batch(seed=0, batch=4, length=16):
    """Rows of two documents and some padding, the way the data pipeline makes them."""
    random = np.random.default_rng(seed)
    ids = np.zeros((batch, length), np.int32)
    positions = np.zeros((batch, length), np.int32)
    for row in range(batch):
        cut, end = random.integers(3, 7), random.integers(10, length + 1)
        ids[row, :cut], ids[row, cut:end] = 1, 2
        positions[row, :cut], positions[row, cut:end] = np.arange(cut), np.arange(end - cut)
    return {
        "tokens": random.integers(0, MODEL.vocab_size, (batch, length), dtype=np.int32),
        "segment_ids": ids,
        "positions": positions,
        "loss_mask": (ids > 0) & (positions > 0) & (random.random((batch, length)) > 0.2),
    }


def start(config):
    model = ByteTransformer(config.model)
    optimizer = make_optimizer(config, model)
    step = jax.jit(make_train_step(config, model, optimizer, make_schedule(config)))
    return model, create_state(config, model, optimizer), step


def test_labels_are_shifted_once():
    batch = {
        "tokens": jnp.asarray([[5, 6, 7, 8, 9, 0]], jnp.int32),
        "segment_ids": jnp.asarray([[1, 1, 1, 2, 2, 0]], jnp.int32),
        "loss_mask": jnp.asarray([[False, True, True, True, True, False]]),
    }
    np.testing.assert_array_equal(next_token_targets(batch), [[6, 7, -1, 9, -1, -1]])
    outside = {"tokens": batch["tokens"], "labels": jnp.asarray([[5, -100, 7, 8, 9, -100]], jnp.int32)}
    np.testing.assert_array_equal(next_token_targets(outside), [[-1, 7, 8, 9, -1, -1]])


def test_loss_equals_transformers_with_the_same_labels():
    torch = pytest.importorskip("torch", reason="the peer of this test")
    model, params, peer = llama_pair()
    tokens = np.random.default_rng(1).integers(0, MODEL.vocab_size, (3, 16), dtype=np.int32)
    labels = np.where(np.random.default_rng(2).random((3, 16)) < 0.3, -100, tokens).astype(np.int32)
    total, sums, _ = batch_loss(
        model, params, {"tokens": jnp.asarray(tokens), "labels": jnp.asarray(labels)}, LossConfig()
    )
    with torch.no_grad():
        theirs = peer(torch.from_numpy(tokens).long(), labels=torch.from_numpy(labels).long()).loss
    assert float(total / sums["tokens"]) == pytest.approx(float(theirs), abs=1e-5)


def llama_pair():
    """Our model and transformers' with the same weights, written out here by hand."""
    torch = pytest.importorskip("torch", reason="the peer of this test")
    import transformers

    model = ByteTransformer(MODEL)
    params = init_params(model, jax.random.key(0))
    c = MODEL
    peer = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.hidden_size,
            intermediate_size=c.mlp_size,
            num_hidden_layers=c.num_hidden_layers,
            num_attention_heads=c.num_attention_heads,
            num_key_value_heads=c.kv_heads,
            max_position_embeddings=c.max_position_embeddings,
            rms_norm_eps=c.rms_norm_eps,
            attn_implementation="eager",
        )
    )
    layers = params["layers"]["0"]
    weights = {
        "model.embed_tokens.weight": params["embed"]["embedding"],
        "model.norm.weight": params["final_norm"]["scale"],
        "lm_head.weight": params["lm_head"]["kernel"].T,
    }
    for i in range(c.num_hidden_layers):
        at = f"model.layers.{i}."
        for name in "qkv":
            weights[f"{at}self_attn.{name}_proj.weight"] = layers["attn"][name][i].reshape(c.hidden_size, -1).T
        weights[f"{at}self_attn.o_proj.weight"] = layers["attn"]["o"][i].reshape(-1, c.hidden_size).T
        weights[f"{at}mlp.gate_proj.weight"] = layers["mlp"]["gate_up"][i, :, 0].T
        weights[f"{at}mlp.up_proj.weight"] = layers["mlp"]["gate_up"][i, :, 1].T
        weights[f"{at}mlp.down_proj.weight"] = layers["mlp"]["down"][i].T
        weights[f"{at}input_layernorm.weight"] = layers["attn_norm"]["scale"][i]
        weights[f"{at}post_attention_layernorm.weight"] = layers["mlp_norm"]["scale"][i]
    peer.load_state_dict({name: torch.from_numpy(np.array(w)) for name, w in weights.items()})
    return model, params, peer


def test_fifty_steps_equal_torch():
    """The same tiny Llama, weights, batches, AdamW with decay on matrices only, clipping, warm-up and cosine."""
    torch = pytest.importorskip("torch", reason="the peer of this test")
    config = settings()
    _, params, peer = llama_pair()
    _, state, step = start(config)
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
    schedule = make_schedule(config)
    random = np.random.default_rng(7)
    losses, peer_losses = [], []
    for number in range(50):
        tokens = random.integers(0, 12, (4, 16), dtype=np.int32)  # few tokens, so that there is something to learn
        state, metrics = step(state, {"tokens": jnp.asarray(tokens)})
        losses.append(float(metrics["loss"]))
        loss = peer(torch.from_numpy(tokens).long(), labels=torch.from_numpy(tokens).long()).loss
        theirs.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(peer.parameters(), o.gradient_clip_norm)
        for group in theirs.param_groups:
            group["lr"] = float(schedule(number))
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
        _, state, step = start(settings(gradient_accumulation_steps=parts))
        for _ in range(2):
            state, metrics = step(state, batch)
        results.append((state.params, metrics))
    for params, metrics in results[1:]:
        for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(results[0][0]), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)
        for name, value in metrics.items():
            np.testing.assert_allclose(value, results[0][1][name], rtol=1e-4, err_msg=name)


SCHEDULES = {
    "constant": (ScheduleConfig(name="constant", warmup_steps=4), lambda s: 1.0),
    "cosine": (
        ScheduleConfig(name="cosine", warmup_steps=4, final_ratio=0.2),
        lambda s: 0.2 + 0.8 * (1 + math.cos(math.pi * (s - 4) / 16)) / 2,
    ),
    "linear": (ScheduleConfig(name="linear", warmup_steps=4, final_ratio=0.5), lambda s: 1 - 0.5 * (s - 4) / 16),
    "wsd": (
        ScheduleConfig(name="wsd", warmup_steps=4, final_ratio=0.0, decay_steps=8),
        lambda s: 1.0 if s < 12 else 1 - (s - 12) / 8,
    ),
    "cosine_restarts": (
        ScheduleConfig(name="cosine_restarts", warmup_steps=4, final_ratio=0.0, cycles=2, cycle_decay=0.5),
        lambda s: 0.5 ** ((s - 4) // 8) * (1 + math.cos(math.pi * ((s - 4) % 8) / 8)) / 2,
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("parts", [1, 2])
def test_learning_rate_trace(name, parts):
    """By optimizer step, whatever the accumulation; the first step does learn, the warm-up ends at the peak."""
    schedule, expected = SCHEDULES[name]
    config = settings(steps=20, schedule=schedule, gradient_accumulation_steps=parts)
    _, state, step = start(config)
    batch = packed_batch()
    trace = []
    for _ in range(20):
        before = state
        state, metrics = step(state, batch)
        trace.append(float(metrics["learning_rate"]))
    wanted = [(s + 1) / 5 if s < 4 else expected(s) for s in range(20)]
    np.testing.assert_allclose(trace, 1e-2 * np.asarray(wanted), rtol=1e-4, atol=1e-8)
    counts = [int(x) for x in jax.tree.leaves(state.opt_state) if x.dtype == jnp.int32]
    assert counts and set(counts) <= {20}
    moved = np.abs(state.params["lm_head"]["kernel"] - before.params["lm_head"]["kernel"]).max()
    assert moved <= 1.5 * trace[-1]


def test_only_matrices_decay():
    config = settings(optimizer=OptimizerConfig(learning_rate=0.1, weight_decay=0.5, decay_embeddings=False))
    model = ByteTransformer(dataclasses.replace(MODEL, qk_norm=True, attention_bias=True))
    for name in ("adamw", "lion", "muon"):
        config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, name=name))
        optimizer = make_optimizer(config, model)
        params = jax.tree.map(jnp.ones_like, init_params(model, jax.random.key(0)))
        zero = jax.tree.map(jnp.zeros_like, params)
        updates, _ = jax.jit(optimizer.update)(zero, optimizer.init(params), params)
        layer = updates["layers"]["0"]
        moved = [layer["attn"][n] for n in "qkvo"] + [layer["mlp"]["gate_up"], layer["mlp"]["down"]]
        still = [updates["embed"]["embedding"], updates["lm_head"]["kernel"], updates["final_norm"]["scale"]]
        still += [layer["attn_norm"]["scale"], layer["attn"]["q_bias"], layer["attn"]["k_norm"]["scale"]]
        assert all(np.all(np.asarray(x) < 0) for x in moved), name
        assert all(np.all(np.asarray(x) == 0) for x in still), name


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_every_optimizer_learns(name):
    rate = {"adamw": 1e-2, "lion": 3e-3, "muon": 1e-2}[name]
    _, state, step = start(settings(optimizer=OptimizerConfig(name=name, learning_rate=rate)))
    losses = []
    for _ in range(40):
        state, metrics = step(state, packed_batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]


def test_muon_orthogonalises_matrices_per_layer():
    model = ByteTransformer(MODEL)
    config = settings(
        optimizer=OptimizerConfig(name="muon", learning_rate=1.0, weight_decay=0.0, gradient_clip_norm=None)
    )
    config = dataclasses.replace(config, schedule=ScheduleConfig(name="constant", warmup_steps=0))
    optimizer = make_optimizer(config, model)
    params = init_params(model, jax.random.key(0))
    grads = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), params)
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    for matrix in (
        updates["layers"]["0"]["attn"]["q"][1].reshape(32, 32),
        updates["layers"]["0"]["mlp"]["down"][0],
        updates["layers"]["0"]["mlp"]["gate_up"][0, :, 1],
    ):
        spectrum = np.linalg.svd(np.asarray(matrix), compute_uv=False)
        assert spectrum.max() / spectrum.min() < 2.5
    plain = np.linalg.svd(np.asarray(grads["layers"]["0"]["mlp"]["down"][0]), compute_uv=False)
    assert plain.max() / plain.min() > 2.5


def test_the_average_of_the_weights():
    _, state, step = start(settings(ema_decay=0.9))
    expected = state.params
    for _ in range(3):
        state, _ = step(state, packed_batch())
        expected = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, expected, state.params)
    for a, b in zip(jax.tree.leaves(state.ema), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_learned_rates_are_pulled_to_the_papers():
    """The loss grows by the weight times the mean squared distance, whatever the accumulation; the slope pulls back."""
    model = dataclasses.replace(MODEL, position_embedding="xpos", xpos_learnable=True)
    plain = settings(model=model)
    for parts in (1, 2):
        pulled = dataclasses.replace(plain, loss=LossConfig(xpos_regularization=0.5), gradient_accumulation_steps=parts)
        _, state, step = start(pulled)
        layer = state.params["layers"]["0"]["attn"]
        begin = layer["xpos_rate"]
        layer["xpos_rate"] = begin + 0.3
        batch = packed_batch()
        free = start(plain)[2](state, batch)[1]["loss"]
        found = step(state, batch)[1]["loss"]
        assert float(found) == pytest.approx(float(free) + 0.5 * 0.09, rel=1e-5)
        layer["xpos_rate"] = begin
        assert float(step(state, batch)[1]["loss"]) == pytest.approx(float(start(plain)[2](state, batch)[1]["loss"]))


@pytest.mark.parametrize("name", ["hidden_dropout", "residual_dropout", "attention_dropout", "drop_path"])
def test_each_kind_of_dropout_acts_in_a_step(name):
    plain = settings()
    _, state, step = start(plain)
    noisy = start(dataclasses.replace(plain, model=dataclasses.replace(MODEL, **{name: 0.9})))[2]
    batch = packed_batch()
    assert float(noisy(state, batch)[1]["loss"]) != float(step(state, batch)[1]["loss"])


def test_dropout_differs_by_step_and_part_and_repeats_with_the_seed():
    config = settings(
        model=dataclasses.replace(MODEL, hidden_dropout=0.3),
        gradient_accumulation_steps=2,
        optimizer=OptimizerConfig(learning_rate=1e-12, weight_decay=0.0),
    )
    half = {name: x[:2] for name, x in packed_batch().items()}
    batch = {name: np.concatenate([x, x]) for name, x in half.items()}
    _, state, step = start(config)
    first, metrics = step(state, batch)
    again = step(state, batch)[1]
    later = step(first, batch)[1]
    assert float(metrics["loss"]) == float(again["loss"]) != float(later["loss"])
    one_part = start(dataclasses.replace(config, gradient_accumulation_steps=1, global_batch_size=2))[2](state, half)[1]
    assert float(metrics["loss"]) != float(one_part["loss"])  # the second part drew other units


def test_validation_is_weighted_by_tokens():
    config = settings()
    model, state, _ = start(config)
    sizes = jnp.arange(MODEL.vocab_size, dtype=jnp.int32) % 4
    evaluate = jax.jit(make_eval_step(config, model, sizes))
    small, large = packed_batch(1), packed_batch(2)
    small["loss_mask"][1:] = False
    sums = [evaluate(state.params, b)[0] for b in (small, large)]
    total = {name: float(sums[0][name]) + float(sums[1][name]) for name in sums[0]}
    found = validation_metrics(total)
    nll, count, right, size = 0.0, 0, 0, 0
    for batch in (small, large):
        logits = model.apply(
            {"params": state.params},
            jnp.asarray(batch["tokens"]),
            positions=jnp.asarray(batch["positions"]),
            segment_ids=jnp.asarray(batch["segment_ids"]),
        )
        log_p = np.asarray(jax.nn.log_softmax(logits, axis=-1))
        for row, place in zip(*np.nonzero(batch["loss_mask"]), strict=True):
            if place == 0 or batch["segment_ids"][row, place] != batch["segment_ids"][row, place - 1]:
                continue
            target = batch["tokens"][row, place]
            nll -= log_p[row, place - 1, target]
            right += int(log_p[row, place - 1].argmax() == target)
            size += target % 4
            count += 1
    assert found["loss"] == pytest.approx(nll / count, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nll / count), rel=1e-5)
    assert found["accuracy"] == pytest.approx(right / count)
    assert found["bits_per_byte"] == pytest.approx(nll / math.log(2) / size, rel=1e-5)
    with pytest.raises(ValueError, match="no token to predict"):
        validation_metrics({**total, "tokens": 0.0})


def test_flops_equal_what_xla_counts():
    """Forward and backward of the compiled step, full attention; XLA adds the elementwise work."""
    model = ByteTransformer(dataclasses.replace(MODEL, hidden_size=128, intermediate_size=512, vocab_size=512))
    params = init_params(model, jax.random.key(0))
    batch = {"tokens": jnp.zeros((2, 32), jnp.int32)}
    slope = jax.jit(jax.grad(lambda p: batch_loss(model, p, batch, LossConfig())[0]))
    cost = slope.lower(params).compile().cost_analysis()
    if cost is None or "flops" not in cost:
        pytest.skip("this jax reports no cost")
    ours = flops_per_token(model.config, count_parameters(params), 32).full * 64
    # Loops are counted once: scale the body of the scan over depth by its two layers.
    assert 0.4 * ours < cost["flops"] < 1.2 * ours


def test_attention_is_counted_by_the_keys_that_tokens_see():
    """Causal: half a row on average; a window that is short for the row: the window; a memory: all of it."""
    L, width, row = MODEL.num_hidden_layers, MODEL.num_attention_heads * MODEL.head_size, 64

    def of_attention(**settings):
        config = dataclasses.replace(MODEL, **settings)
        none = flops_per_token(dataclasses.replace(MODEL, sliding_window=1), 10**6, row).causal - 12 * L * width
        return flops_per_token(config, 10**6, row).causal - none

    assert of_attention() == 12 * L * width * row / 2
    assert of_attention(sliding_window=4) == 12 * L * width * 4
    assert of_attention(memory={"length": 100}) == 12 * L * width * 100


def test_utilisation_by_both_conventions(monkeypatch):
    flops = flops_per_token(MODEL, 10**6, 16)
    assert "mfu" not in speed_metrics(1000, 2.0, flops)  # the peak of a CPU is not known
    monkeypatch.setattr(metrics, "peak_flops", lambda: 1e10)
    found = speed_metrics(1000, 2.0, flops)
    matrices = 6 * (10**6 - 67 * 32)
    attention = 6 * 2 * 16 * 32
    assert found["tokens_per_second"] == 500
    assert found["mfu"] == pytest.approx(500 * (matrices + attention) / 1e10)
    assert found["mfu_full_attention"] == pytest.approx(500 * (matrices + 2 * attention) / 1e10)
