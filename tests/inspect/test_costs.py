"""Parameters by part and operations a token, against trees of arrays, arithmetic by hand and XLA's own count."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.training import MODEL, flat, nested
from helpers.variants import BASE, VARIANTS, call, make

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.inspect.costs import count_parameters, flops_per_token, parameter_counts
from stellarbyte_jax.model.decoder import ByteTransformer, forward, logits, param_shapes
from stellarbyte_jax.model.io import Inputs


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_weight_is_counted_once(variant):
    model = ByteTransformer(dataclasses.replace(BASE, **VARIANTS[variant]))
    counts = parameter_counts(model)
    params = nested({path: x for path, x in flat(param_shapes(model)).items() if "/tracked/" not in path})
    assert counts.total == counts.trainable == sum(leaf.size for leaf in jax.tree.leaves(params))
    stacks = params["layers"]
    layers = [
        sum(math.prod(leaf.shape[1:]) for leaf in jax.tree.leaves(stacks[str(stack)]))
        for stack, _ in model.config.layer_places
    ]
    assert [sum(parts.values()) for parts in counts.layers] == layers
    assert counts.total == sum(layers) + sum(counts.outside.values())
    pool = sum(leaf.size for leaf in jax.tree.leaves(stacks.get("pool", {})))
    assert counts.outside.get("experts", 0) == pool
    if not model.config.moe.num_experts:
        assert counts.active == counts.total


@pytest.mark.parametrize("variant", ["experts", "a dense layer, experts by sigmoid in groups, one shared, windows"])
def test_active_weights_are_those_that_one_token_feels(variant):
    """By the gradient of one token's logits: which experts of which layers have any."""
    model, params = make(variant)
    tokens_BT = jax.device_put(np.asarray([[5]], np.int32))
    felt = jax.jit(jax.grad(lambda params: jnp.sum(call(model, params, Inputs(tokens_BT))[0] ** 2)))(params)
    active = 0
    for path, x in flat(felt).items():
        if "/experts/" in path:
            active += int(np.any(np.asarray(x) != 0, axis=tuple(range(2, x.ndim))).sum()) * math.prod(x.shape[2:])
        elif "/tracked/" not in path:
            active += x.size
    counts = parameter_counts(model)
    assert counts.active == active < counts.total


def test_parts_of_layers_with_experts_by_hand():
    """One dense layer, two with six experts, of which a token has two, and one of theirs for all."""
    D, F, E = 32, 24, 6
    moe = {"num_experts": E, "intermediate_size": F, "n_shared_experts": 2, "first_k_dense_replace": 2}
    counts = parameter_counts(ByteTransformer(dataclasses.replace(BASE, moe=moe)))
    attention, norms = 2 * D * 32 + 2 * D * 16, 2 * D
    dense = {"attention": attention, "mlp": 3 * D * 48, "norms": norms}
    sparse = {"router": D * E, "experts": E * 3 * D * F, "shared_experts": 2 * 3 * D * F}
    sparse |= {"attention": attention, "norms": norms}
    assert [dict(parts) for parts in counts.layers] == [dense, dense, sparse, sparse]
    assert counts.total - counts.active == 2 * (E - 2) * 3 * D * F
    parts = ("embedding", "attention", "mlp", "router", "experts", "shared_experts", "norms", "head")
    assert tuple(counts.parts) == parts


