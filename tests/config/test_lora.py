"""Settings of adapters: what they mean, and what is refused."""

import dataclasses

import pytest

from stellarbyte_jax.config import ByteConfig, ConfigError, LoRAConfig, TrainConfig, compose

DENSE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
MOE = {**DENSE, "moe": {"num_experts": 4}}


@pytest.mark.parametrize(
    ("names", "targets"),
    [
        (("all-linear",), {"q", "k", "v", "o", "gate_up", "down"}),
        (("attention",), {"q", "k", "v", "o"}),
        (("mlp", "lm_head"), {"gate_up", "down", "head"}),
        (("q_proj", "v_proj"), {"q", "v"}),
        (("gate_proj", "up_proj", "down_proj"), {"gate_up", "down"}),
        (("mlp", "gate_proj"), {"gate_up", "down"}),
        (("all-linear", "up_proj"), {"q", "k", "v", "o", "gate_up", "down"}),
        (("gate", "embed_tokens", "experts"), {"router", "embed", "experts"}),
    ],
)
def test_names_of_targets(names, targets):
    assert LoRAConfig(r=2, target_modules=names).targets == targets
    assert LoRAConfig().targets == frozenset()


def test_the_factor():
    assert LoRAConfig(r=4, lora_alpha=8.0).scale == 2.0
    assert LoRAConfig(r=4, lora_alpha=8.0, rslora=True).scale == 4.0


REFUSED = {
    "unknown": ({"target_modules": ("wq", "q")}, r"names wq; there are q, k, v, o, gate_up, .* q_proj, .* up_proj$"),
    "half of a pair": ({"target_modules": ("gate_proj",)}, r"gate_proj and up_proj are one weight here: name both"),
    "none": ({"target_modules": ()}, r"target_modules is empty"),
    "twice": (
        {"target_modules": ("embed",), "modules_to_save": ("embed",)},
        r"modules_to_save trains embed whole: leave it out of lora.target_modules",
    ),
    "dropout": ({"target_modules": ("experts",), "dropout": 0.1}, r"dropout is not for experts and embed: set it to 0"),
    "activation": ({"target_modules": ("embed",), "activation": "relu"}, r"activation is not for experts and embed"),
    "dora": ({"dora": True, "activation": "relu"}, r"dora is of linear adapters of matrices"),
    "dora of a table": (
        {"dora": True, "target_modules": ("embed",)},
        r"leave out lora.activation and the target embed",
    ),
    "dora of the head": (
        {"dora": True, "dropout": 0.1, "target_modules": ("head",)},
        r"dora of the head, which is merged before it is used, has no dropout",
    ),
    "without a rank": ({"r": 0, "lora_alpha": 8.0, "dora": True}, r"lora.lora_alpha, dora would change nothing"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_fit_together(kind):
    settings, why = REFUSED[kind]
    with pytest.raises(ConfigError, match=why):
        LoRAConfig(**{"r": 2, **settings})


ABSENT = {
    "experts": (
        DENSE,
        {"target_modules": ("experts",)},
        r"names experts, .* there are q, k, v, o, gate_up, down, embed",
    ),
    "router": (DENSE, {"target_modules": ("q", "router")}, r"names router, which the model does not have"),
    "shared": (MOE, {"target_modules": ("shared",)}, r"names shared, which the model does not have"),
    "mlp of experts": (MOE, {"target_modules": ("mlp",)}, r"names mlp, which .* there are q, .* experts, router"),
    "tied head": ({**DENSE, "tie_word_embeddings": True}, {"target_modules": ("head",)}, r"name embed"),
    "tied head, whole": ({**DENSE, "tie_word_embeddings": True}, {"modules_to_save": ("head",)}, r"name embed"),
    "layers": (DENSE, {"layers": (0, 3)}, r"lora.layers names 3, there are 3 layers from 0"),
    "no layers": (DENSE, {"layers": ()}, r"lora.layers is empty: name layers, or none for all"),
    "layers of a pool": (
        {**DENSE, "moe": {"num_experts": 4, "shared_pool": True}},
        {"target_modules": ("experts",), "layers": (0,)},
        r"layers share one pool of experts here",
    ),
}


@pytest.mark.parametrize("kind", ABSENT)
def test_what_the_network_does_not_have(kind):
    network, lora, why = ABSENT[kind]
    with pytest.raises(ConfigError, match=why):
        ByteConfig(**network, lora={"r": 2, **lora})


def test_adapters_go_with_the_model_of_init_from():
    """A config that names adapters alone leaves the model out, and what is inherited has them; --set changes them."""
    there = ByteConfig(**MOE, lora={"r": 7})
    lora = LoRAConfig(r=2, target_modules=("experts",))
    config = TrainConfig(output_dir="x", steps=200, init_from="y", model=ByteConfig(lora=lora))
    assert config.leaves_model_out

    def inherit(*_):
        return {"model": there.to_dict(), "data.tokenizer": "z", "data.add_bos": True}

    made = compose(config, ["model.lora.r=3"], inherit)
    assert made.model == dataclasses.replace(there, lora=dataclasses.replace(lora, r=3))
    assert compose(dataclasses.replace(config, model=ByteConfig()), [], inherit).model == there.without_adapters
    replaced = compose(dataclasses.replace(config, init_from=None, model=there), ["init_from=w"], inherit)
    assert replaced.model == there
    dense = {"model": ByteConfig(**DENSE).to_dict()}
    with pytest.raises(ConfigError, match="names experts, which the model does not have"):
        compose(config, [], lambda *_: dense)
    with pytest.raises(ConfigError, match="names experts, which the model does not have"):
        TrainConfig(output_dir="x", steps=200, model=ByteConfig(lora=lora))
