"""Directories of PEFT: equal logits in the library and here, either way, and bad ones that are refused."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from helpers.adapters import adapted, merged_by_hand
from helpers.hf_models import NEEDS_TORCH, edit_config, small_config
from helpers.variants import call

from stellarbyte_jax.checkpoint.source import find_source
from stellarbyte_jax.checkpoint.weights import save_initial
from stellarbyte_jax.cli.convert import main as convert
from stellarbyte_jax.hf.directory import from_pretrained, save_pretrained
from stellarbyte_jax.hf.families import FAMILIES
from stellarbyte_jax.hf.peft import load_adapter, save_adapter
from stellarbyte_jax.hf.settings import config_json
from stellarbyte_jax.lora import split
from stellarbyte_jax.model.decoder import ByteTransformer, param_shapes
from stellarbyte_jax.model.io import Inputs
from stellarbyte_jax.model.lora import is_learnt

torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
peft = pytest.importorskip("peft", reason="pip install peft")
import transformers  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning"),  # what PEFT asks of transformers
    # PEFT looks for the patterns of parameters among modules alone, and then finds them.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.*save_embedding_layers:UserWarning"),
]
SMALL = {"num_hidden_layers": 2, "intermediate_size": 24}
LINEAR = ("q", "k", "v", "o", "gate_up", "down")
OWN = {"rope_pairing": "interleaved", "parallel_residual": True, "attention_bias": True, "mlp_style": "stellarbyte"}
MOE = {"num_experts": 3, "num_experts_per_tok": 2, "intermediate_size": 12}
BASES = {
    "llama": {},
    "llama interleaved": {"rope_pairing": "interleaved", "vocab_size_multiple": 64},
    "llama tied": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 5},
    "qwen2": {"attention_bias": True, "head_dim": 8},
    "qwen3": {"qk_norm": True, "head_dim": 12},
    "phi3": {},
    "phi3 interleaved": {"rope_pairing": "interleaved", "vocab_size_multiple": 64},
    "stellarbyte": OWN,
    "mixtral": {"moe": MOE},
    "qwen3_moe": {"qk_norm": True, "moe": {**MOE, "first_k_dense_replace": 1}},
    "stellarbyte experts": {
        **OWN,
        "mlp_style": "gated",
        "moe": {**MOE, "first_k_dense_replace": 1, "n_shared_experts": 1},
    },
    "stellarbyte pool": {**OWN, "mlp_style": "gated", "moe": {**MOE, "shared_pool": True}},
}
QUICK = {
    "dora": ("llama", {"dora": True, "target_modules": (*LINEAR, "head")}),
    "fused": ("phi3 interleaved", {"rslora": True, "target_modules": (*LINEAR, "embed", "head")}),
}
SLOW = {
    "interleaved": ("llama interleaved", {"dora": True, "modules_to_save": ("embed", "head")}),
    "linear": ("llama", {"target_modules": (*LINEAR, "head")}),
    "saved, some layers": (
        "llama",
        {"layers": (1,), "target_modules": ("v", "down"), "modules_to_save": ("embed", "head", "norms")},
    ),
    "own file": ("stellarbyte", {"dora": True, "modules_to_save": ("norms", "biases")}),
    "experts": ("mixtral", {"target_modules": ("o", "router", "experts"), "layers": (1,)}),
    "tied": ("llama tied", {"target_modules": ("q", "embed")}),
    "tied, saved": ("llama tied", {"modules_to_save": ("embed",)}),
    "windows": ("mistral", {"rslora": True, "target_modules": ("attention", "down")}),
    "biases": ("qwen2", {"target_modules": ("q", "o"), "modules_to_save": ("biases",)}),
    "norms of heads": ("qwen3", {"dora": True, "modules_to_save": ("norms",)}),
    "fused, dora": ("phi3", {"dora": True}),
    "a part of what is fused": ("phi3", {"target_modules": ("q", "down")}),
    "qwen3_moe": ("qwen3_moe", {"target_modules": ("attention", "router", "experts")}),
    "own experts": ("stellarbyte experts", {"target_modules": ("all-linear", "experts", "shared", "router")}),
    "shared alone": ("stellarbyte experts", {"target_modules": ("shared",)}),
    "pool": ("stellarbyte pool", {"target_modules": ("q", "experts")}),
}
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 9), dtype=np.int32)


def base_config(base):
    return dataclasses.replace(small_config(), **SMALL, **BASES[base])


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Directories of bases, written when they are asked for."""
    made = {}

    def directory(base):
        if base not in made:
            made[base] = tmp_path_factory.mktemp("peft") / "base"
            save_pretrained(made[base], *learnt(base, {}), family=base.partition(" ")[0])
        return made[base]

    return directory


