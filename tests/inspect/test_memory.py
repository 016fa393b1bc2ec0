"""Bytes of training and caches, against real optimizer states, real caches, and what jax and a GPU report."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.grids import REPEATS
from helpers.training import settings
from helpers.variants import BASE, VARIANTS, weights_alone

from stellarbyte_jax.config import ByteConfig, LoRAConfig, LossConfig, OptimizerConfig, load
from stellarbyte_jax.inspect.activations import Cut, activation_bytes, activations_of, expert_rows
from stellarbyte_jax.inspect.memory import (
    CACHE_DTYPES,
    OPTIMIZERS,
    CacheGrowth,
    cache_bytes,
    cache_growth,
    optimizer_bytes,
    training_bytes,
    weight_bytes,
)
from stellarbyte_jax.model.decoder import ByteTransformer, param_shapes
from stellarbyte_jax.model.state.cache import make_cache
from stellarbyte_jax.model.trees import partition
from stellarbyte_jax.training.loss import batch_loss
from stellarbyte_jax.training.optimizer import make_optimizer

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    "variant",
    [
        "llama",
        "tied",
        "mixed windows, qk norm, bias",
        "deepnorm, learned xpos, padded vocabulary",
        "experts in every second layer, by context, priority and temperature",
        "a pool of experts, parallel, xpos",
    ],
)
def test_optimizers_hold_what_optax_makes(name, variant):
    model = ByteTransformer(dataclasses.replace(BASE, **VARIANTS[variant]))
    config = settings(optimizer=OptimizerConfig(name=name))
    for is_trainable in (lambda path: True, lambda path: "attn" in path):
        chosen = partition(param_shapes(model), lambda path, of=is_trainable: "tracked" not in path and of(path))[0]
        state = jax.eval_shape(make_optimizer(config, model, is_trainable).init, chosen)
        arrays = [x for x in jax.tree.leaves(state) if x.ndim > 0 and x.shape != (3,)]  # three coefficients of Muon's
        assert optimizer_bytes(model, name, is_trainable) == sum(x.size * x.dtype.itemsize for x in arrays)


def test_training_is_the_sum_of_its_parts():
    model = ByteTransformer(BASE)
    total = sum(leaf.size for leaf in jax.tree.leaves(param_shapes(model)))
    found = training_bytes(model, optimizer="lion", rows=3, length=16)
    assert (found.weights, found.gradients, found.optimizer, found.average) == (4 * total, 4 * total, 4 * total, 0)
    assert found.activations == activation_bytes(BASE, 3, 16)
    assert found.total == 12 * total + found.activations
    averaged = training_bytes(model, optimizer="lion", rows=3, length=16, average=True)
    assert averaged.total - found.total == averaged.average == 4 * total
    only_q = training_bytes(
        model, optimizer="adamw", rows=3, length=16, average=True, is_trainable=lambda p: p[-1] == "q"
    )
    q = 4 * 4 * 32 * 32
    assert (only_q.weights, only_q.gradients, only_q.optimizer, only_q.average) == (4 * total, q, 2 * q, q)


def test_weights_by_dtype():
    assert [weight_bytes(10, dtype) for dtype in ("float32", "bfloat16", "float16")] == [40, 20, 20]


@pytest.mark.parametrize(
    ("remat", "residual"),  # full keeps the inputs of layers, whatever is in them
    [
        ("dots", {}),
        ("dots", {"parallel_residual": True}),
        ("dots", {"residual_scaling": "deepnorm"}),
        ("full", {"residual_scaling": "deepnorm"}),
    ],
    ids=str,
)
def test_rematerialised_layers_keep_what_jax_keeps(remat, residual):
    """The residuals of the loss' vjp, of eight layers more and sixteen tokens more: what a layer keeps of a token."""

    def kept(layers, length):
        config = ByteConfig(
            vocab_size=64,
            hidden_size=128,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=384,
            attention_implementation="reference",
            remat=remat,
            **residual,
        )
        model = ByteTransformer(config)
        batch = {"tokens": jax.ShapeDtypeStruct((4, length), jnp.int32)}
        backward = jax.eval_shape(
            lambda p, b: jax.vjp(lambda p: batch_loss(model, p, b, LossConfig())[0], p)[1], param_shapes(model), batch
        )
        theirs = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(backward))
        return np.array([theirs, activation_bytes(config, 4, length)])

    theirs, ours = kept(16, 32) - kept(16, 16) - kept(8, 32) + kept(8, 16)
    assert ours == theirs


MOE = {"num_experts": 8, "intermediate_size": 48}
CONTEXT = {"gate": "context", "context_size": 6, "gate_intermediate_size": 10, "history_decay": 0.5}


