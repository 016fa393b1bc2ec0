"""Every mesh gives the loss, the gradients and the training of one device. On eight CPU devices."""

import contextlib
import dataclasses
import functools

import jax
import numpy as np
import pytest
from helpers.grids import REPEATS
from helpers.training import MODEL, RECORDER, flat, packed_batch, rate_at, settings

from stellarbyte_jax.checkpoint.store import Checkpointer
from stellarbyte_jax.config import (
    ChatConfig,
    DataConfig,
    LossConfig,
    MemoryConfig,
    MeshConfig,
    MoEConfig,
    OptimizerConfig,
    RopeScaling,
)
from stellarbyte_jax.model.decoder import ByteTransformer, init_params
from stellarbyte_jax.model.io import State
from stellarbyte_jax.model.trees import merge
from stellarbyte_jax.training import placement, resume
from stellarbyte_jax.training.loss import auxiliary_loss, batch_loss
from stellarbyte_jax.training.optimizer import make_optimizer
from stellarbyte_jax.training.placement import mesh_of, on_mesh, place_batches, placed, shardings
from stellarbyte_jax.training.state import create_state, state_shapes
from stellarbyte_jax.training.step import make_train_step

ROWS = 16
EXPERTS = MoEConfig(num_experts=8, num_experts_per_tok=2, intermediate_size=16, n_shared_experts=1)
MODELS = {
    "dense": {"tie_word_embeddings": True, "vocab_size_multiple": 8, "mlp_bias": True},
    "experts": {"moe": EXPERTS},
    "experts with room": {
        "moe": dataclasses.replace(
            EXPERTS,
            n_shared_experts=0,
            dispatch="capacity",
            capacity_factor=8.0,
            scoring_func="sigmoid",
            gate="context",
        ),
    },
    "stellarbyte": {
        "position_embedding": "xpos",
        "xpos_learnable": True,
        "xpos_scale_base": 20.0,
        "parallel_residual": True,
        "layer_scale_init": 0.5,
        "qk_norm": True,
        "hidden_act": "gelu_pytorch_tanh",
        "attention_bias": True,
        "attention_output_bias": True,
        "sliding_window": 5,
        "sink_tokens": 2,
        "attention_logit_softcap": 3.0,
        "layer_types": ("sliding_attention", "full_attention"),
        "moe": dataclasses.replace(EXPERTS, decoder_sparse_step=2, shared_pool=True),
    },
    "memory": {"memory": MemoryConfig(length=6)},
    "original": {
        "position_embedding": "stellarbyte",
        "mlp_style": "stellarbyte",
        "residual_scaling": "deepnorm",
        "remat": "full",
    },
}
MESHES = [
    {"data": 8},
    {"fsdp": 8},
    {"tensor": 8},
    {"context": 8},
    {"expert": 8},
    {"data": 2, "fsdp": 4},
    {"fsdp": 2, "tensor": 2, "data": 2},
    {"fsdp": 2, "context": 2, "tensor": 2},
    {"data": 2, "context": 4},
    {"expert": 2, "fsdp": 2, "data": 2},
    {"expert": 4, "tensor": 2},
    {"expert": 2, "context": 2, "tensor": 2},
]
# A step of each kind, for every run of the tests; others are slow.
STEPS = [
    ("dense", {"fsdp": 2, "context": 2, "tensor": 2}, 1),
    pytest.param("dense", {"data": 2, "fsdp": 4}, 2, marks=REPEATS),
    ("memory", {"data": 2, "tensor": 2}, 2),
    ("experts with room", {"expert": 2, "context": 2, "tensor": 2}, 2),
    ("stellarbyte", {"expert": 2, "fsdp": 2, "tensor": 2}, 1),
    pytest.param("original", {"fsdp": 2, "context": 2, "tensor": 2}, 2, marks=pytest.mark.slow),
    pytest.param("original", {"tensor": 8}, 2, marks=pytest.mark.slow),
    pytest.param("experts", {"expert": 2, "fsdp": 2, "data": 2}, 1, marks=pytest.mark.slow),
    pytest.param("experts with room", {"expert": 4, "tensor": 2}, 2, marks=pytest.mark.slow),
    pytest.param("experts with room", {"fsdp": 2, "tensor": 2, "data": 2}, 2, marks=pytest.mark.slow),
]
ALL = [
    (name, mesh)
    for name in ("dense", "experts", "stellarbyte")
    for mesh in MESHES
    if ("expert" in mesh) <= ("moe" in MODELS[name])
]


