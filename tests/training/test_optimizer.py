"""Is each update the one of its paper? Two steps of every optimizer on every kind of weight, against numpy."""

import dataclasses
import itertools

import jax
import numpy as np
import optax
import pytest
from helpers.training import assert_close, first_state, flat, nested, packed_batch, settings
from helpers.update_rules import AdamW, Lion, Muon, clipped, each_matrix
from helpers.variants import BASE, VARIANTS

from stellarbyte_jax.config import ByteConfig, LossConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from stellarbyte_jax.model.decoder import ByteTransformer, param_shapes
from stellarbyte_jax.model.trees import paths
from stellarbyte_jax.training.loss import batch_loss
from stellarbyte_jax.training.optimizer import make_optimizer

EVERY_KIND = ByteConfig(
    vocab_size=11,
    hidden_size=8,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    intermediate_size=6,
    max_position_embeddings=32,
    compute_dtype="float32",
    qk_norm=True,
    attention_bias=True,
    attention_output_bias=True,
    mlp_bias=True,
    layer_scale_init=0.5,
    position_embedding="xpos",
    xpos_learnable=True,
)
# Batch, row and column dimensions of each stack of hidden matrices.
HIDDEN = {
    "layers/0/attn/q": ((0,), (1,), (2, 3)),
    "layers/0/attn/k": ((0,), (1,), (2, 3)),
    "layers/0/attn/v": ((0,), (1,), (2, 3)),
    "layers/0/attn/o": ((0,), (1, 2), (3,)),
    "layers/0/mlp/gate_up": ((0, 2), (1,), (3,)),
    "layers/0/mlp/down": ((0,), (1,), (2,)),
}
OTHERS = {
    "embed/embedding",
    "final_norm/scale",
    "lm_head/kernel",
    "layers/0/attn_norm/scale",
    "layers/0/attn_scale",
    "layers/0/mlp_norm/scale",
    "layers/0/mlp_scale",
    "layers/0/mlp/down_bias",
    "layers/0/mlp/gate_up_bias",
    "layers/0/attn/xpos_rate",
    "layers/0/attn/q_norm/scale",
    "layers/0/attn/k_norm/scale",
    *(f"layers/0/attn/{name}_bias" for name in "qkvo"),
}
RATES = (0.1, 0.2)  # of the first two steps: a third and two thirds of the peak


def run_config(**optimizer) -> TrainConfig:
    common = {"learning_rate": 0.3, "b1": 0.8, "b2": 0.6, "eps": 1e-3, "weight_decay": 0.25, "gradient_clip_norm": None}
    return settings(optimizer=OptimizerConfig(**{**common, **optimizer}), schedule=ScheduleConfig(warmup_steps=2))


def random_weights(model, seed):
    """Of all that gradients reach."""
    random = np.random.default_rng(seed)
    shapes = {path: x.shape for path, x in flat(param_shapes(model)).items() if "/tracked/" not in path}
    return {path: random.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}


def two_steps(config, rule=None, **network):
    """Weights after each of two steps with random gradients: the optimizer's, and those of a rule in numpy."""
    model = ByteTransformer(dataclasses.replace(EVERY_KIND, **network))
    optimizer = make_optimizer(config, model)
    start, *grads = (random_weights(model, seed) for seed in range(3))
    params, state = nested(start), optimizer.init(nested(start))

    @jax.jit
    def update(grad, state, params):
        updates, state = optimizer.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    found, expected = [], []
    for rate, grad in zip(RATES, grads, strict=True):
        params, state = update(nested(grad), state, params)
        found.append(params)
        if rule is not None:
            start = rule.step(start, grad, rate)
            expected.append(start)
    return found, expected


def check(found, expected, **tolerance):
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, nested(theirs), **tolerance)


def decayed_of(tied, decay_embeddings):
    decayed = set(HIDDEN)
    if not tied:
        decayed.add("lm_head/kernel")
    return decayed | ({"embed/embedding"} if decay_embeddings else set())


def test_the_kinds_of_weights_are_all_there():
    assert set(flat(param_shapes(ByteTransformer(EVERY_KIND)))) == set(HIDDEN) | OTHERS


@pytest.mark.parametrize(("tied", "decay_embeddings"), list(itertools.product([False, True], repeat=2)))
def test_adamw(tied, decay_embeddings):
    """Only matrices decay. Without ``decay_embeddings`` embeddings do not, tied ones included; an untied head does."""
    rule = AdamW(0.8, 0.6, 1e-3, 0.25, decayed_of(tied, decay_embeddings))
    config = run_config(name="adamw", decay_embeddings=decay_embeddings)
    check(*two_steps(config, rule, tie_word_embeddings=tied), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("tied", "decay_embeddings"), [(False, True), (True, False)])