@pytest.mark.parametrize(
    ("remat", "more"),
    [
        pytest.param("dots", {}, marks=REPEATS),
        ("dots", {"compute_dtype": "float32"}),
        ("dots", {"n_shared_experts": 2, "dispatch": "capacity", "first_k_dense_replace": 3}),
        ("full", {"n_shared_experts": 2, "dispatch": "capacity", "first_k_dense_replace": 3}),
        ("dots", {"noise": "noisy_topk", **CONTEXT}),
    ],
    ids=str,
)
def test_rematerialised_layers_with_experts_keep_what_jax_keeps(remat, more):
    dtype = more.get("compute_dtype", "bfloat16")
    moe = {name: value for name, value in more.items() if name != "compute_dtype"}

    def kept(layers, length):
        config = ByteConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=layers,
            num_attention_heads=4,
            attention_implementation="reference",
            remat=remat,
            compute_dtype=dtype,
            moe={**MOE, **moe},
        )
        model = ByteTransformer(config)
        batch = {"tokens": jax.ShapeDtypeStruct((4, length), jnp.int32)}

        def loss(params, batch):
            return batch_loss(model, params, batch, LossConfig(), dropout_key=jax.random.key(0), train=True)[0]

        backward = jax.eval_shape(lambda p, b: jax.vjp(lambda p: loss(p, b), p)[1], param_shapes(model), batch)
        theirs = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(backward))
        return np.array([theirs, activation_bytes(config, 4, length)])

    for short, long in ((8, 16), (64, 128)):  # products of routers in float32, and in parts
        theirs, ours = kept(16, long) - kept(16, short) - kept(8, long) + kept(8, short)
        assert ours == theirs