@pytest.fixture(autouse=True)
def eight_devices(monkeypatch):
    monkeypatch.setattr(placement, "devices", jax.devices)


def config_of(name, parts, **changes):
    model = dataclasses.replace(MODEL, vocab_size=64, num_attention_heads=8, **MODELS[name])
    loss = LossConfig(router_load=0.1, router_sequence=0.1, router_z=0.01) if "moe" in MODELS[name] else LossConfig()
    data = DataConfig(sequence_length=16, arrangement="contiguous" if model.has_memory else "packed")
    more = {"gradient_accumulation_steps": parts, "loss": loss, "data": data, **changes}
    return settings(model=model, global_batch_size=ROWS, ema_decay=0.9, **more)


def batch_of(config, seed=0):
    batch = packed_batch(seed, batch=ROWS)
    batch["tokens"] %= config.model.vocab_size
    return batch


@functools.cache
def first_state(name, optimizer):
    """On one device: no number of it depends on parts or on the mesh."""
    config = config_of(name, 1)
    model = ByteTransformer(config.model)
    optimizer = optimizer or make_optimizer(config, model)
    return jax.jit(lambda: create_state(config, model, optimizer))()


def on_one_device(config, state, optimizer, batches):
    step = make_train_step(config, ByteTransformer(config.model), optimizer, functools.partial(rate_at, config))
    return trained(state, jax.jit(step), batches)


def on_many(config, state, optimizer, batches):
    """The same on the mesh of the config; arrays must lie where they lay."""
    model = ByteTransformer(config.model)
    with on_mesh(mesh_of(config)):
        places = shardings(placed(state_shapes(config, model, optimizer), model, optimizer))
        step = make_train_step(config, model, optimizer, functools.partial(rate_at, config))
        step = jax.jit(step, out_shardings=(places, None))
        return trained(jax.device_put(state, places), step, map(place_batches(), batches))


def trained(state, step, batches):
    losses = []
    for batch in batches:
        state, metrics = step(state, batch)
        losses.append(metrics["loss"])
    return jax.device_get(state), np.asarray(jax.device_get(losses)), jax.device_get(metrics)


@functools.cache
def expected(name, parts):
    config = config_of(name, parts)
    return on_one_device(config, first_state(name, RECORDER), RECORDER, [batch_of(config)])


@pytest.mark.parametrize(("name", "mesh", "parts"), STEPS)
def test_a_step_is_that_of_one_device(name, mesh, parts):
    state, losses, metrics = expected(name, parts)
    config = config_of(name, parts, mesh=MeshConfig(**mesh))
    found = on_many(config, first_state(name, RECORDER), RECORDER, [batch_of(config)])
    found_state, found_losses, found_metrics = found
    np.testing.assert_allclose(found_losses, losses, rtol=1e-5)
    check_gradients(found_state.opt_state, state.opt_state)
    for path, number in flat(state.frozen).items():
        np.testing.assert_allclose(flat(found_state.frozen)[path], number, rtol=1e-5, atol=1e-7, err_msg=path)
    for found, expected_leaf in zip(jax.tree.leaves(found_state.carried), jax.tree.leaves(state.carried), strict=True):
        np.testing.assert_allclose(found, expected_leaf, atol=1e-5)
    assert found_metrics.keys() == metrics.keys()
    for metric, value in metrics.items():
        np.testing.assert_allclose(found_metrics[metric], value, rtol=1e-4, atol=1e-6, err_msg=metric)


def check_gradients(found, expected):
    for path, gradient in flat(expected).items():
        size = np.abs(gradient).max()
        assert size > 0 or "twin" in path
        np.testing.assert_allclose(flat(found)[path], gradient, atol=1e-5 * size, err_msg=path)


def slopes_of(config, state, batch, places=None):
    """Loss and gradients, with the router's losses and without what else a step does."""
    model = ByteTransformer(config.model)

    def loss(params, frozen, batch):
        total, sums, out = batch_loss(
            model, merge(params, frozen), batch, config.loss, max_segments=9, train=True, state=State()
        )
        return total / sums["tokens"] + auxiliary_loss(config.loss, out.aux)

    run = jax.jit(jax.value_and_grad(loss), out_shardings=places)
    return jax.device_get(run(state.params, state.frozen, batch))


@functools.cache
def expected_slopes(name):
    config = config_of(name, 1)
    return slopes_of(config, first_state(name, RECORDER), batch_of(config))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mesh"), ALL)