def test_a_pool_is_stored_once_and_used_by_each_layer():
    moe = {"num_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 24, "shared_pool": True}
    found = {}
    for layers in (1, 4):
        model = ByteTransformer(dataclasses.replace(BASE, num_hidden_layers=layers, moe=moe))
        found[layers] = parameter_counts(model)
        assert found[layers].outside["experts"] == 8 * 3 * 32 * 24
        assert not any("experts" in layer for layer in found[layers].layers)
    one, four, expert = found[1], found[4], 3 * 32 * 24
    assert one.active == one.total - 5 * expert and four.active == four.total - 8 * expert + 4 * 3 * expert


@pytest.mark.parametrize("pool", [False, True])
def test_the_forward_pass_of_experts_is_what_xla_counts(pool):
    """With slots for exactly the fair share, so that experts compute as many rows as there are choices."""
    moe = {"num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 512, "shared_pool": pool}
    moe |= {"dispatch": "capacity", "capacity_factor": 1.0, "overflow": (), "min_capacity": 1}
    config = ByteConfig(
        hidden_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=384,
        vocab_size=1024,
        compute_dtype="float32",
        attention_implementation="reference",
        scan_unroll=None,
        moe={**moe, "n_shared_experts": 1, "first_k_dense_replace": 1},
    )
    model = ByteTransformer(config)

    def run(params, tokens_BT):
        return logits(model, params, forward(model, params, Inputs(tokens_BT), train=True).hidden_BTD)

    tokens_BT = jax.ShapeDtypeStruct((2, 64), jnp.int32)
    cost = jax.jit(run).lower(param_shapes(model), tokens_BT).compile().cost_analysis()
    if cost is None or "flops" not in cost:
        pytest.skip("this jax reports no cost")
    ours = flops_per_token(config, parameter_counts(model).active, 64).forward.full * 2 * 64
    assert ours == pytest.approx(cost["flops"], rel=0.04)


def test_parts_by_hand():
    """768 x 12 with grouped queries, norms of heads, biases, LayerScale, a padded vocabulary and an untied head."""
    D, L, N, K, H, F, V = 768, 3, 12, 4, 64, 2048, 1024
    config = ByteConfig(
        vocab_size=1000,
        vocab_size_multiple=64,
        hidden_size=D,
        num_hidden_layers=L,
        num_attention_heads=N,
        num_key_value_heads=K,
        intermediate_size=F,
        qk_norm=True,
        attention_bias=True,
        layer_scale_init=0.1,
    )
    counts = parameter_counts(ByteTransformer(config))
    layer = {
        "attention": 2 * D * N * H + 2 * D * K * H + N * H + 2 * K * H,
        "mlp": 3 * D * F,
        "norms": 2 * D + 2 * H,
        "other": 2 * D,
    }
    assert [dict(parts) for parts in counts.layers] == [layer] * L
    assert dict(counts.outside) == {"embedding": V * D, "norms": D, "head": V * D}
    assert counts.parts == {
        "embedding": V * D,
        "attention": L * layer["attention"],
        "mlp": L * layer["mlp"],
        "norms": L * layer["norms"] + D,
        "head": V * D,
        "other": L * layer["other"],
    }
    tied = parameter_counts(ByteTransformer(dataclasses.replace(config, tie_word_embeddings=True)))
    assert "head" not in tied.parts and tied.total == counts.total - V * D


def test_the_norm_inside_of_an_mlp_and_learned_rates():
    counts = parameter_counts(ByteTransformer(dataclasses.replace(BASE, **VARIANTS["the original's own"])))
    D, H, F, N, K = 32, 8, 48, 4, 2
    rates = H // 2
    attention = 2 * D * N * H + 2 * D * K * H + rates
    assert dict(counts.layers[0]) == {"attention": attention, "mlp": 3 * D * F, "norms": 3 * D}


def test_trainable_weights_are_those_of_the_predicate():
    model = ByteTransformer(BASE)
    counts = parameter_counts(model, lambda path: path[-1] == "q")
    assert counts.trainable == 4 * 32 * 32 and counts.total == count_parameters(param_shapes(model))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 2, "head_dim": 48},
        {"vocab_size": 500, "vocab_size_multiple": 64, "parallel_residual": True},
        {"num_hidden_layers": 5, "layer_types": ("full_attention",) * 5},
    ],
)
def test_the_forward_pass_is_what_xla_counts(changes):
    """Full attention, layers unrolled, because XLA counts a loop once; elementwise work is a few percent."""
    base = dict(hidden_size=256, num_hidden_layers=2, num_attention_heads=4, intermediate_size=768, vocab_size=1024)
    more = {"compute_dtype": "float32", "attention_implementation": "reference", "scan_unroll": None}
    model = ByteTransformer(ByteConfig(**{**base, **more, **changes}))
    shapes = param_shapes(model)
    tokens_BT = jax.ShapeDtypeStruct((2, 64), jnp.int32)

    def run(params, tokens_BT):
        return logits(model, params, forward(model, params, Inputs(tokens_BT)).hidden_BTD)

    cost = jax.jit(run).lower(shapes, tokens_BT).compile().cost_analysis()
    if cost is None or "flops" not in cost:
        pytest.skip("this jax reports no cost")
    ours = flops_per_token(model.config, count_parameters(shapes), 64).forward.full * 2 * 64
    assert ours == pytest.approx(cost["flops"], rel=0.04)


def test_a_training_step_is_three_forward_passes():
    flops = flops_per_token(MODEL, 10**6, 16)
    assert (3 * flops.forward.causal, 3 * flops.forward.full) == (flops.causal, flops.full)


def test_weights_are_counted_without_the_look_up():
    """An untied embedding multiplies nothing; a tied one is the head. Six operations for each weight and token."""
    attention = flops_per_token(MODEL, 0, 16).full + 6 * 67 * 32
    assert flops_per_token(MODEL, 10**6, 16).full - attention == 6 * (10**6 - 67 * 32)
    tied = dataclasses.replace(MODEL, tie_word_embeddings=True)
    assert flops_per_token(tied, 10**6, 16).full - attention == 6 * 10**6
    by_context = {"num_experts": 4, "gate": "context", "context_size": 6, "mlp_only_layers": (0,)}
    gated = dataclasses.replace(MODEL, moe=by_context)  # its gate looks positions up
    assert flops_per_token(gated, 10**6, 16).full - attention == 6 * (10**6 - 67 * 32 - 32 * 3)
    padded = dataclasses.replace(MODEL, vocab_size_multiple=64)  # the head is computed for the padding too
    assert flops_per_token(padded, 10**6, 16).full - attention == 6 * (10**6 - 128 * 32)


def test_attention_is_counted_by_the_keys_that_tokens_see():
    """Causal: half a row on average; a window that is short for the row: the window; a memory: all of it."""
    L, width, row = MODEL.num_hidden_layers, MODEL.num_attention_heads * MODEL.head_size, 64
    weights = 6 * (10**6 - 67 * 32)

    def of_attention(**settings):
        found = flops_per_token(dataclasses.replace(MODEL, **settings), 10**6, row)
        assert found.full - weights == 2 * (found.causal - weights)
        return found.causal - weights

    assert of_attention() == 12 * L * width * row / 2
    assert of_attention(sliding_window=4) == 12 * L * width * 4
    assert of_attention(sliding_window=1000) == of_attention()
    assert of_attention(memory={"length": 100}) == 12 * L * width * 100
    assert of_attention(memory={"length": 100, "recent_share": 0.5}) == 12 * L * width * 100
    assert of_attention(memory={"length": (0, 100)}) == 12 * width * (row / 2 + 100)


def test_counting_makes_no_arrays():
    """A model of 10^12 weights is counted as fast as a small one."""
    config = ByteConfig(hidden_size=65536, num_hidden_layers=20, num_attention_heads=512, intermediate_size=2**18)
    total = parameter_counts(ByteTransformer(config)).total
    assert total == 20 * (4 * 65536**2 + 3 * 65536 * 2**18 + 2 * 65536) + 2 * 32000 * 65536 + 65536
    assert math.log10(total) > 12
