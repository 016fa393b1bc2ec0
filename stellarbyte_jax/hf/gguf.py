"""What llama.cpp's converter to GGUF drops of an export without a word; ``docs/gguf.md`` says what to do."""

import math

from stellarbyte_jax.config import ByteConfig


def dropped_by_llama_cpp(model_type: str, config: ByteConfig) -> list[str]:
    """The settings that a GGUF file of the export would not have, each with what holds in their place.

    None where it computes the same, and none for families that the converter refuses by name. As of the llama.cpp in
    ``llama-cpp-python`` 0.3.36.

    Args:
      model_type: the family of the export.
      config: its settings.
    """
    if model_type == "stellarbyte":
        return []
    dropped = []
    window = next((size for size in config.windows if size is not None), config.max_position_embeddings)
    if window < config.max_position_embeddings:
        dropped.append(f"sliding_window {window} (every token sees the whole text)")
    if config.hidden_act != "silu":
        dropped.append(f"hidden_act {config.hidden_act} (silu)")
    scaling = config.rope_scaling
    if scaling.name == "llama3" and model_type in ("qwen2", "qwen3", "qwen3_moe"):
        dropped.append("rope_scaling llama3 (none)")
    if scaling.name == "dynamic":
        dropped.append(f"rope_scaling dynamic (none: the same up to {config.max_position_embeddings} tokens)")
    if model_type == "qwen3_moe" and not config.moe.norm_topk_prob:
        dropped.append("moe.norm_topk_prob False (the weights of a token's experts add up to one)")
    usual = 0.1 * math.log(scaling.factor) + 1
    if scaling.attention_factor is not None and not math.isclose(scaling.attention_factor, usual, rel_tol=1e-6):
        dropped.append(f"rope_scaling.attention_factor {scaling.attention_factor:g} ({usual:g})")
    return dropped