def test_loss_and_gradients_are_those_of_one_device(name, mesh):
    config = config_of(name, 1, mesh=MeshConfig(**mesh))
    model = ByteTransformer(config.model)
    with on_mesh(mesh_of(config)):
        places = shardings(placed(state_shapes(config, model, RECORDER), model, RECORDER))
        state = jax.device_put(first_state(name, RECORDER), places)
        loss, slopes = slopes_of(config, state, place_batches()(batch_of(config)), (None, places.params))
    expected_loss, wanted = expected_slopes(name)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    check_gradients(slopes, wanted)


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("dense", {"data": 2, "fsdp": 2, "tensor": 2}),
        pytest.param("experts", {"expert": 2, "fsdp": 2, "tensor": 2}, marks=REPEATS),
        ("experts with room", {"expert": 2, "data": 2, "tensor": 2}),
        ("stellarbyte", {"expert": 2, "fsdp": 2, "tensor": 2}),
    ],
)
def test_rows_that_all_devices_together_do_not_divide_give_the_gradients_of_one(name, mesh):
    """Four rows on eight devices: between layers ``tensor`` has positions."""
    config = dataclasses.replace(config_of(name, 1, mesh=MeshConfig(**mesh)), global_batch_size=4)
    batch = {part: x[:4] for part, x in batch_of(config).items()}
    expected_loss, wanted = slopes_of(config, first_state(name, RECORDER), batch)
    model = ByteTransformer(config.model)
    with on_mesh(mesh_of(config)):
        places = shardings(placed(state_shapes(config, model, RECORDER), model, RECORDER))
        state = jax.device_put(first_state(name, RECORDER), places)
        loss, slopes = slopes_of(config, state, place_batches()(batch), (None, places.params))
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    check_gradients(slopes, wanted)


def test_frequencies_of_long_texts_are_those_of_one_device():
    """Dynamic scaling reads where documents end, and positions are dealt out to devices."""
    config = config_of("dense", 1, data=DataConfig(sequence_length=16, arrangement="contiguous"))
    scaling = RopeScaling(name="dynamic", factor=4.0)
    model = dataclasses.replace(
        config.model, max_position_embeddings=16, rope_scaling=scaling, initializer_range=0.3, num_hidden_layers=1
    )
    config = dataclasses.replace(config, model=model)
    batch = batch_of(config)
    batch["positions"] = batch["positions"] * 0 + np.arange(16, dtype=np.int32) + 20
    batch["segment_ids"] = np.ones_like(batch["positions"])
    first = jax.jit(lambda: create_state(config, ByteTransformer(model), RECORDER))()
    state, losses, _ = on_one_device(config, first, RECORDER, [batch])
    split = dataclasses.replace(config, mesh=MeshConfig(data=1, context=2))
    found, found_losses, _ = on_many(split, first, RECORDER, [batch])
    np.testing.assert_allclose(found_losses, losses, rtol=1e-5)
    check_gradients(found.opt_state, state.opt_state)


