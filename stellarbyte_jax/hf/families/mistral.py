"""Mistral. Jiang et al. 2023, https://arxiv.org/abs/2310.06825."""

from stellarbyte_jax.hf.families import common
from stellarbyte_jax.hf.table import Family, same

MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    rows=common.DECODER_ROWS,
    buffers=common.ROTARY_BUFFERS,
    fields=(
        same("vocab_size", 32000),
        same("hidden_size", 4096),
        common.mlp_size(14336),
        same("num_hidden_layers", 32),
        same("num_attention_heads", 32),
        common.kv_heads(8, nullable=False),
        common.head_size(None, nullable=True),
        common.ACTIVATION,
        same("max_position_embeddings", 131072),
        same("initializer_range", 0.02),
        same("rms_norm_eps", 1e-6),
        same("tie_word_embeddings", False),
        same("attention_dropout", 0.0),
        common.one_window(4096),
    ),
    fixed={**common.FIXED, **common.NO_BIASES},
)
