"""Adapters beside PEFT's: equal logits and gradients with the same A, B and magnitudes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.adapters import adapted
from helpers.hf_models import NEEDS_TORCH, small_config
from helpers.variants import call

from stellarbyte_jax.hf.directory import save_pretrained
from stellarbyte_jax.lora import split
from stellarbyte_jax.model.decoder import ByteTransformer, trained
from stellarbyte_jax.model.io import Inputs
from stellarbyte_jax.model.trees import merge, partition

torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
peft = pytest.importorskip("peft", reason="pip install peft")
import transformers  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning")  # what PEFT asks of transformers
CONFIG = dataclasses.replace(small_config(), num_hidden_layers=2)
PROJECTIONS = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj"}
PROJECTIONS |= {"gate_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj", "down": "mlp.down_proj"}
OURS = ("q", "k", "v", "o", "gate_up", "down")
KINDS = {
    "lora": {"target_modules": (*OURS, "head")},
    "rslora and embedding": {"rslora": True, "lora_alpha": 3.0, "target_modules": ("q", "embed")},
    "dora": {"dora": True, "target_modules": (*OURS, "head")},
    "some layers": {"layers": (1,), "target_modules": ("v", "down")},
}


def factors(params):
    """Of each of their modules our A [R, in], B [out, R] and magnitude [out], as torch has them."""
    found = {}

    def take(tree, name, module, layer=None, slot=None):
        if name + "_lora_a" not in tree:
            return
        a, b, m = (
            None if x is None else np.asarray(x if layer is None else x[layer])
            for x in (tree[name + "_lora_a"], tree[name + "_lora_b"], tree.get(name + "_lora_m"))
        )
        if slot is not None:
            a, b, m = a[slot], b[slot], None if m is None else m[slot]
        r = b.shape[0]
        found[module] = a.reshape(-1, r).T, b.reshape(r, -1).T, None if m is None else m.reshape(-1)

    for layer in range(CONFIG.num_hidden_layers):
        tree = params["layers"]["0"]
        for name in ("q", "k", "v", "o"):
            take(tree["attn"], name, f"model.layers.{layer}.{PROJECTIONS[name]}", layer)
        for slot, name in enumerate(("gate_proj", "up_proj")):
            take(tree.get("mlp", {}), "gate_up", f"model.layers.{layer}.{PROJECTIONS[name]}", layer, slot)
        take(tree.get("mlp", {}), "down", f"model.layers.{layer}.{PROJECTIONS['down']}", layer)
    take(params.get("lm_head", {}), "kernel", "lm_head")
    if "embedding_lora_a" in params.get("embed", {}):
        a, b = (np.asarray(params["embed"][f"embedding_lora_{part}"]) for part in "ab")
        found["model.embed_tokens"] = a.T, b.T, None
    return found


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("peft") / "base"
    params = adapted(CONFIG)[1]
    save_pretrained(path, ByteTransformer(CONFIG), split(params)[1])
    return path


def peer_of(directory, kind, theirs):
    lora = {"lora_alpha": 16.0, **KINDS[kind]}
    peer = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    config = peft.LoraConfig(
        r=3,
        lora_alpha=lora["lora_alpha"],
        use_rslora=lora.get("rslora", False),
        use_dora=lora.get("dora", False),
        target_modules=list(theirs),
        task_type="CAUSAL_LM",
    )
    tuned = peft.get_peft_model(peer, config).eval()
    for name, module in tuned.named_modules():
        of = name.removeprefix("base_model.model.")
        if of not in theirs:
            continue
        a, b, m = (None if x is None else torch.tensor(x) for x in theirs[of])
        table = of.endswith("embed_tokens")
        (module.lora_embedding_A if table else module.lora_A)["default"] = _holding(a, table)
        (module.lora_embedding_B if table else module.lora_B)["default"] = _holding(b, table)
        if m is not None:
            module.lora_magnitude_vector["default"].weight.data.copy_(m)
    return tuned


def _holding(x, table):
    if table:
        return torch.nn.Parameter(x)
    layer = torch.nn.Linear(x.shape[1], x.shape[0], bias=False)
    layer.weight.data.copy_(x)
    return layer


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_those_of_peft(kind, directory):
    model, params = adapted(CONFIG, **KINDS[kind])
    trainable, frozen = partition(params, trained(model))
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 9), dtype=np.int32)
    weights = np.random.default_rng(1).standard_normal((2, 9, CONFIG.vocab_size)).astype(np.float32)

    @jax.jit
    def ours(trainable):
        logits = call(model, merge(trainable, frozen), Inputs(jax.device_put(tokens)))[0]
        return jnp.sum(logits * weights), logits

    (_, logits), slopes = jax.value_and_grad(ours, has_aux=True)(trainable)
    theirs = factors(params)
    if layers := KINDS[kind].get("layers"):
        theirs = {name: x for name, x in theirs.items() if int(name.split(".")[2]) in layers}
    peer = peer_of(directory, kind, theirs)
    found = peer(torch.tensor(tokens, dtype=torch.long)).logits
    (found * torch.tensor(weights)).sum().backward()
    expected = found.detach().numpy()
    np.testing.assert_allclose(logits, expected, atol=2e-5 * np.abs(expected).max())

    wanted = factors(slopes)
    seen = 0
    for name, module in peer.named_modules():
        of = name.removeprefix("base_model.model.")
        if of not in theirs:
            continue
        table = of.endswith("embed_tokens")
        held = (
            (module.lora_embedding_A["default"], module.lora_embedding_B["default"])
            if table
            else (module.lora_A["default"].weight, module.lora_B["default"].weight)
        )
        if wanted[of][2] is not None:
            held += (module.lora_magnitude_vector["default"].weight,)
        for found, slope in zip(wanted[of], held, strict=False):
            slope = slope.grad.numpy()
            np.testing.assert_allclose(found, slope, atol=5e-5 * np.abs(slope).max(), err_msg=of)
            seen += 1
    assert seen >= 2 * len(theirs)
