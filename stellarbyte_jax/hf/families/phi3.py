"""Phi-3 without LongRoPE: Mistral with fused matrices. Abdin et al. 2024, https://arxiv.org/abs/2404.14219."""

import dataclasses

from stellarbyte_jax.hf.families import llama_like
from stellarbyte_jax.hf.table import Family, Field, same

_NAMES = {
    "layers/attn/q": "model.layers.{i}.self_attn.qkv_proj.weight",
    "layers/attn/k": "model.layers.{i}.self_attn.qkv_proj.weight",
    "layers/attn/v": "model.layers.{i}.self_attn.qkv_proj.weight",
    "layers/mlp/gate_up": "model.layers.{i}.mlp.gate_up_proj.weight",
}

PHI3 = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    rows=tuple(dataclasses.replace(row, theirs=_NAMES.get(row.ours, row.theirs)) for row in llama_like.DECODER_ROWS),
    buffers=llama_like.ROTARY_BUFFERS,
    fields=(
        same("vocab_size", 32064),
        same("hidden_size", 3072),
        llama_like.mlp_size(8192),
        same("num_hidden_layers", 32),
        same("num_attention_heads", 32),
        llama_like.kv_heads(None, nullable=True),
        llama_like.ACTIVATION,
        same("max_position_embeddings", 4096),
        # Only LongRoPE reads it, which is refused by its name.
        Field(
            {"original_max_position_embeddings": 4096},
            lambda values: {},
            lambda config: {"original_max_position_embeddings": config.max_position_embeddings},
        ),
        same("initializer_range", 0.02),
        same("rms_norm_eps", 1e-5),
        same("tie_word_embeddings", False),
        same("attention_dropout", 0.0),
        llama_like.one_window(None),
    ),
    fixed={**llama_like.NO_BIASES, "resid_pdrop": (0.0,), "embd_pdrop": (0.0,), "partial_rotary_factor": (1.0,)},
    rope_types=("default",),
)