@pytest.mark.parametrize(("mesh", "parts"), [({}, 4), ({"fsdp": 2, "context": 2, "tensor": 2}, 1)])
def test_a_reply_counts_the_same_whatever_the_part_that_it_is_in(mesh, parts):
    """Parts with many targets, with one, with a few and with none; prompts count a quarter."""
    chat = DataConfig(sequence_length=16, format="chat", chat=ChatConfig(prompt_weight=0.25))
    config = config_of("dense", 1, data=chat)
    batch = batch_of(config)
    random = np.random.default_rng(0)
    batch["replies"] = random.integers(0, 3, batch["tokens"].shape).astype(np.int32)
    batch["loss_mask"] &= random.random(batch["tokens"].shape) < np.array([1.0, 0.0, 0.2, 0.0] * 4)[:, None]
    batch["loss_mask"][1, 2] = True
    first = first_state("dense", RECORDER)
    state, losses, metrics = on_one_device(config, first, RECORDER, [batch])
    cut = config_of("dense", parts, data=chat, **({"mesh": MeshConfig(**mesh)} if mesh else {}))
    found, found_losses, found_metrics = (on_many if mesh else on_one_device)(cut, first, RECORDER, [batch])
    np.testing.assert_allclose(found_losses, losses, rtol=1e-5)
    assert found_metrics["target_tokens"] == pytest.approx(float(metrics["target_tokens"])) and losses[0] > 1
    for path, gradient in flat(state.opt_state).items():
        atol = 1e-5 * np.abs(gradient).max()
        np.testing.assert_allclose(flat(found.opt_state)[path], gradient, atol=atol, err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mesh"),
    [("dense", {"fsdp": 2, "context": 2, "tensor": 2}), ("stellarbyte", {"expert": 2, "fsdp": 2, "tensor": 2})],
)
def test_twenty_steps_are_those_of_one_device(name, mesh):
    config = config_of(name, 2)
    batches = [batch_of(config, seed % 2) for seed in range(20)]
    optimizer, first = make_optimizer(config, ByteTransformer(config.model)), first_state(name, None)
    state, losses, _ = on_one_device(config, first, optimizer, batches)
    found, found_losses, _ = on_many(dataclasses.replace(config, mesh=MeshConfig(**mesh)), first, optimizer, batches)
    assert losses[-1] < losses[0] - 0.1
    np.testing.assert_allclose(found_losses, losses, rtol=2e-4)
    for path, weight in flat(state.ema).items():
        np.testing.assert_allclose(flat(found.ema)[path], weight, atol=2e-3 * np.abs(weight).max(), err_msg=path)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weights_averages_and_what_the_optimizer_keeps_are_made_in_parts(optimizer):
    """With the numbers of one device."""
    config = config_of("experts", 1, mesh=MeshConfig(expert=2, fsdp=2, tensor=2))
    config = dataclasses.replace(config, optimizer=OptimizerConfig(name=optimizer))
    model = ByteTransformer(config.model)
    optimizer = make_optimizer(config, model)
    with on_mesh(mesh_of(config)):
        places = shardings(placed(state_shapes(config, model, optimizer), model, optimizer))
        state = jax.jit(lambda: create_state(config, model, optimizer), out_shardings=places)()
    whole = sum(x.nbytes for x in jax.tree.leaves(state))
    here = sum(shard.data.nbytes for x in jax.tree.leaves(state) for shard in x.addressable_shards[:1])
    assert here < whole / 8 * 1.25  # vectors are whole
    for tree in (state.params, state.ema):
        experts = tree["layers"]["0"]["moe"]["experts"]["gate_up"]
        assert experts.sharding.shard_shape(experts.shape) == (2, 4, 16, 2, 8)
        for path, x in flat(first_state("experts", RECORDER).params).items():
            np.testing.assert_allclose(flat(tree)[path], x, rtol=1e-6, atol=1e-7, err_msg=path)


def test_weights_that_a_run_begins_with_and_a_checkpoint_come_in_parts(tmp_path):
    config = config_of("memory", 1, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    model = ByteTransformer(config.model)
    optimizer = make_optimizer(config, model)
    weights = jax.jit(lambda: init_params(model, jax.random.key(0)))()
    with on_mesh(mesh_of(config)):
        shapes = placed(state_shapes(config, model, optimizer), model, optimizer)
        begun = resume.begin_with(weights, config, shapes, optimizer).state
        whole = jax.jit(lambda: create_state(config, model, optimizer), out_shardings=shardings(shapes))()
        with contextlib.closing(Checkpointer(tmp_path, config.checkpoint)) as checkpointer:
            resume.save(checkpointer, config, whole, 1, {}, resume.Progress())
            checkpointer.wait()
            restored = checkpointer.restore(lambda stored: resume._whole(stored, shapes, config), print).state
    for state, parts in ((begun, ("params", "opt_state")), (restored, ("params", "opt_state", "ema"))):
        for part in parts:
            tree = jax.tree.leaves(getattr(state, part))
            for leaf, shape in zip(tree, jax.tree.leaves(getattr(shapes, part)), strict=True):
                assert leaf.sharding.is_equivalent_to(shape.sharding, leaf.ndim), part
    rows = restored.carried.memory.lengths_B
    assert rows.sharding.shard_shape(rows.shape) == (ROWS // 4,)


def test_rows_of_a_batch_are_split_and_a_part_of_it_costs_a_part():
    """Of accumulation parts a device computes its rows, so four parts take a quarter of the operations each."""
    cost = {}
    for parts in (1, 4):
        config = dataclasses.replace(config_of("dense", parts, mesh=MeshConfig(data=2)), global_batch_size=ROWS)
        model = ByteTransformer(config.model)
        with on_mesh(mesh_of(config)):
            shapes = placed(state_shapes(config, model, RECORDER), model, RECORDER)
            step = jax.jit(make_train_step(config, model, RECORDER, lambda _: 0.0))
            batch = place_batches()(batch_of(config))
            assert batch["tokens"].sharding.shard_shape((ROWS, 16)) == (ROWS // 2, 16)
            cost[parts] = step.lower(shapes, batch).compile().cost_analysis()["flops"]
    assert cost[4] < 0.4 * cost[1]  # of a loop, one turn is counted