def test_rows_of_experts():
    """Pairs of tokens and experts, with what fills the last block of each expert, or with all slots."""
    config = dataclasses.replace(BASE, moe=MOE)
    assert expert_rows(config, 1024) == (2048 + 8 * 128, 16 + 8, False)
    assert expert_rows(config, 64) == (8 * 64, 0, False)  # every expert has room for all of so few
    kernels = dataclasses.replace(config, moe={**MOE, "implementation": "pallas"})
    assert expert_rows(kernels, 1023) == (2048, 0, True), "a multiple of 8, and no block to fill"
    assert expert_rows(kernels, 1024, devices=2) == (4096 // 2 * 9 // 8, 0, True)
    slots = dataclasses.replace(config, moe={**MOE, "dispatch": "capacity", "capacity_factor": 1.5})
    assert expert_rows(slots, 1024) == (8 * 384, 0, False)


@pytest.mark.parametrize(
    ("by_kernels", "changes", "moe"),
    [
        (True, {}, {}),
        (True, {"lora": LoRAConfig(r=2, target_modules=("q",))}, {}),
        (True, {"compute_dtype": "float32"}, {"implementation": "pallas"}),
        (False, {"compute_dtype": "float32"}, {}),
        (False, {"hidden_size": 96}, {}),
        (False, {}, {"intermediate_size": 96}),
        (False, {"lora": LoRAConfig(r=2, target_modules=("experts",))}, {}),
        (False, {}, {"implementation": "xla"}),
    ],
    ids=str,
)
def test_which_experts_kernels_compute(by_kernels, changes, moe):
    moe = {"num_experts": 4, "intermediate_size": 128, **moe}
    settings = {"hidden_size": 64, "num_attention_heads": 4, "compute_dtype": "bfloat16", **changes}
    assert expert_rows(ByteConfig(moe=moe, **settings), 64).by_kernels == by_kernels


def test_layers_with_experts_by_hand():
    """Two of four layers have them, in float32: rows through the experts, router, and copies of matrices."""
    D, F, E, N = 32, 48, 8, 1024
    dense = dataclasses.replace(BASE, vocab_size=8, remat="none")
    config = dataclasses.replace(dense, moe={**MOE, "n_shared_experts": 1, "decoder_sparse_step": 2})
    rows, blocks, _ = expert_rows(config, N)
    of_layer = 4 * (rows * (2 * D + 3 * F) + N * (3 * F + D + 2 * E) - N * 3 * BASE.mlp_size)
    copies = 2 * 4 * blocks * 2 * D * F
    assert activation_bytes(config, 4, 256) - activation_bytes(dense, 4, 256) == 2 * of_layer + copies
    again, plain = (activation_bytes(dataclasses.replace(c, remat="full"), 4, 256) for c in (config, dense))
    assert again - plain == of_layer + copies
    kernels = dataclasses.replace(config, moe={**dataclasses.asdict(config.moe), "implementation": "pallas"})
    pairs = N * config.moe.num_experts_per_tok  # none of their rows is empty
    kept, working = 4 * (pairs * 2 * F - rows * (2 * D + 3 * F)), 4 * pairs * (3 * D + 4 * F)
    assert activation_bytes(kernels, 4, 256) - activation_bytes(config, 4, 256) == 2 * kept + working - copies
    by_context = dataclasses.replace(config, moe={**dataclasses.asdict(config.moe), **CONTEXT})
    features = D + 6 + 3 + D
    assert activation_bytes(by_context, 4, 256) - activation_bytes(config, 4, 256) == 2 * N * 4 * (
        3 * features + 5 * 10 + 6
    )


def test_what_routers_keep_takes_no_memory_of_training():
    """No weights, so neither gradients nor states of an optimizer."""
    model = ByteTransformer(dataclasses.replace(BASE, **VARIANTS["experts"]))
    weights = 4 * sum(x.size for x in jax.tree.leaves(weights_alone(model, param_shapes(model))))
    found = training_bytes(model, optimizer="adamw", rows=1, length=8, average=True)
    assert (found.weights, found.gradients, found.optimizer, found.average) == (
        weights,
        weights,
        2 * weights,
        weights,
    )


def test_a_training_step_takes_what_a_gpu_reported():
    """The peak that scripts/benchmark.py measured of configs/pretrain.py on an H100, all rows at once."""
    measured = json.loads((ROOT / "benchmarks" / "train.json").read_text())
    assert measured["config"] == {"file": "configs/pretrain.py", "set": []}
    run = load(ROOT / "configs" / "pretrain.py")
    found = training_bytes(ByteTransformer(run.model), optimizer="adamw", rows=32, length=1024)
    assert found.total / 2**30 == pytest.approx(measured["results"]["synthetic"]["peak_memory_gib"], rel=0.1)


@pytest.mark.parametrize(("rows", "length", "tokens"), [(3, 15, 3 * 15), (4, 15, 2 * 15), (3, 16, 3 * 8)])
def test_tensor_cuts_the_stream_by_rows_or_by_positions(rows, length, tokens):
    """With each layer made again, what it keeps is its input."""
    again = dataclasses.replace(BASE, remat="full")
    deeper = dataclasses.replace(again, num_hidden_layers=again.num_hidden_layers + 1)
    more, less = (activations_of(config, rows, length, Cut(tensor=2)).kept for config in (deeper, again))
    assert more - less == 4 * tokens * BASE.hidden_size


def test_activations_grow_with_tokens_and_memory():
    small = dataclasses.replace(BASE, vocab_size=8)
    assert activation_bytes(small, 2, 64) == 2 * activation_bytes(small, 1, 64) == 4 * activation_bytes(small, 1, 32)
    remembering = dataclasses.replace(small, memory={"length": (0, 10, 0, 20)})
    more = activation_bytes(remembering, 3, 16) - activation_bytes(small, 3, 16)
    assert more == 3 * 30 * 4 * (32 + 2 * 2 * 8)


CACHES = {
    "full": {},
    "window": {"sliding_window": 7},
    "window and sinks": {"sliding_window": 7, "sink_tokens": 2},
    "mixed": {"sliding_window": 7, "layer_types": ("sliding_attention", "full_attention") * 2},
    "pruned": {"cache": {"recent": 4, "heavy_hitters": 3}},
    "memory": {"memory": {"length": (0, 6, 6, 6), "recent_share": 0.5}},
}


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("dtype", ["compute", *CACHE_DTYPES])
def test_caches_have_the_bytes_of_real_ones(kind, dtype):
    config = dataclasses.replace(BASE, compute_dtype="bfloat16", **CACHES[kind])
    cache = dataclasses.replace(config.cache, dtype=dtype)
    for batch_size, length in ((1, 5), (3, 40)):
        real = make_cache(dataclasses.replace(config, cache=cache), batch_size, length)
        assert cache_bytes(config, batch_size, length, dtype) == real.nbytes


def test_how_caches_grow():
    """Keys and values of two heads of 8 numbers in each layer, with one float32 scale each where they are 8 bits."""
    bfloat16, int8 = 2 * 2 * 8 * 2, 2 * 2 * (8 + 4)

    def grown(kind, dtype):
        return cache_growth(dataclasses.replace(BASE, **CACHES[kind]), dtype)

    assert grown("full", "bfloat16") == CacheGrowth(4 * bfloat16, 4 * bfloat16)
    assert grown("full", "int8") == grown("full", "float8_e4m3fn") == CacheGrowth(4 * int8, 4 * int8)
    assert grown("mixed", "bfloat16") == CacheGrowth(4 * bfloat16, 2 * bfloat16)
    assert grown("window", "int8") == CacheGrowth(4 * int8, 0)
    assert grown("pruned", "bfloat16") == CacheGrowth(0, 0)
