"""The modelling file, and experts as files spell them, in earlier releases of transformers, which pip fetches."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import older_transformers
from helpers.hf_experts import routers_anew
from helpers.hf_models import NEEDS_TORCH, random_model
from helpers.variants import run

from stellarbyte_jax import generate
from stellarbyte_jax.hf.directory import save_pretrained

MIXED = ("full_attention", "sliding_attention", "full_attention")
# What releases of 4 need and later ones do not, without torch, which is here.
WITH_IT = ("huggingface_hub==0.36.2", "requests", "urllib3", "idna", "certifi", "charset-normalizer")
MODELS = {
    "own": {
        "position_embedding": "xpos",
        "xpos_learnable": True,
        "xpos_scale_base": 20.0,
        "parallel_residual": True,
        "layer_scale_init": 0.5,
        "qk_norm": True,
    },
    "original": {"position_embedding": "stellarbyte", "mlp_style": "stellarbyte", "rms_norm_eps_rule": "clamp"},
    "deepnorm": {"residual_scaling": "deepnorm", "attention_logit_softcap": 2.0},
    "sinks": {"sliding_window": 4, "sink_tokens": 2},
    "windows": {"sliding_window": 5, "layer_types": MIXED, "rope_pairing": "interleaved"},
    "experts": {
        "moe": {
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "scoring_func": "sigmoid",
            "n_group": 3,
            "topk_group": 2,
            "dynamic_k": 0.7,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "noise": "noisy_topk",
        },
        "parallel_residual": True,
    },
    "pool": {"moe": {"num_experts": 4, "shared_pool": True, "gate": "context", "context_size": 6, "temperature": 0.5}},
    "mixtral": {"moe": {"num_experts": 4}},
    "qwen3_moe": {
        "qk_norm": True,
        "sliding_window": 5,
        "moe": {"num_experts": 4, "intermediate_size": 24, "mlp_only_layers": (1,), "norm_topk_prob": False},
    },
    "tied": {"tie_word_embeddings": True, "parallel_residual": True, "vocab_size_multiple": 64},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("release", "tokenizers"), [("4.52.4", "tokenizers==0.21.4"), ("4.57.6", "tokenizers==0.22.2")]
)
def test_exports_are_read_by(release: str, tokenizers: str, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason=NEEDS_TORCH)
    packages = tmp_path / "packages"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(packages)]
    done = subprocess.run([*install, f"transformers=={release}", tokenizers, *WITH_IT], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip cannot fetch transformers {release}: {(done.stderr.strip().splitlines() or [''])[-1][:200]}")
    tokens = np.random.default_rng(0).integers(1, 96, (2, 24), dtype=np.int32)
    for name, settings in MODELS.items():
        model, params = random_model(**settings)
        params = routers_anew(model, params)
        save_pretrained(tmp_path / "models" / name, model, params, ids={"pad_token_id": 0})
        prompts = [tokens[0, :5].tolist(), tokens[1, :9].tolist()]
        texts = generate(model, params, prompts, max_new_tokens=20).sequences
        padded = [[0] * (9 - len(prompt)) + prompt for prompt in prompts]
        found = {
            "tokens": tokens,
            "logits": run(model, params, tokens),
            "prompts": padded,
            "texts": list(map(list, texts)),
        }
        np.savez(tmp_path / "models" / f"{name}.npz", **found)
    environment = os.environ | {"PYTHONPATH": str(packages), "HF_HOME": str(tmp_path / "cache")}
    command = [sys.executable, older_transformers.__file__, str(tmp_path / "models")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    version, *lines = done.stdout.split("\n")[:-1]
    assert version == release and [line.partition(":")[0] for line in lines] == sorted(MODELS)