def learnt(base, lora):
    """A network with adapters, and weights that are random where they are trained."""
    model, params = adapted(base_config(base), **lora)
    if not base.startswith("stellarbyte"):  # other families have no biases of routers
        params = jax.tree_util.tree_map_with_path(lambda path, x: x * 0 if path[-1].key == "bias" else x, params)
    if not lora:
        return ByteTransformer(base_config(base)), split(params)[1]
    numbers = np.random.default_rng(5)

    def moved(path, x):
        if not is_learnt(model.config.lora, tuple(key.key for key in path)) or "_lora_" in path[-1].key:
            return x
        return x + np.float32(0.1) * numbers.standard_normal(x.shape, np.float32)

    return model, jax.tree_util.tree_map_with_path(moved, params)


def ours(model, params):
    config = dataclasses.replace(model.config.without_adapters, vocab_size_multiple=1, compute_dtype="float32")
    plain = ByteTransformer(config)
    merged = merged_by_hand(params)
    V = model.config.vocab_size
    merged["embed"]["embedding"] = merged["embed"]["embedding"][:V]
    if "lm_head" in merged:
        merged["lm_head"]["kernel"] = merged["lm_head"]["kernel"][:, :V]
    return np.asarray(_logits(plain, merged))


@jax.jit(static_argnums=0)
def _logits(model, params):
    return call(model, params, Inputs(jax.device_put(TOKENS)))[0]


def theirs(base, adapter=None):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base, attn_implementation="eager", trust_remote_code=True, dtype=torch.float32
    ).eval()
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter).eval()
    return model


def logits_of(peer):
    with torch.no_grad():
        return peer(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()


def check(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max()))


CASES = [*QUICK.items(), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW.items())]


@pytest.mark.parametrize(("name", "case"), CASES, ids=[*QUICK, *SLOW])
def test_an_export_gives_peft_and_the_import_equal_logits(name, case, bases, tmp_path):
    base, lora = case
    model, params = learnt(base, lora)
    save_adapter(tmp_path / "adapter", model, params, base=bases(base))
    expected = ours(model, params)
    assert np.abs(expected - ours(*learnt(base, {}))).max() > 0.01
    check(logits_of(theirs(bases(base), tmp_path / "adapter")), expected)
    read, back = load_adapter(tmp_path / "adapter")
    check(ours(read, back), expected)
    settings, others = (dataclasses.replace(each.config.lora, layers=None) for each in (model, read))
    for field in ("r", "rslora", "dora", "targets"):
        assert getattr(settings, field) == getattr(others, field), field


@pytest.fixture(scope="module")
def exported(bases, tmp_path_factory):
    """A directory of an adapter, never changed."""
    path = tmp_path_factory.mktemp("exported") / "adapter"
    save_adapter(path, *learnt("llama", QUICK["dora"][1]), base=bases("llama"))
    return path


