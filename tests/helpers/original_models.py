"""Tiny checkpoints of the original StellarByte with random weights, in both of its layouts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

# Where they are the defaults, a checkpoint without a config means the same.
SEED: dict[str, Any] = {
    "vocab_size": 29,
    "model_dim": 24,
    "num_layers": 2,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "hidden_dim": 20,
    "max_seq_len": 2048,
    "layer_norm_eps": 1e-5,
    "xpos_rope_theta": 10000.0,
    "xpos_scale_base": 512,
}
DECEMBER: dict[str, Any] = {
    "vocab_size": 31,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 20,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
}
# What the original's config classes write beside that.
SEED_REST: dict[str, Any] = {
    "dim_multiplier": 4,
    "drop_path_prob": 0.0,
    "hidden_dropout_prob": 0.1,
    "attention_dropout_prob": 0.1,
    "residual_dropout_prob": 0.1,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "use_flash_attention": False,
    "use_cache": True,
    "key_cache_dtype": "float16",
    "value_cache_dtype": "float16",
    "model_parallel_size": 1,
    "tensor_parallel_size": 1,
    "tensor_parallel_rank": 0,
    "use_causal": True,
    "layerscale_init": 1e-5,
    "model_type": "stellarbyte_model",
}
DECEMBER_REST: dict[str, Any] = {
    "hidden_act": "silu",
    "flash_attn": True,
    "max_position_embeddings": 32768,
    "inference_rope_scaling": False,
    "rope_scaling": None,
    "dropout": 0.0,
    "use_moe": False,
    "num_experts_per_tok": 2,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "scoring_func": "softmax",
    "aux_loss_alpha": 0.01,
    "seq_aux": True,
    "norm_topk_prob": True,
    "use_cache": True,
    "dtype": "bfloat16",
    "initializer_range": 0.02,
    "verbose_init": False,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "model_type": "stellarbytecasualmodel",
}


def _random(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    numbers = np.random.default_rng(7)
    return {
        name: np.float32(0.2) * numbers.standard_normal(shape, "f4") + np.float32(0.1 if len(shape) > 1 else 0.8)
        for name, shape in shapes.items()
    }


def seed_state(**changes: Any) -> dict[str, np.ndarray]:
    """A state dict of the layout ``seed``."""
    c = SEED | changes
    V, D, F = c["vocab_size"], c["model_dim"], c["hidden_dim"]
    d = D // c["num_attention_heads"]
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (V, D)}
    for i in range(c["num_layers"]):
        layer = f"layers.{i}."
        shapes |= {layer + name: (D,) for name in ("norm_attn.weight", "norm_ffn.weight", "ls_attn", "ls_mlp")}
        shapes |= {f"{layer}self_attn.W_{n}.weight": (D, D) for n in "qo"}
        shapes |= {f"{layer}self_attn.W_{n}.weight": (c["num_kv_heads"] * d, D) for n in "kv"}
        shapes |= {layer + "self_attn.rotary.log_scale_weight": (d // 2,), layer + "mlp.w13.weight": (2 * F, D)}
        shapes |= {layer + "mlp.w2.weight": (D, F), layer + "mlp.norm.weight": (D,)}
    state = _random({**shapes, "norm.weight": (D,), "lm_head.weight": (V, D)})
    if c.get("tie_word_embeddings"):
        state["lm_head.weight"] = state["embed_tokens.weight"]
    return state


def december_state(**changes: Any) -> dict[str, np.ndarray]:
    """A state dict of the layout ``december``."""
    c = DECEMBER | changes
    V, D, F = c["vocab_size"], c["hidden_size"], c["intermediate_size"]
    keys = c["num_key_value_heads"] * D // c["num_attention_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D)}
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}{n}_layernorm.weight": (D,) for n in ("input", "post_attention")}
        shapes |= {f"{layer}self_attn.{n}_proj.weight": (D, D) for n in "qo"}
        shapes |= {f"{layer}self_attn.{n}_proj.weight": (keys, D) for n in "kv"}
        shapes |= {f"{layer}mlp.{n}_proj.weight": (F, D) for n in ("gate", "up")}
        shapes |= {layer + "mlp.down_proj.weight": (D, F)}
    state = _random({**shapes, "model.norm.weight": (D,), "lm_head.weight": (V, D)})
    if c.get("tie_word_embeddings"):
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return state


def saved(path: Path, state: dict[str, np.ndarray]) -> Path:
    """The tensors as a safetensors file, which needs no torch."""
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in state.items()}, path)
    return path


def saved_config(path: Path, **values: Any) -> Path:
    """A JSON file."""
    path.write_text(json.dumps(values))
    return path