def test_lion(tied, decay_embeddings):
    rule = Lion(0.8, 0.6, 0.25, decayed_of(tied, decay_embeddings))
    config = run_config(name="lion", eps=OptimizerConfig().eps, decay_embeddings=decay_embeddings)
    check(*two_steps(config, rule, tie_word_embeddings=tied), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("tied", "decay_embeddings"), [(False, True), (True, False)])
def test_muon(tied, decay_embeddings):
    """Each layer's matrices, gate and up on their own; AdamW with Nesterov momentum for everything else."""
    rule = Muon(HIDDEN, AdamW(0.8, 0.6, 1e-3, 0.25, decayed_of(tied, decay_embeddings), nesterov=True))
    config = run_config(name="muon", decay_embeddings=decay_embeddings)
    check(*two_steps(config, rule, tie_word_embeddings=tied), rtol=1e-4, atol=2e-5)


# Layers whose MLPs are experts, in a network with everything that a router may have.
ROUTED = {
    "mlp_bias": False,
    "moe": {
        "num_experts": 3,
        "intermediate_size": 6,
        "n_shared_experts": 1,
        "gate": "context",
        "context_size": 4,
        "gate_intermediate_size": 5,
        "history_decay": 0.5,
        "noise": "noisy_topk",
        "adaptive_temperature": True,
    },
}
_ROUTER = "layers/0/moe/router"
OF_EXPERTS = {
    **{path: dims for path, dims in HIDDEN.items() if "/mlp/" not in path},
    "layers/0/moe/experts/gate_up": ((0, 1, 3), (2,), (4,)),
    "layers/0/moe/experts/down": ((0, 1), (2,), (3,)),
    "layers/0/moe/shared/gate_up": ((0, 2), (1,), (3,)),
    "layers/0/moe/shared/down": ((0,), (1,), (2,)),
}
OF_ROUTERS = {
    f"{_ROUTER}/{name}" for name in ("kernel", "noise", "context_in", "context_out", "mlp_gate", "mlp_up", "mlp_down")
}


def decayed_with_experts(decay_embeddings):
    """Matrices, and tables where they are asked for: no norm, no temperature."""
    tables = {"embed/embedding", f"{_ROUTER}/position"} if decay_embeddings else set()
    return {*OF_EXPERTS, *OF_ROUTERS, "lm_head/kernel", *tables}


def test_the_kinds_of_weights_of_a_router_are_all_there():
    model = ByteTransformer(dataclasses.replace(EVERY_KIND, **ROUTED))
    others = {path for path in OTHERS if "/mlp/" not in path}
    beside = {f"{_ROUTER}/{name}" for name in ("position", "temperature", "norm/scale")}
    assert set(random_weights(model, 0)) == set(OF_EXPERTS) | OF_ROUTERS | others | beside


@pytest.mark.parametrize("decay_embeddings", [False, True])
def test_adamw_of_experts_and_routers(decay_embeddings):
    """Matrices of experts, routers and gates decay; norms and the temperature do not, nor what gates look up."""
    rule = AdamW(0.8, 0.6, 1e-3, 0.25, decayed_with_experts(decay_embeddings))
    config = run_config(name="adamw", decay_embeddings=decay_embeddings)
    check(*two_steps(config, rule, **ROUTED), rtol=1e-5, atol=1e-6)


def test_muon_orthogonalises_each_expert_on_its_own():
    """Gate and up of each expert apart, and shared ones; everything of routers and gates takes AdamW."""
    rule = Muon(OF_EXPERTS, AdamW(0.8, 0.6, 1e-3, 0.25, decayed_with_experts(True), nesterov=True))
    check(*two_steps(run_config(name="muon"), rule, **ROUTED), rtol=1e-4, atol=2e-5)


def test_muon_orthogonalises_each_expert_of_a_pool_on_its_own():
    experts = {"layers/pool/gate_up": ((0, 2), (1,), (3,)), "layers/pool/down": ((0,), (1,), (2,))}
    matrices = {**experts, **{path: dims for path, dims in HIDDEN.items() if "/mlp/" not in path}}
    decayed = {*matrices, f"{_ROUTER}/kernel", "lm_head/kernel", "embed/embedding"}
    network = {"mlp_bias": False, "moe": {"num_experts": 3, "intermediate_size": 6, "shared_pool": True}}
    rule = Muon(matrices, AdamW(0.8, 0.6, 1e-3, 0.25, decayed, nesterov=True))
    check(*two_steps(run_config(name="muon"), rule, **network), rtol=1e-4, atol=2e-5)


def updates_of(model, weights, grads, rules):
    """The first update of each of these optimizers, and what it keeps then; all in one program."""
    made = [make_optimizer(settings(model=model.config, optimizer=rule), model) for rule in rules]

    @jax.jit
    def run(weights, grads):
        return [optimizer.update(grads, optimizer.init(weights), weights) for optimizer in made]

    return run(nested(weights), nested(grads))