PATTERNS = {
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj", "gate_proj", "lm_head"],
    "rank_pattern": {"v_proj": 2, "model.layers.1.self_attn.q_proj": 6},
    "alpha_pattern": {"q_proj": 5},
    "use_rslora": True,
}
MADE_QUICK = {"patterns": ("llama", PATTERNS)}
MADE_SLOW = {
    "dora, layers": (
        "llama",
        {"use_dora": True, "target_modules": ["o_proj", "down_proj"], "layers_to_transform": [1], "lora_dropout": 0.1},
    ),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "k_proj"]}),
    "saved": (
        "llama",
        {"target_modules": r".*\.1\.mlp\..*_proj", "modules_to_save": ["embed_tokens", "lm_head", "input_layernorm"]},
    ),
    "biases": ("qwen2", {"target_modules": ["q_proj", "o_proj"], "bias": "all"}),
    "biases of targets": (
        "qwen2",
        {"target_modules": "all-linear", "bias": "lora_only", "exclude_modules": ["v_proj"]},
    ),
    "tied": ("llama tied", {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}),
    "tied, saved": (
        "llama tied",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "windows": ("mistral", {"target_modules": "all-linear"}),
    "norms of heads": ("qwen3", {"target_modules": ["k_proj"], "modules_to_save": ["q_norm"]}),
    "fused": ("phi3", {"target_modules": "all-linear", "use_dora": True}),
    "own file": ("stellarbyte", {"target_modules": "all-linear", "use_rslora": True}),
    "experts": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj", "gate.weight"]}),
    "experts by names of release 4": ("mixtral", {"target_modules": ["w1", "w2", "w3", "gate"]}),
    "own experts": (
        "stellarbyte experts",
        {"target_modules": ["shared_experts.up_proj"], "target_parameters": ["gate_up_proj", "down_proj"]},
    ),
}
MADE = [*MADE_QUICK.items(), *(pytest.param(*case, marks=pytest.mark.slow) for case in MADE_SLOW.items())]


def made_by_peft(base, path, settings):
    """Writes an adapter with random numbers, and returns PEFT's logits."""
    tuned = peft.get_peft_model(theirs(base), peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    tuned.save_pretrained(path)
    return logits_of(tuned)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("name", "case"), MADE, ids=[*MADE_QUICK, *MADE_SLOW])
def test_an_adapter_of_peft_has_equal_logits_here(name, case, bases, tmp_path, caplog):
    base, settings = case
    expected = made_by_peft(bases(base), tmp_path / "adapter", settings)
    assert np.abs(expected - ours(*learnt(base, {}))).max() > 0.01
    check(ours(*load_adapter(tmp_path / "adapter")), expected)
    assert ("ranks are padded with zeros to 6" in caplog.text) == (name == "patterns")


@pytest.mark.slow
def test_adapters_of_listed_experts_are_read_as_peft_reads_them(bases, tmp_path):
    """Files of release 4 of transformers, with A and B for each expert."""
    from safetensors.numpy import save_file

    numbers = np.random.default_rng(2)
    config = base_config("mixtral")
    D, F = config.hidden_size, config.expert_size
    held = {}
    for layer, expert, (name, (i, o)) in (
        (layer, expert, each)
        for layer in range(2)
        for expert in range(3)
        for each in {"w1": (D, F), "w3": (D, F), "w2": (F, D)}.items()
    ):
        stem = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
        held[f"{stem}.lora_A.weight"] = numbers.standard_normal((2, i), np.float32)
        held[f"{stem}.lora_B.weight"] = numbers.standard_normal((o, 2), np.float32)
    path = tmp_path / "adapter"
    path.mkdir()
    save_file(held, path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 1, "target_modules": ["w1", "w2", "w3"]}
    settings["base_model_name_or_path"] = str(bases("mixtral"))
    (path / "adapter_config.json").write_text(json.dumps(settings))
    check(ours(*load_adapter(path)), logits_of(theirs(bases("mixtral"), path)))


