"""Qwen2 and Qwen2.5: Llama with biases of q, k and v. Yang et al. 2024, https://arxiv.org/abs/2407.10671."""

from collections.abc import Mapping
from typing import Any

from stellarbyte_jax.hf.families import llama_like
from stellarbyte_jax.hf.table import Family, same

# Release 5 of transformers reads every tokenizer of a qwen2 directory with this rule, whatever the files say.
_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_NEUTRAL = (None, False, "")  # values that a BPE leaves out


def has_the_rule(described: Mapping[str, Any]) -> bool:
    """Whether a ``tokenizer.json`` says what ``Qwen2Tokenizer`` of transformers does to any vocabulary and merges."""
    model = described.get("model") or {}
    steps = (described.get("pre_tokenizer") or {}).get("pretokenizers") or [{}]
    return (
        model.get("type") == "BPE"
        and all(value in _NEUTRAL for name, value in model.items() if name not in ("type", "vocab", "merges"))
        and described.get("normalizer") == {"type": "NFC"}
        and [step.get("type") for step in steps] == ["Split", "ByteLevel"]
        and steps[0] == {"type": "Split", "pattern": {"Regex": _PIECES}, "behavior": "Isolated", "invert": False}
        and not steps[1].get("add_prefix_space", True)
        and not steps[1].get("use_regex", True)
    )


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
    reads_tokenizer=has_the_rule,
)