@pytest.mark.parametrize("variant", [name for name, changes in VARIANTS.items() if "moe" in changes])
def test_every_optimizer_takes_a_step_of_layers_with_experts(variant):
    """With finite numbers and other weights; what routers keep is none of the optimizer's."""
    model = ByteTransformer(dataclasses.replace(BASE, **VARIANTS[variant]))
    weights, grads = (random_weights(model, seed) for seed in range(2))
    names = ("adamw", "lion", "muon")
    found = updates_of(model, weights, grads, [OptimizerConfig(name=name) for name in names])
    for name, (updates, state) in zip(names, found, strict=True):
        assert not any("tracked" in path for path in paths(state)), name
        assert flat(updates).keys() == weights.keys()
        for path, update in flat(updates).items():
            assert np.isfinite(update).all() and np.any(np.asarray(update) != 0), (name, path)


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_routers_may_learn_at_a_rate_of_their_own(name):
    """Their updates alone are smaller, with what the optimizer keeps as it was."""
    model = ByteTransformer(dataclasses.replace(EVERY_KIND, **ROUTED))
    weights, grads = (random_weights(model, seed) for seed in range(2))
    rules = [OptimizerConfig(name=name, router_learning_rate_ratio=ratio) for ratio in (1.0, 0.25)]
    (plain, kept), (slow, still_kept) = updates_of(model, weights, grads, rules)
    jax.tree.map(np.testing.assert_array_equal, still_kept, kept)
    routers = 0
    for path, update in flat(plain).items():
        of_router = "/router/" in path
        routers += of_router
        np.testing.assert_allclose(flat(slow)[path], (0.25 if of_router else 1) * update, rtol=1e-5, err_msg=path)
    assert routers >= 8 and routers < len(flat(plain))


def test_muon_steps_are_nearly_orthogonal():
    """Singular values close to each other, and the root mean square that AdamW's steps usually have, 0.2."""
    (first, _), _ = two_steps(run_config(name="muon", weight_decay=0.0))
    model = ByteTransformer(EVERY_KIND)
    weights, grads = random_weights(model, 0), random_weights(model, 1)

    def spread(matrix):
        spectrum = np.linalg.svd(matrix, compute_uv=False)
        return spectrum.max() / spectrum.min()

    for path, dims in HIDDEN.items():
        moved = (flat(first)[path] - weights[path]) / RATES[0]
        ratios, plain = [], []
        each_matrix(moved, *dims, lambda matrix, to=ratios: to.append(spread(matrix)) or matrix)
        each_matrix(grads[path], *dims, lambda matrix, to=plain: to.append(spread(matrix)) or matrix)
        assert max(ratios) < 2.5 < max(plain), path
        assert 0.7 * 0.2 < np.sqrt(np.mean(moved**2)) < 1.2 * 0.2, path


def test_gradients_are_clipped_by_their_norm_together():
    """A large eps makes AdamW's step depend on the gradient's size; the first gradient is over the limit."""
    model = ByteTransformer(EVERY_KIND)
    config = run_config(name="adamw", eps=1.0)
    sizes = [np.sqrt(sum(np.sum(g**2) for g in random_weights(model, seed).values())) for seed in (1, 2)]
    limit = float(np.mean(sizes))
    assert min(sizes) < limit < max(sizes)  # one of them is clipped
    rule = AdamW(0.8, 0.6, 1.0, 0.25, decayed_of(tied=False, decay_embeddings=True))
    plain_step = rule.step
    rule.step = lambda weights, grads, rate: plain_step(weights, clipped(grads, limit), rate)
    clipping = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, gradient_clip_norm=limit))
    check(*two_steps(clipping, rule), rtol=1e-5, atol=1e-6)


def test_every_optimizer_learns():
    config, batch = settings(), {name: jax.numpy.asarray(x) for name, x in packed_batch().items()}
    model = ByteTransformer(config.model)

    @jax.jit
    @jax.value_and_grad
    def slopes(params):
        total, sums, _ = batch_loss(model, params, batch, LossConfig())
        return total / sums["tokens"]

    for name, rate in {"adamw": 1e-2, "lion": 3e-3, "muon": 1e-2}.items():
        rule = dataclasses.replace(config, optimizer=OptimizerConfig(name=name, learning_rate=rate))
        optimizer = make_optimizer(rule, model)
        params, update = first_state(config).params, jax.jit(optimizer.update)
        state, losses = optimizer.init(params), []
        for _ in range(40):
            loss, grads = slopes(params)
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
            losses.append(float(loss))
        assert losses[-1] < 0.5 * losses[0], name