def test_a_run_is_written_for_peft_and_read_as_any_model(bases, tmp_path, capsys, exported):
    model, params = learnt("llama", QUICK["dora"][1])
    save_initial(tmp_path / "run", model.config, params, str(tmp_path / "none"))
    run, target = str(tmp_path / "run"), tmp_path / "adapter"
    assert convert(["to-peft", run, str(target), "--base", str(bases("llama"))]) == 0
    assert f"wrote {target}: adapters of {bases('llama')}\n" in capsys.readouterr().out
    names = ("README.md", "adapter_config.json", "adapter_model.safetensors")
    assert {path.name for path in target.iterdir()} == set(names)
    for name in names:
        assert (target / name).read_bytes() == (exported / name).read_bytes()
    settings = json.loads((target / "adapter_config.json").read_text())
    assert settings["target_modules"] == [
        *("down_proj", "gate_proj", "k_proj", "lm_head", "o_proj", "q_proj", "up_proj", "v_proj")
    ]
    assert (settings["r"], settings["lora_alpha"], settings["use_dora"], settings["rank_pattern"]) == (3, 16, True, {})

    source = find_source(target)
    config, merged = source.weights()
    check(ours(type(model)(config), merged), ours(model, params))
    assert source.settings() == (source.model_config(), bases("llama"), True) and config == source.model_config()
    assert source.name() == str(target) and not source.is_plain_text()
    with pytest.raises(ValueError, match="is not empty: give another directory, or ask to overwrite it"):
        save_adapter(target, model, params, base=bases("llama"))
    save_adapter(target, model, params, base=bases("llama"), overwrite=True)
    with pytest.raises(ValueError, match=r"no model \(no adapter_config\.json\), so it is not overwritten"):
        save_adapter(bases("llama"), model, params, base=bases("llama"), overwrite=True)


def edited(exported, tmp_path, change=None, **settings):
    """A copy of an adapter with other settings, or other tensors."""
    from safetensors.numpy import load_file, save_file

    path = shutil.copytree(exported, tmp_path / "adapter")
    if change is not None:
        file = path / "adapter_model.safetensors"
        held = load_file(file)
        change(held)
        save_file(held, file)
    values = json.loads((path / "adapter_config.json").read_text()) | settings
    (path / "adapter_config.json").write_text(json.dumps({k: v for k, v in values.items() if v != "absent"}))
    return path


