"""What ``adapter_config.json`` says of adapters, written and read, without torch and without weights of a base."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from helpers.hf_models import small_config

from stellarbyte_jax.hf.families import FAMILIES
from stellarbyte_jax.hf.peft import read_adapter, reading, save_adapter, writing
from stellarbyte_jax.hf.settings import config_json
from stellarbyte_jax.lora import split
from stellarbyte_jax.model.decoder import ByteTransformer, param_shapes

SMALL = {"num_hidden_layers": 2, "intermediate_size": 24}
MOE = {"moe": {"num_experts": 3, "num_experts_per_tok": 2, "intermediate_size": 12}}
OTHERS = {"peft_version": "9.9", "new_kind_of_thing": None, "new_list": [], "new_switch": False}


def written(path, family="llama", lora=None, value=0.5, **settings):
    """A directory of an adapter whose numbers are all the same, on a base that is a ``config.json`` alone."""
    plain = dataclasses.replace(small_config(), **SMALL, **(MOE if family == "mixtral" else {}))
    (path / "base").mkdir()
    (path / "base" / "config.json").write_text(json.dumps(config_json(FAMILIES[family], plain, "float32", {})))
    model = ByteTransformer(dataclasses.replace(plain, lora={"r": 3, **(lora or {})}))
    params = jax.tree.map(lambda x: np.full(x.shape, value, x.dtype), split(param_shapes(model))[0])
    save_adapter(path / "adapter", model, params, **{"base": path / "base", **settings})
    return path / "adapter"


def said(adapter, **changes):
    """The settings of an adapter, after changes, of which None takes a field out."""
    file = adapter / "adapter_config.json"
    values = json.loads(file.read_text()) | changes
    values = {name: value for name, value in values.items() if name not in changes or value is not None}
    file.write_text(json.dumps(values))
    return values


WRITTEN = {
    "a router": (
        "mixtral",
        {"dropout": 0.1, "target_modules": ("q", "router")},
        {"lora_dropout": 0.0, "target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight"]},
    ),
    "experts": (
        "mixtral",
        {"target_modules": ("experts",)},
        {
            "target_modules": [],
            "target_parameters": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"],
            "layers_to_transform": None,
            "rank_pattern": {"mlp.experts.gate_up_proj": 6},
        },
    ),
    "layers": (
        "llama",
        {"dropout": 0.1, "layers": (1,), "target_modules": ("v", "down", "head")},
        {"lora_dropout": 0.1, "target_modules": ["down_proj", "lm_head", "v_proj"], "layers_to_transform": [1]},
    ),
    "fused": (
        "phi3",
        {"rslora": True, "lora_alpha": 6.0},
        {
            "rank_pattern": {"self_attn.qkv_proj": 9, "mlp.gate_up_proj": 6},
            "alpha_pattern": {
                "self_attn.qkv_proj": pytest.approx(6 * 3**0.5),
                "mlp.gate_up_proj": pytest.approx(72**0.5),
            },
            "bias": "none",
        },
    ),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_what_is_written(case, tmp_path):
    family, lora, expected = WRITTEN[case]
    values = said(written(tmp_path, family, lora))
    assert {name: values[name] for name in expected} == expected
    assert "revision" not in values and values["base_model_name_or_path"] == str(tmp_path / "base")


def test_a_base_of_the_hub_is_named_with_its_revision(tmp_path, monkeypatch):
    asked = []

    def local(name, revision=None, *, weights=True):
        asked.append((str(name), revision, weights))
        return tmp_path / "base" if name == "owner/name" else name

    for module in (reading, writing):
        monkeypatch.setattr(module, "local_directory", local)
    adapter = written(tmp_path, base="owner/name", revision="v2")
    assert said(adapter).items() >= {"base_model_name_or_path": "owner/name", "revision": "v2"}.items()
    read_adapter(adapter)
    assert asked == [("owner/name", "v2", False), (str(adapter), None, True), ("owner/name", "v2", False)]


def test_what_is_absent_or_without_effect(tmp_path):
    """Ranks and factors of PEFT's defaults; new fields that are off; whatever A began with."""
    adapter = written(tmp_path, lora={"r": 8, "lora_alpha": 8.0})
    for init in (True, False, "eva", "orthogonal"):
        said(adapter, r=None, lora_alpha=None, init_lora_weights=init, **OTHERS)
        lora = read_adapter(adapter)[0].config.lora
        assert (lora.r, lora.lora_alpha, lora.scale, lora.init) == (8, 8.0, 1.0, "kaiming")
    values = said(adapter, init_lora_weights="gaussian") | {"init_lora_weights": None}
    assert read_adapter(adapter)[0].config.lora.init == "gaussian"
    (adapter / "adapter_config.json").write_text(json.dumps(values))
    assert read_adapter(adapter)[0].config.lora.init == "kaiming"


