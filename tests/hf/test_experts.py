"""Families whose layers have experts, against transformers: both spellings, both directions, and what is refused."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers.hf_experts import MODELS, load_peer, our_model, save_peer
from helpers.hf_models import SMALL, assert_same_tree, edit_config, edit_tensors, tensors
from helpers.variants import run
from safetensors.numpy import load_file

from stellarbyte_jax import generate
from stellarbyte_jax.config import ByteConfig, MoEConfig
from stellarbyte_jax.hf.directory import from_pretrained, save_pretrained
from stellarbyte_jax.hf.export import _meaning, export_family
from stellarbyte_jax.hf.families import FAMILIES
from stellarbyte_jax.hf.settings import parse_config, settings_json
from stellarbyte_jax.hf.spelling import as_spelled
from stellarbyte_jax.hf.verify import compare_with_transformers

TOKENS = np.random.default_rng(0).integers(1, 96, (2, 24), dtype=np.int32)
PROMPTS = [TOKENS[0, :5].tolist(), TOKENS[1, :9].tolist()]


def assert_same_numbers(directory: Path, model: Any, params: Any) -> None:
    """Logits, those of a padded batch, and greedy tokens after prompts of two lengths."""
    import torch

    peer = load_peer(directory)
    ours = np.asarray(run(model, params, TOKENS))
    mask = torch.ones((2, 24), dtype=torch.long)
    mask[0, :7] = 0
    ragged = torch.from_numpy(np.pad(TOKENS[0, :17], (7, 0))[None].astype(np.int64))
    with torch.no_grad():
        theirs = peer(torch.from_numpy(TOKENS.astype(np.int64))).logits.numpy()
        padded = peer(torch.cat([ragged, torch.from_numpy(TOKENS[1:].astype(np.int64))]), attention_mask=mask).logits
    assert np.abs(theirs).max() > 1
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)
    np.testing.assert_allclose(ours[0, :17], padded[0, 7:].numpy(), atol=1e-4, rtol=0)
    rows = torch.tensor([[0] * 4 + PROMPTS[0], PROMPTS[1]])
    with torch.no_grad():
        texts = peer.generate(
            rows, attention_mask=(rows > 0).long(), max_new_tokens=20, do_sample=False, eos_token_id=None
        )
    assert texts[:, 9:].tolist() == generate(model, params, PROMPTS, max_new_tokens=20).sequences


@pytest.mark.parametrize(("name", "fused"), [("mixtral", False), ("qwen3_moe", True)])
def test_models_of_transformers_compute_the_same_here(name: str, fused: bool, tmp_path: Path) -> None:
    """In the one spelling or the other, which another test shows to be the same weights."""
    peer = save_peer(tmp_path / "peer", name, fused=fused)
    names = load_file(peer / "model.safetensors")
    assert any(".experts.gate_up_proj" in key for key in names) == fused
    model, params = from_pretrained(peer, compute_dtype="float32")
    assert_same_numbers(peer, model, params)


@pytest.mark.parametrize("name", MODELS)
def test_our_models_compute_the_same_with_transformers(name: str, tmp_path: Path) -> None:
    model, params = our_model(name)
    save_pretrained(tmp_path / "hf", model, params)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == MODELS[name][0]
    assert_same_numbers(tmp_path / "hf", model, params)
    agreement = compare_with_transformers(tmp_path / "hf", model, params)
    assert agreement.ok and agreement.argmax_agreement == 1.0 and agreement.bfloat16_agreement > 0.8


@pytest.mark.parametrize("name", MODELS)
def test_both_spellings_are_the_same_model(name: str, tmp_path: Path) -> None:
    listed, fused = (from_pretrained(save_peer(tmp_path / str(f), name, fused=f)) for f in (False, True))
    assert listed[0].config == fused[0].config
    assert_same_tree(listed[1], fused[1])
    save_pretrained(tmp_path / "back", *fused)
    before, after = tensors(tmp_path / "False"), tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(after[key].tobytes() == tensor.tobytes() for key, tensor in before.items())


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("mixtral", {"tie_word_embeddings": True, "sliding_window": 5, "vocab_size_multiple": 64}),
        ("mixtral", {"moe": {"num_experts": 1, "num_experts_per_tok": 1}}),
        ("qwen3_moe", {"tie_word_embeddings": True, "sliding_window": 5}),
        ("qwen3_moe", {"moe": {"mlp_only_layers": (), "first_k_dense_replace": 2, "decoder_sparse_step": 2}}),
        ("qwen3_moe", {"attention_bias": True, "attention_output_bias": True, "moe": {"norm_topk_prob": True}}),
    ],
    ids=str,
)
def test_our_models_come_back_equal(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model, params = our_model(name, **settings)
    save_pretrained(tmp_path / "hf", model, params, max_shard_bytes=30_000)
    back, back_params = from_pretrained(tmp_path / "hf", compute_dtype="float32")
    assert _meaning(back.config) == _meaning(model.config)
    if "vocab_size_multiple" not in settings:
        assert_same_tree(back_params, params)
    peer = load_peer(tmp_path / "hf")
    import torch

    with torch.no_grad():
        theirs = peer(torch.from_numpy(TOKENS.astype(np.int64))).logits.numpy()
    np.testing.assert_allclose(np.asarray(run(model, params, TOKENS)), theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_routers_begin_anew(dtype: str, tmp_path: Path) -> None:
    """What they count in training stands in no file; steps go on from it, and in 16 bits would lose count."""
    save_pretrained(tmp_path / "hf", *our_model("mixtral"))
    _, params = from_pretrained(tmp_path / "hf", dtype=dtype)
    tracked = params["layers"]["0"]["moe"]["router"]["tracked"]
    first = {"load": 0.2, "utilization": 0.5, "priority": 1.0, "bias": 0.0, "coldness": 0.0, "steps": 0.0}
    assert tracked.keys() == first.keys()
    for name, leaf in tracked.items():
        assert isinstance(leaf, jax.Array) and leaf.dtype == np.float32
        assert leaf.shape == ((3,) if name == "steps" else (3, 5))
        np.testing.assert_array_equal(leaf, np.full(leaf.shape, first[name], np.float32))


def family_of(**settings: Any) -> str:
    return export_family(ByteConfig(**(SMALL | settings))).model_type


def test_a_model_is_exported_as_the_family_that_computes_the_same() -> None:
    assert family_of(moe={"num_experts": 4}) == "mixtral"
    assert family_of(moe={"num_experts": 4, "intermediate_size": 24}, sliding_window=4) == "mixtral"
    assert family_of(moe={"num_experts": 4, "n_group": 2, "topk_group": 2}) == "mixtral"
    assert family_of(moe={"num_experts": 4}, qk_norm=True) == "qwen3_moe"
    assert family_of(moe={"num_experts": 4, "first_k_dense_replace": 1}, qk_norm=True) == "qwen3_moe"
    training = {"noise": "gumbel", "router_warmup_steps": 5, "bias_update_rate": 1e-3, "state_decay": 0.5}
    training |= {"dispatch": "capacity", "capacity_factor": 2.0, "overflow": (), "dynamic_capacity": True}
    assert family_of(moe={"num_experts": 4, **training}) == "mixtral"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"scoring_func": "sigmoid"}, "moe.scoring_func is 'sigmoid', there 'softmax'"),
        ({"n_group": 2}, "moe.n_group is 2, there 1"),
        ({"n_shared_experts": 1}, "moe.n_shared_experts is 1, there 0"),
        ({"routed_scaling_factor": 2.0}, "moe.routed_scaling_factor is 2.0, there 1.0"),
        ({"temperature": 0.5}, "moe.temperature is 0.5, there 1.0"),
        ({"adaptive_temperature": True}, "moe.adaptive_temperature is True, there False"),
        ({"expert_priority": True}, "moe.expert_priority is True, there False"),
        ({"cooling_steps": 5}, "moe.cooling_steps is 5, there 0"),
        ({"dynamic_k": 0.5}, "moe.dynamic_k is 0.5, there None"),
        ({"gate": "context"}, "moe.gate is 'context', there 'linear'"),
        ({"shared_pool": True}, "moe.shared_pool is True, there False"),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_what_the_families_do_not_express_is_named(settings: dict[str, Any], reason: str) -> None:
    config = ByteConfig(**SMALL, moe={"num_experts": 4, **settings})
    for name in ("mixtral", "qwen3_moe"):
        with pytest.raises(ValueError) as caught:
            export_family(config, name)
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(
            f"a Hugging Face directory of the family {name} cannot express this model: "
        ) and reason in str(caught.value)


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("mixtral", {}, "no layer of the model has experts (moe.num_experts is 0)"),
        ("qwen3_moe", {"qk_norm": True}, "no layer of the model has experts (moe.num_experts is 0)"),
        (
            "mixtral",
            {"moe": {"num_experts": 4, "mlp_only_layers": (1,)}},
            "some layers have one MLP, there all have experts",
        ),
        ("mixtral", {"moe": {"num_experts": 4, "norm_topk_prob": False}}, "moe.norm_topk_prob is False, there True"),
        ("llama", {"moe": {"num_experts": 4}}, "moe.num_experts is 4, there 0"),
        ("qwen3", {"qk_norm": True, "moe": {"num_experts": 4}}, "moe.num_experts is 4, there 0"),
    ],
)
def test_a_family_that_is_asked_for_says_why_not(name: str, settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError) as caught:
        export_family(ByteConfig(**(SMALL | settings)), name)
    assert str(caught.value) == (
        f"a Hugging Face directory of the family {name} cannot express this model: {reason}. Leave the family out, to "
        "have one chosen"
    )


def test_biases_of_routers_are_refused(tmp_path: Path) -> None:
    """They decide which experts a token gets, and no tensor of these families has them."""
    model, params = our_model("mixtral", moe={"bias_update_rate": 1e-3})
    save_pretrained(tmp_path / "without", model, params)
    params["layers"]["0"]["moe"]["router"]["tracked"]["bias"][1, 2] = 1e-3
    with pytest.raises(ValueError, match=r"routers choose experts by biases \(moe.bias_update_rate\)"):
        save_pretrained(tmp_path / "hf", model, params, family="mixtral")
    assert not (tmp_path / "hf").exists()


def test_weights_of_noise_are_told_to_be_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_pretrained(tmp_path / "plain", *our_model("mixtral"))
    assert not caplog.messages
    save_pretrained(tmp_path / "hf", *our_model("mixtral", moe={"noise": "noisy_topk"}))
    assert caplog.messages == [
        "a mixtral directory has no place for weights of training alone: layers/0/moe/router/noise"
    ]


def edited(directory: Path, name: str, change: Any, *, fused: bool = False) -> str:
    """The message about a checkpoint of transformers after ``change`` of its tensors."""
    save_peer(directory, name, fused=fused)
    edit_tensors(directory, change)
    with pytest.raises(ValueError) as caught:
        from_pretrained(directory)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(directory))
    return str(caught.value).removeprefix(str(directory))


def test_a_missing_tensor_of_an_expert_is_named(tmp_path: Path) -> None:
    key = "model.layers.2.mlp.experts.4.up_proj.weight"
    found = edited(tmp_path / "a", "qwen3_moe", lambda held: held.pop(key))
    assert found == f": the tensors do not fit config.json: missing {key}"
    key = "model.layers.1.mlp.experts.down_proj"
    found = edited(tmp_path / "b", "mixtral", lambda held: held.pop(key), fused=True)
    assert found == f": the tensors do not fit config.json: missing {key}"


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("said", [4, 7, 2**31 - 1])
def test_another_number_of_experts_is_told(fused: bool, said: int, tmp_path: Path) -> None:
    """Before tensors of so many are listed."""
    directory = save_peer(tmp_path / "peer", "qwen3_moe", fused=fused)
    edit_config(directory, num_local_experts=said)
    with pytest.raises(ValueError) as caught:
        from_pretrained(directory)
    assert str(caught.value) == (
        f"{directory}: a layer with experts has 6 of them in the files, and config.json says {said}: mend config.json, "
        "or copy the files again"
    )


def test_layers_with_fewer_experts_are_told(tmp_path: Path) -> None:
    def less(held: dict[str, np.ndarray]) -> None:
        for key in [key for key in held if ".experts.4." in key or "layers.1.block_sparse_moe.experts.2." in key]:
            del held[key]

    assert edited(tmp_path / "a", "mixtral", less).startswith(": a layer with experts has 3 to 4 of them in the files")
    edit_tensors(tmp_path / "a", lambda held: [held.pop(key) for key in list(held) if "experts" in key])
    with pytest.raises(ValueError, match=r"has 0 of them in the files, and config\.json says 5"):
        from_pretrained(tmp_path / "a")


@pytest.mark.parametrize("spelled", ["experts.down_proj", "experts.{e}.down_proj.weight"], ids=["fused", "listed"])
def test_experts_are_counted_in_layers_that_have_them(spelled: str) -> None:
    """Neither in one that the model lacks, nor in a tensor without axes; what becomes of these is said later."""
    config = ByteConfig(**SMALL, qk_norm=True, moe={"num_experts": 4})

    class Held(dict[str, tuple[int, ...]]):
        names, shape = dict.keys, dict.__getitem__

    def check(layers: dict[int, tuple[int, ...]]) -> None:
        held: Any = Held()
        for layer, (experts, *axes) in layers.items():
            names = {f"model.layers.{layer}.mlp.{spelled}".replace("{e}", str(e)) for e in range(experts)}
            held |= dict.fromkeys(names, tuple(axes))
        as_spelled(FAMILIES["qwen3_moe"], config, held, "here")

    check({0: (4, 4, 8), 9: (5, 5, 8)})
    with pytest.raises(
        ValueError, match=r"^here: a layer with experts has 0 of them in the files, and config\.json says 4"
    ):
        check({9: (4, 4, 8)} | ({0: (1,)} if "{e}" not in spelled else {}))


@pytest.mark.parametrize("name", MODELS)
def test_two_spellings_at_once_are_refused(name: str, tmp_path: Path) -> None:
    fused = tensors(save_peer(tmp_path / "fused", name, fused=True))
    key = "model.layers.1.mlp.experts.down_proj"
    found = edited(tmp_path / "peer", name, lambda held: held.update({key: fused[key]}))
    assert found.startswith(" spells experts in two ways, model.layers.") and f"and {key}" in found
    assert found.endswith(": load it with transformers and save it anew, or copy the files again")


def read(family: str, **values: Any) -> ByteConfig:
    sizes = SMALL | ({"num_local_experts": 4} if family == "mixtral" else {"num_experts": 8})
    values = {name: value for name, value in (sizes | values).items() if value != "absent"}
    return parse_config({"model_type": family, **values}, "here")[1]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_the_number_of_experts_has_two_names(family: str) -> None:
    """Release 4 of transformers writes num_experts of Qwen3, release 5 num_local_experts."""
    for name, other in (("num_experts", "num_local_experts"), ("num_local_experts", "num_experts")):
        assert read(family, **{name: 9, other: "absent"}).moe.num_experts == 9
        with pytest.raises(ValueError, match=r"^here: contradicting values \{'num_experts': \d+, .*\}: keep one"):
            read(family, **{name: 9, other: 10})
        with pytest.raises(ValueError, match=f"^here: {name} is 0: a model without experts is of a family without"):
            read(family, **{name: 0, other: "absent"})
    both = {"num_experts": "absent", "num_local_experts": "absent"}
    assert read(family, **both).moe.num_experts == (8 if family == "mixtral" else 128)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_fields_of_training_are_told(family: str, caplog: pytest.LogCaptureFixture) -> None:
    off = {"router_aux_loss_coef": 0.0, "output_router_logits": False, "router_jitter_noise": 0.0}
    assert read(family, **off) == read(family) and not caplog.messages
    on = {"router_aux_loss_coef": 0.02, "output_router_logits": True, "router_jitter_noise": 0.1, "top_p": 0.5}
    assert read(family, **on) == read(family)
    told = "top_p, router_aux_loss_coef, output_router_logits, router_jitter_noise"
    assert caplog.messages == [f"here: without effect on the logits: {told}"]


@pytest.mark.parametrize(
    ("family", "values", "message"),
    [
        ("qwen3_moe", {"mlp_only_layers": 3}, "mlp_only_layers must be a list of layers, got 3"),
        ("qwen3_moe", {"mlp_only_layers": [7]}, "moe.mlp_only_layers names 7, there are 3 layers from 0"),
        ("qwen3_moe", {"decoder_sparse_step": 4}, "no layer has experts"),
        ("qwen3_moe", {"num_experts_per_tok": 9}, "moe.num_experts_per_tok 9 is above moe.num_experts 8"),
        ("qwen3_moe", {"moe_intermediate_size": None}, "moe_intermediate_size is null: give a value"),
        ("qwen3_moe", {"shared_expert_intermediate_size": 4}, "shared_expert_intermediate_size.*not implemented for"),
        ("qwen3_moe", {"layer_types": ["full_attention"] * 3}, "layer_types.*not implemented for qwen3_moe"),
        (
            "qwen3_moe",
            {"use_sliding_window": True, "max_window_layers": 2},
            "max_window_layers is 2: releases of transformers differ in what it means here: remove it",
        ),
        ("mixtral", {"num_local_experts": "many"}, "num_experts must be int .*, got 'many'"),
        ("mixtral", {"norm_topk_prob": True}, "norm_topk_prob.*: not implemented for mixtral"),
        ("mixtral", {"mlp_only_layers": [1]}, "mlp_only_layers.*: not implemented for mixtral"),
    ],
    ids=str,
)
def test_what_cannot_be_expressed_is_named(family: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^here: .*{message}"):
        read(family, **values)


def test_the_window_of_qwen3_moe_is_of_all_layers() -> None:
    assert read("qwen3_moe", sliding_window=5).windows == (None,) * 3
    assert read("qwen3_moe", sliding_window=5, use_sliding_window=True).windows == (5,) * 3
    assert read("qwen3_moe", max_window_layers=48).windows == (None,) * 3
    assert read("qwen3_moe", sliding_window=5, use_sliding_window=True, max_window_layers=0).windows == (5,) * 3


def test_both_names_are_written() -> None:
    """Release 4 of transformers takes an absent num_experts of Qwen3 for 128, and Mixtral has one name in both."""
    config = ByteConfig(**SMALL, qk_norm=True, moe={"num_experts": 4})
    written = settings_json(FAMILIES["qwen3_moe"], config)
    assert (written["num_experts"], written["num_local_experts"], written["max_window_layers"]) == (4, 4, 0)
    written = settings_json(FAMILIES["mixtral"], config)
    assert written["num_local_experts"] == 4 and "num_experts" not in written


def test_how_experts_are_computed_is_no_part_of_an_export() -> None:
    moe = MoEConfig(num_experts=4, intermediate_size=16, implementation="pallas")
    config = ByteConfig(vocab_size=64, hidden_size=32, num_attention_heads=4, qk_norm=True, moe=moe)
    assert export_family(config).model_type == "qwen3_moe"
