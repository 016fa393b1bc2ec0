"""Settings of experts: which contradict each other, each in one line that names the way out, and what they derive."""

import dataclasses

import pytest
from helpers.variants import BASE

from stellarbyte_jax.config import ByteConfig, ConfigError, LossConfig, TrainConfig, override
from stellarbyte_jax.config.moe import MoEConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts": 2, "num_experts_per_tok": 3}, "moe.num_experts_per_tok 3 is above moe.num_experts 2"),
        ({"num_experts": 1}, "moe.num_experts_per_tok 2 is above moe.num_experts 1"),
        ({"n_group": 3}, "moe.num_experts 8 is not divisible by moe.n_group 3: groups are equal"),
        ({"n_group": 4, "topk_group": 5}, "moe.topk_group 5 is above moe.n_group 4"),
        ({"topk_group": 2}, "moe.topk_group 2 is above moe.n_group 1"),
        (
            {"n_group": 4, "num_experts_per_tok": 3},
            "moe.num_experts_per_tok 3 is above the 2 experts of moe.topk_group 1 groups: raise topk_group",
        ),
        (
            {"dispatch": "capacity", "max_capacity": 3},
            "moe.max_capacity 3 is below moe.min_capacity 4 or moe.num_experts_per_tok 2",
        ),
        (
            {"dispatch": "capacity", "min_capacity": 1, "max_capacity": 1},
            "moe.max_capacity 1 is below moe.min_capacity 1 or moe.num_experts_per_tok 2",
        ),
        *(
            ({name: value}, f"moe.{name} belongs to moe.dispatch=capacity: set that, or leave it out")
            for name, value in {
                "capacity_factor": 2.0,
                "min_capacity": 1,
                "max_capacity": 9,
                "dynamic_capacity": True,
                "overflow": ("cold",),
            }.items()
        ),
        *(
            ({name: value}, f"moe.{name} belongs to moe.gate=context: set that, or leave it out")
            for name, value in {"context_size": 3, "gate_intermediate_size": 3, "history_decay": 0.5}.items()
        ),
        (
            {"noise_scale": 0.5},
            "moe.noise_scale is of the noise: set moe.noise to noisy_topk or gumbel, or leave it out",
        ),
        (
            {"dispatch": "capacity", "overflow": ("warm", "cold")},
            "moe.overflow may hold next_best, cold, sticky, random, got warm",
        ),
        ({"dispatch": "capacity", "overflow": ("cold", "cold")}, "moe.overflow names a step twice"),
        ({"dispatch": "capacity", "overflow": "cold"}, "MoEConfig.overflow must be a list of str, got 'cold'"),
        ({"num_experts": 0, "gate": "context"}, "moe.num_experts is 0, but gate is given: set moe.num_experts"),
        (
            {"dynamic_k": 0.5, "num_experts_per_tok": 1, "norm_topk_prob": False},
            "moe.dynamic_k 0.5 leaves a token fewer of its experts, and moe.num_experts_per_tok is 1: raise it, or "
            "leave dynamic_k out",
        ),
        ({"dynamic_k": 1.5}, "MoEConfig.dynamic_k must be float (in [0, 1]) or none, got 1.5"),
        ({"num_experts_per_tok": 0}, "MoEConfig.num_experts_per_tok must be int (positive, below 2^31), got 0"),
        ({"temperature": 0.0}, "MoEConfig.temperature must be float (positive, finite), got 0.0"),
        ({"gate": "deep"}, "MoEConfig.gate must be one of linear, context, got 'deep'"),
        ({"state_decay": 1.0}, "MoEConfig.state_decay must be float (in [0, 1)), got 1.0"),
    ],
)
def test_settings_of_experts_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ConfigError) as error:
        MoEConfig(**{"num_experts": 8, **settings})
    assert str(error.value) == message