Q = "base_model.model.model.layers.0.self_attn.q_proj"
BAD = {
    "another method": ({"peft_type": "LOHA"}, None, r"peft_type is 'LOHA'; only LORA is read: merge it into its base"),
    "no method": ({"peft_type": "absent"}, None, "peft_type is None; only LORA is read"),
    "a base that changes": ({"init_lora_weights": "pissa"}, None, "'pissa', by which the base changes when"),
    "unknown field": ({"use_other": True}, None, "use_other: not implemented, nor known to be without effect: merge"),
    "no base": ({"base_model_name_or_path": None}, None, "name the model that the adapter was trained on there"),
    "base elsewhere": ({"base_model_name_or_path": "/no/such"}, None, r"path: /no/such does not exist: let it name"),
    "no number": ({"r": "four"}, None, "r is 'four': it must be a whole number from 1 on"),
    "no pattern": ({"rank_pattern": {"(": 2}}, None, r"rank_pattern has '\(', which is no pattern"),
    "another rank": ({"r": 5}, None, r"has rank 3, .*adapter_config\.json says 5 \(r, rank_pattern\): copy both"),
    "no magnitudes": ({"use_dora": False}, None, "has A, B, magnitude of its adapter, and .* asks for A, B: copy both"),
    "half": (
        {},
        lambda held: held.pop(f"{Q}.lora_B.weight"),
        "q_proj has A, magnitude of its adapter, and .* asks",
    ),
    "unknown module": (
        {},
        lambda held: held.update({f"{Q[:-6]}x_proj.lora_A.weight": np.zeros((3, 32), np.float32)}),
        r"holds model\.layers\.0\.self_attn\.x_proj\.lora_\*, which LlamaForCausalLM of .* does not have: let base",
    ),
    "unknown tensor": (
        {},
        lambda held: held.update({"base_model.model.score.weight": np.zeros((2, 32), np.float32)}),
        r"holds score\.weight, which",
    ),
    "dora of an embedding": (
        {},
        lambda held: held.update(
            {
                f"base_model.model.model.embed_tokens.lora_{name}": np.zeros(shape, np.float32)
                for name, shape in (("embedding_A", (3, 96)), ("embedding_B", (32, 3)), ("magnitude_vector", 32))
            }
        ),
        "use_dora of an embedding is not implemented: merge it",
    ),
    "nothing": ({}, lambda held: held.clear(), "holds no adapter"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_adapter_is_refused(name, exported, tmp_path):
    settings, change, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        load_adapter(edited(exported, tmp_path, change, **settings))


def test_an_adapter_of_another_base_and_bad_files_are_refused(exported, bases, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(bases("llama") / "config.json", other)
    edit_config(other, hidden_size=48, head_dim=8)
    path = edited(exported, tmp_path, base_model_name_or_path=str(other))
    message = r"does not fit .*other: .*lm_head\.lora_A\.weight has shape \(3, 32\), .* \(3, 48\).*: let base"
    with pytest.raises(ValueError, match=message):
        load_adapter(path)
    edit_config(other, hidden_size=32, tie_word_embeddings=True)
    with pytest.raises(ValueError, match="ensure_weight_tying is false, so PEFT changes embedding and head apart"):
        load_adapter(path)
    parts = {"A": np.zeros((3, 96), np.float32), "B": np.zeros((32, 3), np.float32)}
    table = {f"base_model.model.model.embed_tokens.lora_embedding_{part}": array for part, array in parts.items()}
    settings = {"base_model_name_or_path": str(other), "ensure_weight_tying": True, "alpha_pattern": {"lm_head": 3}}
    with pytest.raises(ValueError, match=r"of model\.embed_tokens by 5\.33333 and that of lm_head by 1, which are one"):
        load_adapter(edited(exported, tmp_path / "tied", lambda held: held.update(table), **settings))
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"only as adapter_model\.bin, a pickle, .*Write safetensors beside it once:"):
        load_adapter(path)
    (path / "adapter_model.bin").unlink()
    with pytest.raises(ValueError, match=r"no adapter_model\.safetensors: copy the missing file"):
        load_adapter(path)
    with pytest.raises(ValueError, match=r"is not applied here: load it onto its base with stellarbyte_jax\.load_run"):
        from_pretrained(exported)


REFUSED = {
    "none": ("llama", {"r": 0}, "the model has no adapters"),
    "not linear": ("llama", {"activation": "silu"}, "PEFT has no adapters with lora.activation=silu"),
    "another base": ("mistral", {}, "is not the base of these adapters: sliding_window is"),
    "moving routers": ("stellarbyte experts", {}, "no place for biases of routers that training moves"),
    "dora of experts": ("mixtral", {"dora": True, "target_modules": ("experts",)}, "no DoRA of experts"),
    "dora of a part": ("phi3", {"dora": True, "target_modules": ("q",)}, "let lora.target_modules name all of it"),
    "dense beside experts": ("qwen3_moe", {"target_modules": ("down",)}, "for those of experts, so it has no adapters"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_peft_cannot_hold_is_refused(name, tmp_path):
    base, lora, message = REFUSED[name]
    config = dataclasses.replace(base_config(base), lora={"r": 3, **lora} if lora.get("r", 3) else {})
    if name == "moving routers":
        config = dataclasses.replace(config, moe={**config.moe.to_dict(), "bias_update_rate": 0.1})
    there = tmp_path / "base"
    there.mkdir()
    family = FAMILIES["llama" if name == "another base" else base.partition(" ")[0]]
    plain = base_config("llama") if name == "another base" else config.without_adapters
    (there / "config.json").write_text(json.dumps(config_json(family, plain, "float32", {})))
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), param_shapes(ByteTransformer(config)))
    with pytest.raises(ValueError, match=message):
        save_adapter(tmp_path / "adapter", ByteTransformer(config), params, base=there)
    assert not (tmp_path / "adapter").exists()
