"""Training of adapters: what a step costs, keeps and changes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.adapters import learnt
from helpers.plans import H100
from helpers.training import MODEL, RECORDER, compiled_step, first_state, flat, packed_batch, settings

from stellarbyte_jax.config import DataConfig, OptimizerConfig
from stellarbyte_jax.inspect.costs import flops_per_token, parameter_counts
from stellarbyte_jax.inspect.memory import training_bytes
from stellarbyte_jax.lora import mean_square_change, split
from stellarbyte_jax.model.decoder import ByteTransformer, param_shapes
from stellarbyte_jax.model.trees import partition
from stellarbyte_jax.training.optimizer import make_optimizer
from stellarbyte_jax.training.plan import Planner, bytes_of
from stellarbyte_jax.training.state import state_shapes
from stellarbyte_jax.training.step import make_train_step

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 48, "n_shared_experts": 1}
ALL = ("all-linear", "head", "embed")


def config_of(lora, model=None, **changes):
    lora = {"r": 2, **lora} if lora is not None else {}
    return settings(model=dataclasses.replace(model or MODEL, lora=lora), ema_decay=0.9, **changes)


def begun(config):
    """The first state with adapters that have learnt something."""
    state = first_state(config)
    adapters, _ = split(state.weights)
    moved = flat(partition(learnt(adapters), lambda path: not path[-1].endswith("_scale"))[0])
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: moved.get("/".join(key.key for key in path), x), state.params
    )
    return state.replace(params=params, ema=params)


def cost_of(model, lora):
    """FLOPs of a step with wide layers, and bytes of what it is given and of its temporaries."""
    network = dataclasses.replace(MODEL, vocab_size=512, hidden_size=64, scan_unroll=None, **model)
    config = dataclasses.replace(config_of(lora, network), ema_decay=None)
    model, optimizer = ByteTransformer(config.model), RECORDER
    shapes = state_shapes(config, model, optimizer)
    batch = {"tokens": jax.ShapeDtypeStruct((4, 32), jnp.int32)}
    step = jax.jit(make_train_step(config, model, optimizer, lambda _: 0.0), donate_argnums=0)
    compiled = step.lower(shapes, batch).compile()
    memory = compiled.memory_analysis()
    return compiled.cost_analysis()["flops"], memory.temp_size_in_bytes


@pytest.mark.parametrize(
    ("model", "targets"),
    [
        ({"num_hidden_layers": 1}, ALL),
        pytest.param(
            {"num_hidden_layers": 1, "moe": MOE}, ("experts", "router", "embed", "head"), marks=pytest.mark.slow
        ),
    ],
)
def test_no_gradient_of_the_base_is_computed_or_held(model, targets):
    """A step lacks the products that gradients of weights are, two in six, and their float32 arrays."""
    full, full_bytes = cost_of(model, None)
    found, found_bytes = cost_of(model, {"r": 1, "target_modules": targets})
    frozen = sum(x.size for x in jax.tree.leaves(param_shapes(ByteTransformer(dataclasses.replace(MODEL, **model)))))
    assert found < 0.8 * full
    assert found_bytes < full_bytes - 3 * frozen


def test_operations_are_counted_without_gradients_of_the_base():
    plain = flops_per_token(MODEL, parameter_counts(ByteTransformer(MODEL)).active, 16)
    config = config_of({"r": 1, "target_modules": ("q",)}).model
    counts = parameter_counts(ByteTransformer(config))
    found = flops_per_token(config, counts.active, 16)
    matrices = sum(x.size for path, x in flat(param_shapes(ByteTransformer(MODEL))).items() if "norm" not in path)
    matrices -= MODEL.vocab_size * MODEL.hidden_size
    adapters = 2 * (32 + 32)
    assert counts.trainable == adapters and counts.total == parameter_counts(ByteTransformer(MODEL)).total + adapters
    norms = 5 * 32  # which are counted as if they were products
    assert plain.causal - found.causal == 2 * (matrices + norms) - 6 * adapters
    assert found.forward.causal == plain.forward.causal + 2 * adapters


def test_a_plan_has_a_frozen_base_and_no_gradients_of_it():
    """Bytes of the state are those of a run; with ``fsdp`` the base is gathered as other weights are."""
    config = config_of({"target_modules": ALL, "base_dtype": "bfloat16"}, data=DataConfig(sequence_length=16))
    model = ByteTransformer(config.model)
    shapes = state_shapes(config, model, make_optimizer(config, model))
    planner, sizes = Planner(config, H100), dict.fromkeys(("data", "fsdp", "expert", "context", "tensor"), 1)
    held = planner.plan(sizes)
    factors = sum(x.size * 4 for path, x in flat(shapes.frozen).items() if path.endswith("_scale"))
    assert held.bytes.weights == bytes_of(shapes.params) + bytes_of(shapes.frozen) - factors
    assert held.bytes.gradients == bytes_of(shapes.params)
    # More than of the same model without adapters, as they are gathered too.
    split = [
        each.plan({**sizes, "fsdp": 2}) for each in (planner, Planner(dataclasses.replace(config, model=MODEL), H100))
    ]
    with_base, plain = ([each.sent for each in plan.exchanges if each.kind == "all-gather"] for plan in split)
    assert sum(with_base) > sum(plain) > 0
    assert split[0].bytes.collectives > split[1].bytes.collectives > 0


def test_the_state_holds_the_base_once_and_all_else_of_adapters_alone():
    """Average and optimizer are those of adapters; a bfloat16 base has two bytes a weight."""
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        config = config_of({"target_modules": ALL, "base_dtype": dtype})
        model = ByteTransformer(config.model)
        shapes = state_shapes(config, model, make_optimizer(config, model))
        learnt_paths = set(flat(shapes.params))
        assert all("_lora_" in path for path in learnt_paths) and set(flat(shapes.ema)) == learnt_paths
        adapters = sum(x.size for x in jax.tree.leaves(shapes.params))
        state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((shapes.opt_state, shapes.ema)))
        assert 3 * 4 * adapters <= state <= 3 * 4 * adapters + 16
        base = [x for path, x in flat(shapes.frozen).items() if "_scale" not in path.split("/")[-1]]
        matrices = [x for x in base if x.ndim > 1 and x.shape != (2, 32)]
        assert all(x.dtype.itemsize == size for x in matrices)
        told = training_bytes(model, optimizer="adamw", rows=1, length=16, average=True)
        assert told.gradients == told.average == 4 * adapters and told.optimizer == 8 * adapters


@pytest.mark.parametrize("name", [pytest.param("adamw", marks=pytest.mark.slow), "muon"])
def test_steps_change_adapters_alone_and_learn(name):
    config = config_of(
        {"target_modules": ALL, "base_dtype": "bfloat16"}, optimizer=OptimizerConfig(name=name, learning_rate=1e-2)
    )
    step, state = compiled_step(config), first_state(config)
    first, losses = state, []
    for _ in range(8):
        state, metrics = step(state, packed_batch())
        losses.append(float(metrics["loss"]))
        assert bool(metrics["finite"])
    assert losses[-1] < losses[0] - 0.1
    jax.tree.map(np.testing.assert_array_equal, state.frozen, first.frozen)
    for path, x in flat(state.params).items():
        assert np.any(x != flat(first.params)[path]), path
        assert np.any(x != flat(state.ema)[path]), path
    averaged = flat(state.averaged)
    assert averaged.keys() == flat(state.weights).keys()
    np.testing.assert_array_equal(averaged["layers/0/attn/q"], first.frozen["layers"]["0"]["attn"]["q"])


def test_muon_makes_each_factor_orthogonal():
    """A and B of matrices inside the layers are matrices between their own axes; those of tables and head are not."""
    model = dataclasses.replace(MODEL, moe=MOE)
    targets = ("q", "o", "experts", "router", "embed", "head")
    config = config_of(
        {"target_modules": targets, "dora": False},
        model,
        optimizer=OptimizerConfig(name="muon", weight_decay=0.0, gradient_clip_norm=None, learning_rate=1.0),
    )
    network = ByteTransformer(config.model)
    optimizer, params = make_optimizer(config, network), begun(config).params
    numbers = np.random.default_rng(0)
    slopes = jax.tree.map(lambda x: jax.device_put(numbers.standard_normal(x.shape, np.float32)), params)
    state = optimizer.init(params)
    for _ in range(6):  # after the warm-up
        updates, state = jax.jit(optimizer.update)(slopes, state, params)
    found = flat(updates)
    rate = 1.0 * 5 / 5

    def spread(path, *shape):
        """Singular values of each matrix of an update of size 1."""
        x = np.asarray(found[path]).reshape(-1, *shape) / (0.2 * np.sqrt(max(shape)) * rate)
        return np.linalg.svd(x, compute_uv=False)

    for path, *shape in (
        ("layers/0/attn/q_lora_a", 32, 2),
        ("layers/0/attn/q_lora_b", 2, 32),
        ("layers/0/attn/o_lora_a", 32, 2),
        ("layers/0/moe/experts/gate_up_lora_a", 32, 2),
        ("layers/0/moe/experts/down_lora_b", 2, 32),
    ):
        values = spread(path, *shape)
        assert 0.6 < values.min() and values.max() < 1.3, path
    for path in ("lm_head/kernel_lora_b", "embed/embedding_lora_a"):
        values = np.abs(np.asarray(found[path]))  # of AdamW, whose updates all have the size of the rate
        np.testing.assert_allclose(values, rate, rtol=0.05, err_msg=path)


def test_weight_decay_is_of_factors_and_not_of_magnitudes():
    config = config_of({"dora": True}, optimizer=OptimizerConfig(weight_decay=0.5, gradient_clip_norm=None))
    optimizer = make_optimizer(config, ByteTransformer(config.model))
    params = begun(config).params
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(lambda zeros, params: optimizer.update(zeros, optimizer.init(params), params))(zeros, params)
    for path, update in flat(updates).items():
        assert np.any(update != 0) == (not path.endswith("_m")), path


def test_parts_of_a_batch_add_up_and_regularization_counts_once():
    lora = {"target_modules": ALL, "regularization": 3.0}
    whole = config_of(lora)
    state = begun(whole)
    given = state.replace(opt_state=RECORDER.init(state.params))
    _, expected = compiled_step(whole, RECORDER)(given, packed_batch())
    added = 3.0 * float(mean_square_change(ByteTransformer(whole.model), state.weights))
    assert added > 0.01
    np.testing.assert_allclose(expected["loss"], expected["cross_entropy"] + added, rtol=1e-5)
    parts = config_of(lora, gradient_accumulation_steps=2)
    _, found = compiled_step(parts, RECORDER)(given, packed_batch())
    for name in ("loss", "gradient_norm", "accuracy"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)


def test_dropout_of_adapters_is_drawn_anew_in_each_step_and_part():
    config = config_of({"target_modules": ("head",), "dropout": 0.5}, gradient_accumulation_steps=2)
    state = begun(config)
    step = compiled_step(config, RECORDER)
    given = state.replace(opt_state=RECORDER.init(state.params))
    first, again = (step(given, packed_batch())[1]["loss"] for _ in range(2))
    later = step(given.replace(step=given.step + 1), packed_batch())[1]["loss"]
    assert first == again != later


@pytest.mark.parametrize(
    ("saved", "paths"),
    [
        ("norms", {"final_norm/scale", "layers/0/attn_norm/scale", "layers/0/mlp_norm/scale"}),
        ("head", {"lm_head/kernel"}),
        ("embed", {"embed/embedding"}),
        ("biases", {"layers/0/attn/q_bias", "layers/0/attn/k_bias", "layers/0/attn/v_bias"}),
    ],
)
def test_further_weights_are_trained_whole_in_float32(saved, paths):
    model = dataclasses.replace(MODEL, attention_bias=True)
    config = config_of({"modules_to_save": (saved,), "base_dtype": "bfloat16", "target_modules": ("q",)}, model)
    network = ByteTransformer(config.model)
    shapes = state_shapes(config, network, optax.identity())
    assert {path for path in flat(shapes.params) if "_lora_" not in path} == paths
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(shapes.params))