def test_settings_at_the_edge_of_a_rule_are_accepted():
    for settings in (
        {"num_experts_per_tok": 8},
        {"n_group": 8, "topk_group": 2},
        {"n_group": 4, "topk_group": 4},
        {"dispatch": "capacity", "max_capacity": 4},
        {"dispatch": "capacity", "overflow": ()},
        {"noise": "gumbel", "noise_scale": 0.5},
        {"gate": "context", "history_decay": 0.5},
        {"rebalance_interval": 5, "n_group": 4, "topk_group": 4},
    ):
        assert MoEConfig(num_experts=8, **settings).given()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"mlp_style": "stellarbyte"},
            "experts are gated MLPs without biases: leave out mlp_style and mlp_bias, or moe",
        ),
        ({"mlp_bias": True}, "experts are gated MLPs without biases: leave out mlp_style and mlp_bias, or moe"),
        (
            {"moe": {"num_experts": 4, "mlp_only_layers": [1, 4, 7]}},
            "moe.mlp_only_layers names 4, 7, there are 4 layers from 0",
        ),
        *(
            (
                {"moe": {"num_experts": 4, **settings}},
                f"no layer has experts: moe.first_k_dense_replace {settings.get('first_k_dense_replace', 0)}, "
                f"decoder_sparse_step {settings.get('decoder_sparse_step', 1)} and mlp_only_layers leave none of 4",
            )
            for settings in (
                {"first_k_dense_replace": 4},
                {"decoder_sparse_step": 5},
                {"mlp_only_layers": [0, 1, 2, 3]},
            )
        ),
        (
            {"moe": {"num_experts": 4, "gate": "context", "history_decay": 0.5}, "memory": {"length": 4}},
            "moe.history_decay is of whole documents, and memory cuts them into segments: leave one of them out",
        ),
    ],
)
def test_experts_that_a_network_cannot_have_are_refused(settings, message):
    with pytest.raises(ConfigError) as error:
        dataclasses.replace(BASE, **{"moe": {"num_experts": 4}, **settings})
    assert str(error.value) == message


def test_losses_of_routers_need_routers():
    with pytest.raises(ConfigError) as error:
        TrainConfig(output_dir="runs/x", steps=200, loss=LossConfig(router_load=0.1, router_z=1e-3))
    message = "loss.router_load, router_z belongs to routers: set model.moe.num_experts, or leave it out"
    assert str(error.value) == message
    model = ByteConfig(moe={"num_experts": 4})
    config = TrainConfig(output_dir="runs/x", steps=200, loss=LossConfig(router_z=1e-3), model=model)
    assert override(config, ["model.moe.num_experts=5"]).model.moe.num_experts == 5


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (
            8,
            {"capacity_factor": 0.008, "min_capacity": 1},
            "moe.capacity_factor 0.008 gives an expert room for 3 of 1,024",
        ),
        (8, {"capacity_factor": 0.008}, None),
        (8, {"capacity_factor": 0.0117, "min_capacity": 1}, None),  # 341.3 x 0.0117 is 3.99
        (
            2,
            {"capacity_factor": 0.0117, "min_capacity": 1},
            "moe.capacity_factor 0.0117 gives an expert room for 1 of 256",
        ),
        (8, {}, None),
    ],
)
def test_the_capacity_of_a_step_has_room_for_the_choices_of_a_token(rows, settings, message):
    """Of each part of the batch, which is computed at once: 128 tokens a row, 4 of 12 experts for each."""
    moe = {"num_experts": 12, "num_experts_per_tok": 4, "dispatch": "capacity", **settings}
    given = {"global_batch_size": 2 * rows, "gradient_accumulation_steps": 2, "data": {"sequence_length": 128}}
    if message is None:
        TrainConfig(output_dir="runs/x", steps=200, model=ByteConfig(moe=moe), **given)
        return
    with pytest.raises(ConfigError) as error:
        TrainConfig(output_dir="runs/x", steps=200, model=ByteConfig(moe=moe), **given)
    mend = "raise moe.capacity_factor or moe.min_capacity"
    assert str(error.value) == f"{message} tokens, less than moe.num_experts_per_tok 4: {mend}"


def test_which_layers_have_experts():
    def of(**settings):
        return dataclasses.replace(BASE, num_hidden_layers=6, moe={"num_experts": 4, **settings}).moe_layers

    assert of() == (0, 1, 2, 3, 4, 5)
    assert of(first_k_dense_replace=2) == (2, 3, 4, 5)
    assert of(decoder_sparse_step=2) == (1, 3, 5)
    assert of(decoder_sparse_step=2, first_k_dense_replace=2, mlp_only_layers=(5,)) == (3,)
    assert BASE.moe_layers == ()


def test_which_settings_draw_random_numbers():
    def of(**settings):
        return dataclasses.replace(BASE, moe={"num_experts": 4, **settings}).is_random

    assert not of() and not BASE.is_random
    assert not of(dispatch="capacity", overflow=("next_best", "cold", "sticky"))
    assert of(noise="gumbel") and of(noise="noisy_topk") and of(router_warmup_steps=1)
    assert of(dispatch="capacity", overflow=("random",))
