"""Qwen2 and Qwen2.5: Llama with biases of q, k and v. Yang et al. 2024, https://arxiv.org/abs/2407.10671."""

from stellarbyte_jax.hf.families import llama_like
from stellarbyte_jax.hf.table import Family, same

QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    rows=(*llama_like.DECODER_ROWS, *llama_like.QKV_BIAS_ROWS),
    buffers=llama_like.ROTARY_BUFFERS,
    fields=(
        same("vocab_size", 151936),
        same("hidden_size", 4096),
        llama_like.mlp_size(22016),
        llama_like.WINDOW_PATTERN,
        same("num_attention_heads", 32),
        llama_like.kv_heads(32, nullable=True),
        llama_like.head_size(None, nullable=False),
        llama_like.ACTIVATION,
        same("max_position_embeddings", 32768),
        same("initializer_range", 0.02),
        same("rms_norm_eps", 1e-6),
        same("tie_word_embeddings", False),
        same("attention_dropout", 0.0),
    ),
    constants={"attention_bias": True},
    fixed={**llama_like.FIXED, "mlp_bias": (False, None)},
)
