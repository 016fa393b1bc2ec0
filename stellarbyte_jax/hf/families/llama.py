"""Llama 1 to 3. Touvron et al. 2023, https://arxiv.org/abs/2302.13971."""

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.hf.families import llama_like
from stellarbyte_jax.hf.table import Family, same


def _limit(config: ByteConfig) -> str | None:
    if config.hidden_size % config.num_attention_heads:
        return "transformers wants a hidden_size that num_attention_heads divides"
    return None


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    rows=(*llama_like.DECODER_ROWS, *llama_like.QKV_BIAS_ROWS, *llama_like.O_BIAS_ROWS, *llama_like.MLP_BIAS_ROWS),
    buffers=llama_like.ROTARY_BUFFERS,
    fields=(
        same("vocab_size", 32000),
        same("hidden_size", 4096),
        llama_like.mlp_size(11008),
        same("num_hidden_layers", 32),
        same("num_attention_heads", 32),
        llama_like.kv_heads(None, nullable=True),
        llama_like.head_size(None, nullable=True),
        llama_like.ACTIVATION,
        same("max_position_embeddings", 2048),
        same("initializer_range", 0.02),
        same("rms_norm_eps", 1e-6),
        same("tie_word_embeddings", False),
        same("attention_dropout", 0.0),
        llama_like.ATTENTION_BIAS,
        same("mlp_bias", False),
    ),
    fixed=llama_like.FIXED,
    limit=_limit,
)
