"""Qwen3: norms of queries and keys. Yang et al. 2025, https://arxiv.org/abs/2505.09388."""

from stellarbyte_jax.hf.families import common
from stellarbyte_jax.hf.table import Family, same

QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    rows=(*common.DECODER_ROWS, *common.QK_NORM_ROWS, *common.QKV_BIAS_ROWS, *common.O_BIAS_ROWS),
    buffers=common.ROTARY_BUFFERS,
    fields=(
        same("vocab_size", 151936),
        same("hidden_size", 4096),
        common.mlp_size(22016),
        common.WINDOW_PATTERN,
        same("num_attention_heads", 32),
        common.kv_heads(32, nullable=True),
        common.head_size(128, nullable=False),
        common.ACTIVATION,
        same("max_position_embeddings", 32768),
        same("initializer_range", 0.02),
        same("rms_norm_eps", 1e-6),
        same("tie_word_embeddings", False),
        same("attention_dropout", 0.0),
        common.ATTENTION_BIAS,
    ),
    constants={"qk_norm": True},
    fixed={**common.FIXED, "mlp_bias": (False, None)},
)
