"""Directories of PEFT: equal logits in the library and here, either way, and bad ones that are refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.adapters import adapted, merged_by_hand
from helpers.hf_models import NEEDS_TORCH, small_config
from helpers.variants import call

from stellarbyte_jax.hf.directory import save_pretrained
from stellarbyte_jax.hf.peft import load_adapter, save_adapter
from stellarbyte_jax.lora import split
from stellarbyte_jax.model.decoder import ByteTransformer
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
    "linear": ("llama", {"target_modules": (*LINEAR, "head")}),
    "interleaved, rslora": ("llama interleaved", {"rslora": True, "target_modules": ("q", "k", "embed", "head")}),
    "dora": ("llama", {"dora": True, "target_modules": (*LINEAR, "head")}),
    "saved, some layers": (
        "llama",
        {"layers": (1,), "target_modules": ("v", "down"), "modules_to_save": ("embed", "head", "norms")},
    ),
    "fused": ("phi3", {"rslora": True}),
    "own file": ("stellarbyte", {"dora": True, "modules_to_save": ("norms", "biases")}),
    "experts": ("mixtral", {"target_modules": ("o", "router", "experts"), "layers": (1,)}),
}
SLOW = {
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
    return call(model, params, Inputs(jnp.asarray(TOKENS)))[0]


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