def test_an_adapter_of_zeros_of_a_fused_weight_keeps_its_rank(tmp_path):
    """As PEFT saves it before the first step: nothing tells whose inner channels these are."""
    adapter = written(tmp_path, "phi3", value=0.0)
    model, params = read_adapter(adapter)
    assert model.config.lora.targets == {"q", "k", "v", "o", "gate_up", "down"} and model.config.lora.r == 9
    assert not np.any(params["layers"]["0"]["attn"]["q_lora_b"])


def test_parts_of_a_fused_weight_have_their_own_inner_channels(tmp_path):
    """Of an output without any part in the adapter too, and whatever a pattern of another module is called."""
    adapter = written(tmp_path, "phi3", {"target_modules": ("attention", "gate_up")})
    qkv = "base_model.model.model.layers.1.self_attn.qkv_proj.lora_B.weight"
    changed(adapter, lambda held: held | {qkv: held[qkv] * (np.arange(len(held[qkv])) > 0)[:, None]})
    said(adapter, alpha_pattern={"up_proj": 1} | said(adapter)["alpha_pattern"])
    model, params = read_adapter(adapter)
    assert (model.config.lora.r, model.config.lora.layers) == (3, None)
    stack = params["layers"]["0"]
    expected = np.full_like(stack["attn"]["q_lora_b"], 0.5)
    expected[1, :, 0, 0] = 0
    np.testing.assert_allclose(stack["attn"]["q_lora_b"], expected)
    np.testing.assert_allclose(stack["mlp"]["gate_up_lora_b"], np.full_like(stack["mlp"]["gate_up_lora_b"], 0.5))


def test_layers_without_adapters(tmp_path):
    adapter = written(tmp_path, lora={"layers": (1,), "target_modules": ("v", "head")})
    assert read_adapter(adapter)[0].config.lora.layers == (1,)


def test_dropout_stays_where_adapters_have_it(tmp_path):
    for number, (lora, kept) in enumerate(
        (
            ({"target_modules": ("q", "head")}, 0.1),
            ({"dora": True, "target_modules": ("q",)}, 0.1),
            ({"dora": True, "target_modules": ("q", "head")}, 0.0),
            ({"target_modules": ("q", "embed")}, 0.0),
        )
    ):
        place = tmp_path / str(number)
        place.mkdir()
        adapter = written(place, lora=lora)
        said(adapter, lora_dropout=0.1)
        assert read_adapter(adapter)[0].config.lora.dropout == kept, lora


def changed(adapter, change):
    """Other tensors in the file of an adapter."""
    from safetensors.numpy import load_file, save_file

    file = adapter / "adapter_model.safetensors"
    save_file({name: np.ascontiguousarray(x) for name, x in change(load_file(file)).items()}, file)


def test_a_table_beside_its_adapter_is_no_further_weight(tmp_path):
    """PEFT writes the embedding itself too where it has an adapter."""
    adapter = written(tmp_path, lora={"target_modules": ("q", "embed")})
    table = {"base_model.model.model.embed_tokens.base_layer.weight": np.zeros((96, 32), np.float32)}
    norm = {"base_model.model.model.norm.weight": np.zeros(32, np.float32)}
    changed(adapter, lambda held: held | table)
    lora = read_adapter(adapter)[0].config.lora
    assert lora.targets == {"q", "embed"} and lora.modules_to_save == ()
    changed(adapter, lambda held: held | norm)
    assert read_adapter(adapter)[0].config.lora.modules_to_save == ("norms",)


def test_a_rank_of_0_is_refused(tmp_path):
    adapter = written(tmp_path, lora={"target_modules": ("q",)})
    changed(adapter, lambda held: {name: x[:0] if "lora_A" in name else x[:, :0] for name, x in held.items()})
    with pytest.raises(ValueError, match=r"q_proj\.lora_A\.weight has shape \(0, 32\)"):
        read_adapter(adapter)


def test_other_ranks_and_factors_of_modules_are_in_the_factors(tmp_path):
    """``lora_alpha`` is such that what most modules are multiplied by stays."""
    adapter = written(tmp_path, lora={"lora_alpha": 6.0, "target_modules": ("q", "k", "v")})
    said(adapter, alpha_pattern={"v_proj": 3, "q_proj": 12, "k_proj": 12})
    model, params = read_adapter(adapter)
    assert (model.config.lora.lora_alpha, model.config.lora.scale) == (12.0, 4.0)
    attn = params["layers"]["0"]["attn"]
    np.testing.assert_array_equal(attn["q_lora_b"], np.full_like(attn["q_lora_b"], 0.5))
    np.testing.assert_array_equal(attn["v_lora_b"], np.full_like(attn["v_lora_b"], 0.125))
