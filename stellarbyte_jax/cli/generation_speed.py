"""What ``benchmark generate`` and ``benchmark cache`` measure: decoding with random weights."""

import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from stellarbyte_jax.cli.measurements import REPEATS, tell
from stellarbyte_jax.command import imports
from stellarbyte_jax.config import ByteConfig, CacheConfig, ConfigError, TrainConfig, load

# 1.10B parameters; weights and cache in bfloat16.
GENERATE = ByteConfig(
    hidden_size=2048,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    intermediate_size=8192,
    max_position_embeddings=2048,
)
CACHE = ByteConfig(
    hidden_size=256,
    num_hidden_layers=8,
    num_attention_heads=8,
    intermediate_size=1024,
    max_position_embeddings=2048,
    compute_dtype="float32",
)


def _decode(model_config: ByteConfig, batch_size: int, prompt: int, new: int, apart: bool = False) -> dict[str, Any]:
    """Median tokens a second of whole calls of ``generate`` with random weights, prompts and compilation left out.

    Args:
      model_config: of the network.
      batch_size: rows.
      prompt: tokens of each.
      new: tokens that are added.
      apart: whether the weights of layers are.
    """
    with imports():
        import jax
        import numpy as np

        from stellarbyte_jax import ByteTransformer, generate
        from stellarbyte_jax.inference.programs import split_layers
        from stellarbyte_jax.launch import environment
        from stellarbyte_jax.model.decoder import init_params

    model = ByteTransformer(model_config)
    params = jax.jit(lambda: init_params(model, jax.random.key(0)))()
    params = jax.tree.map(lambda x: x.astype(model_config.compute_dtype), params)
    params = split_layers(model, params) if apart else params
    tokens = np.random.default_rng(0).integers(0, model_config.vocab_size, (batch_size, prompt), dtype=np.int32)
    tell(f"compiling for {batch_size} x {prompt} tokens, to which {new} are added")
    generate(model, params, tokens, max_new_tokens=new)
    results, rates = [], []
    for number in range(1, REPEATS + 1):
        results.append(generate(model, params, tokens, max_new_tokens=new))
        rates.append(batch_size * new / results[-1].decode_seconds)
        tell(f"repeat {number} of {REPEATS}: {rates[-1]:,.0f} tokens/s")
    whole = [batch_size * new / (result.decode_seconds + result.prefill_seconds) for result in results]
    floor = decode_floor(model_config, batch_size, prompt + new // 2, jax.devices()[0].device_kind)
    return {
        "tokens_per_second": round(statistics.median(rates), 1),
        "with_prefill": round(statistics.median(whole), 1),
        "lowest": round(min(rates), 1),
        "highest": round(max(rates), 1),
        "repeats": REPEATS,
        "prompt": prompt,
        "new": new,
        **({} if floor is None else {"floor": round(floor)}),
        "on": environment(),
    }


def decode_floor(config: ByteConfig, batch_size: int, keys: int, device: str) -> float | None:
    """Tokens a second if a step took no longer than reading what it needs: weights once, and the keys and values.

    Of experts the weights count that are chosen if all are as likely. None where the memory's bandwidth is not known.

    Args:
      config: of the network, whose weights are in its compute dtype.
      batch_size: rows.
      keys: positions that each row sees.
      device: its name.
    """
    with imports():
        import jax.numpy as jnp

        from stellarbyte_jax.inspect.costs import parameter_counts
        from stellarbyte_jax.model.decoder import ByteTransformer
        from stellarbyte_jax.training.plan_devices import device_of

    try:
        bandwidth = device_of(device).bandwidth
    except ConfigError:  # not known, or a card of the same name with other memory
        return None
    itemsize, m = jnp.dtype(config.compute_dtype).itemsize, config.moe
    counts = parameter_counts(ByteTransformer(config))
    experts = (
        len(config.moe_layers) * m.num_experts * 3 * config.hidden_size * config.expert_size if m.num_experts else 0
    )
    chosen = 1 - (1 - m.num_experts_per_tok / m.num_experts) ** batch_size if m.num_experts else 0.0
    looked_up = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    weights = counts.total - looked_up - experts * (1 - chosen)
    cache = 2 * config.num_hidden_layers * config.kv_heads * config.head_size * keys * batch_size
    return batch_size * bandwidth / (itemsize * (weights + cache))


def _generate(model: ByteConfig, batch_size: int) -> Callable[[TrainConfig, int], dict[str, Any]]:
    return lambda config, steps: _decode(model, batch_size, 128, 256 if model is GENERATE else 64)


def _apart(batch_size: int, attention: str) -> Callable[[TrainConfig, int], dict[str, Any]]:
    model = replace(GENERATE, attention_implementation=attention)
    return lambda config, steps: _decode(model, batch_size, 128, 256, apart=True)


def _with_experts(name: str, batch_size: int, new: int) -> Callable[[TrainConfig, int], dict[str, Any]]:
    return lambda config, steps: _decode(replace(load(name, []).model, scan_unroll=1), batch_size, 128, new)


def _cache(dtype: Any) -> Callable[[TrainConfig, int], dict[str, Any]]:
    return lambda config, steps: _decode(replace(CACHE, cache=CacheConfig(dtype=dtype)), 4, 512, 64)


WORKERS = {
    **{f"batch_{size}": _generate(GENERATE, size) for size in (1, 8, 32, 128)},
    **{f"apart_batch_{size}": _apart(size, "auto") for size in (1, 32)},
    **{f"kernel_batch_{size}": _apart(size, "pallas") for size in (1, 32)},
    **{f"experts_batch_{size}": _with_experts("pretrain_moe", size, 256) for size in (1, 32)},
    **{f"small_batch_{size}": _generate(CACHE, size) for size in (1, 8)},
    "small_experts": _with_experts("quickstart_moe", 2, 64),
    **{dtype: _cache(dtype) for dtype in ("float32", "bfloat16", "int8", "float8_e4m3fn")},
}
