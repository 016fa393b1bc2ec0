"""Mistral. Jiang et al. 2023, https://arxiv.org/abs/2310.06825."""

from stellarbyte_jax.hf.families import llama_like
from stellarbyte_jax.hf.table import Family, same

MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    rows=llama_like.DECODER_ROWS,
    buffers=llama_like.ROTARY_BUFFERS,
    fields=(
        same("vocab_size", 32000),
        same("hidden_size", 4096),
        llama_like.mlp_size(14336),
        same("num_hidden_layers", 32),
        same("num_attention_heads", 32),
        llama_like.kv_heads(8, nullable=False),
        llama_like.head_size(None, nullable=True),
        llama_like.ACTIVATION,
        same("max_position_embeddings", 131072),
        same("initializer_range", 0.02),
        same("rms_norm_eps", 1e-6),
        same("tie_word_embeddings", False),
        same("attention_dropout", 0.0),
        llama_like.one_window(4096),
    ),
    fixed={**llama_like.FIXED, **llama_like.NO_BIASES},
)
