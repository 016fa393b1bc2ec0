"""Layers of transformers with random weights, and those weights and their gradients as ours."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.model.context import LayerContext
from stellarbyte_jax.model.positions import position_scheme

T = 9

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
# The peer, its settings, and ours for the same layer.
PEERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama, grouped": ("Llama", {}, {}),
    "llama, one head each, wide": ("Llama", {"num_key_value_heads": 4, "head_dim": 12}, {}),
    "llama, biases, geglu": (
        "Llama",
        {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
        {"attention_output_bias": True},
    ),
    "llama, tanh": ("Llama", {"hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-2}, {}),
    "qwen2": ("Qwen2", {}, {"attention_bias": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}, {"qk_norm": True}),
}


def make_peer(name: str) -> tuple[Any, Any, ByteConfig]:
    """A decoder layer of transformers, its rotary embedding, and our config of the same layer."""
    torch = pytest.importorskip("torch", reason="the peer is transformers on torch: pip install -e '.[torch]'")
    import transformers

    family, settings, ours = PEERS[name]
    module = getattr(transformers.models, family.lower())
    modeling = __import__(f"{module.__name__}.modeling_{family.lower()}", fromlist=[family])
    config = getattr(transformers, f"{family}Config")(**{"rms_norm_eps": 1e-5, **SMALL, **settings})
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    layer = getattr(modeling, f"{family}DecoderLayer")(config, 0)
    for key, weight in layer.named_parameters():
        torch.nn.init.normal_(weight, mean=1.0 if "norm" in key else 0.0, std=0.2)
    ours = {**SMALL, **settings, **ours, "compute_dtype": "float32"}
    return layer, getattr(modeling, f"{family}RotaryEmbedding")(config), ByteConfig(**ours)


def as_ours(layer: Any, config: ByteConfig, *, gradients: bool = False) -> dict[str, Any]:
    """Weights of the layer, or their gradients, in our tree."""
    D, N, K, H = config.hidden_size, config.num_attention_heads, config.kv_heads, config.head_size

    def array(weight: Any) -> np.ndarray:
        if not gradients:
            return weight.detach().numpy()
        return np.zeros(weight.shape, np.float32) if weight.grad is None else weight.grad.numpy()

    attn, mlp = layer.self_attn, layer.mlp
    found = {"attn": {}, "mlp": {}, "attn_norm": {}, "mlp_norm": {}}
    for name, heads in (("q", N), ("k", K), ("v", K)):
        projection = getattr(attn, f"{name}_proj")
        found["attn"][name] = array(projection.weight).T.reshape(D, heads, H)
        if projection.bias is not None:
            found["attn"][f"{name}_bias"] = array(projection.bias).reshape(heads, H)
    found["attn"]["o"] = array(attn.o_proj.weight).T.reshape(N, H, D)
    if attn.o_proj.bias is not None:
        found["attn"]["o_bias"] = array(attn.o_proj.bias)
    if config.qk_norm:
        for name in ("q_norm", "k_norm"):
            found["attn"][name] = {"scale": array(getattr(attn, name).weight)}
    both = [array(x.weight).T for x in (mlp.gate_proj, mlp.up_proj)]
    found["mlp"] = {"gate_up": np.stack(both, axis=1), "down": array(mlp.down_proj.weight).T}
    if mlp.gate_proj.bias is not None:
        found["mlp"]["gate_up_bias"] = np.stack([array(x.bias) for x in (mlp.gate_proj, mlp.up_proj)])
        found["mlp"]["down_bias"] = array(mlp.down_proj.bias)
    found["attn_norm"]["scale"] = array(layer.input_layernorm.weight)
    found["mlp_norm"]["scale"] = array(layer.post_attention_layernorm.weight)
    return found


def compare(layer, config, part, theirs, ours):
    """Results, and the gradients of their product with some cotangent; ``part`` is ours of the layer's weights."""
    import torch

    random = np.random.default_rng(0)
    x, g = (random.normal(size=(2, T, config.hidden_size)).astype(np.float32) for _ in range(2))
    their_x = torch.from_numpy(x).requires_grad_()
    expected = theirs(their_x)
    expected.backward(torch.from_numpy(g))
    params = jax.device_put(part(as_ours(layer, config)))
    found, pull = jax.vjp(jax.jit(ours), params, jax.device_put(x))
    np.testing.assert_allclose(found, expected.detach().numpy(), atol=1e-5)
    slopes, x_slope = pull(jax.device_put(g))
    np.testing.assert_allclose(x_slope, their_x.grad.numpy(), atol=1e-5)
    their_slopes = part(as_ours(layer, config, gradients=True))
    assert jax.tree.structure(slopes) == jax.tree.structure(their_slopes)
    for a, b in zip(jax.tree.leaves(slopes), jax.tree.leaves(their_slopes), strict=True):
        assert np.abs(b).max() > 0
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, np.abs(b).max()))


def context(config):
    positions = jnp.arange(T, dtype=jnp.int32)[None]
    rope = position_scheme(config).frequencies(positions, None, positions >= 0, cached=False)
    return LayerContext(jnp.repeat(positions, 2, axis=0), positions, None, rope)


def their_arguments(rotary):
    import torch

    positions = torch.arange(T)[None]
    mask = torch.full((T, T), -1e30).triu(1)[None, None]
    return {"position_embeddings": rotary(torch.zeros(1), positions), "attention_mask": mask}
