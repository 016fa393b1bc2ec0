"""Models whose layers have experts: of transformers, in both spellings, and ours that its families express."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.hf_models import NEEDS_TORCH, SMALL, random_model
from helpers.training import flat, nested
from stellarbyte_jax.model.decoder import ByteTransformer
from stellarbyte_jax.model.state.router import first_values, is_tracked

# Settings of transformers, and ours of the same model.
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "mixtral": ("mixtral", {"num_local_experts": 5}, {"intermediate_size": 56, "moe": {"num_experts": 5}}),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "num_hidden_layers": 4,
            "mlp_only_layers": [0, 3],
            "head_dim": 16,
        },
        {
            "num_hidden_layers": 4,
            "head_dim": 16,
            "qk_norm": True,
            "moe": {
                "num_experts": 6,
                "num_experts_per_tok": 3,
                "intermediate_size": 24,
                "mlp_only_layers": (0, 3),
                "norm_topk_prob": False,
            },
        },
    ),
}


def save_peer(directory: Path, name: str, *, fused: bool = False, **more: Any) -> Path:
    """A random model of transformers on disk, as release 4 spells it, or with its experts in one tensor."""
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    from transformers import AutoConfig, AutoModelForCausalLM

    family, settings, _ = MODELS[name]
    torch.set_num_threads(1)  # threads cost more than such a model
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(SMALL | settings | more)))
    for path, weight in model.named_parameters():
        torch.nn.init.normal_(weight, mean=1.0 if "norm" in path else 0.0, std=0.2)
    model.save_pretrained(directory, save_original_format=not fused)
    return directory


def load_peer(directory: Path) -> Any:
    """The model of a directory, of which every tensor is used and none is made up."""
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    from transformers import AutoModelForCausalLM

    model, told = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(told.values()), told
    return model.eval()


def our_model(name: str, **more: Any) -> tuple[ByteTransformer, dict[str, Any]]:
    """A random model of ours whose routers keep nothing yet from training."""
    settings = MODELS[name][2]
    if "moe" in more:
        more |= {"moe": settings["moe"] | more["moe"]}
    model, params = random_model(**(settings | more))
    leaves = flat(params)
    around_0 = {path: leaf if "norm" in path else leaf - np.float32(0.1) for path, leaf in leaves.items()}
    return model, routers_anew(model, nested(around_0))


def routers_anew(model: ByteTransformer, params: dict[str, Any]) -> dict[str, Any]:
    """The weights with what routers keep from step to step as it is before the first one."""
    leaves = flat(params)
    for path, leaf in leaves.items():
        if is_tracked(path):
            leaves[path] = np.full_like(leaf, first_values(model.config.moe.num_experts)[path.rpartition("/")[2]])
    return nested(leaves)
