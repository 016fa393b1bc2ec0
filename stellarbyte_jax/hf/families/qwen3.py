"""Qwen3: norms of queries and keys. Yang et al. 2025, https://arxiv.org/abs/2505.09388."""

from stellarbyte_jax.hf.families import llama_like
from stellarbyte_jax.hf.table import Family, same

QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    rows=(*llama_like.DECODER_ROWS, *llama_like.QK_NORM_ROWS, *llama_like.QKV_BIAS_ROWS, *llama_like.O_BIAS_ROWS),
    buffers=llama_like.ROTARY_BUFFERS,
    fields=(
        same("vocab_size", 151936),
        same("hidden_size", 4096),
        llama_like.mlp_size(22016),
        llama_like.WINDOW_PATTERN,
        same("num_attention_heads", 32),
        llama_like.kv_heads(32, nullable=True),
        llama_like.head_size(128, nullable=False),
        llama_like.ACTIVATION,
        same("max_position_embeddings", 32768),
        same("initializer_range", 0.02),
        same("rms_norm_eps", 1e-6),
        same("tie_word_embeddings", False),
        same("attention_dropout", 0.0),
        llama_like.ATTENTION_BIAS,
    ),
    constants={"qk_norm": True},
    fixed={**llama_like.FIXED, "mlp_bias": (False, None)},
)
