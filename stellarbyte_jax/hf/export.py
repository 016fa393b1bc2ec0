"""Which family a model is exported as: the first whose settings, read back, are the same model."""

import logging
from collections.abc import Mapping
from typing import Any

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.config.foreign import shown
from stellarbyte_jax.hf.families import FAMILIES
from stellarbyte_jax.hf.settings import parse_family, settings_json
from stellarbyte_jax.hf.table import Family

_log = logging.getLogger(__name__)
# Of training, of computing or of the first weights: the same model whatever they are. Every other setting must survive.
_WITHOUT_MEANING = (
    *("vocab_size_multiple", "rope_pairing", "drop_path", "attention_dropout", "hidden_dropout", "residual_dropout"),
    *(
        "initialization",
        "initializer_range",
        "compute_dtype",
        "matmul_dtype",
        "attention_implementation",
        "remat",
        "scan_unroll",
    ),
    *("cache", "lora"),
)
# The same of moe. Capacity is of training alone too, and how experts are computed is of no network.
_OF_TRAINING = (
    *("noise", "noise_scale", "router_warmup_steps", "bias_update_rate", "state_decay", "dispatch", "capacity_factor"),
    *("min_capacity", "max_capacity", "dynamic_capacity", "overflow", "implementation"),
)
_BIAS = "layers/moe/router/tracked/bias"


def export_family(
    config: ByteConfig,
    name: str | None = None,
    tokenizer: Mapping[str, Any] | None = None,
    *,
    biased: bool = False,
) -> Family:
    """The family that computes exactly what ``config`` says: the most widely read one, or the one called ``name``.

    Args:
      config: the model.
      name: the family's ``model_type``; None to have one chosen.
      tokenizer: what ``tokenizer.json`` holds, where it goes with the model. A family by whose name transformers makes
        other ids of texts is not chosen; where it is asked for, a warning is logged.
      biased: whether routers have biases other than 0, which the family must have a tensor for.

    Raises:
      ValueError: there is none, or it cannot; the message names each setting that stands in the way and what to do.
    """
    if config.lora.r:
        raise ValueError(
            "a Hugging Face directory has no place for adapters: merge them first (stellarbyte_jax.lora.merge_adapters)"
        )
    if name is not None and name not in FAMILIES:
        raise ValueError(f"there is no family {shown(name)}: known are {', '.join(FAMILIES)}")
    candidates = list(FAMILIES.values()) if name is None else [FAMILIES[name]]
    lost: list[str] = []
    for family in candidates:
        lost = _lost(family, config)
        if biased and not any(row.ours == _BIAS for row in family.rows):
            lost.append("routers choose experts by biases (moe.bias_update_rate), there by scores alone")
        if not lost and (tokenizer is None or family.reads_tokenizer is None or family.reads_tokenizer(tokenizer)):
            return family
        if not lost and name is not None:
            _log.warning(
                "AutoTokenizer of transformers 5 reads every tokenizer of a %s directory by one rule, not by that of "
                "this one: read it with PreTrainedTokenizerFast.from_pretrained, or leave the family out",
                name,
            )
            return family
    raise ValueError(
        f"a Hugging Face directory of the family {candidates[-1].model_type} cannot express this model: "
        f"{'; '.join(lost)}. "
        + ("Keep it as a checkpoint of this project" if name is None else "Leave the family out, to have one chosen")
    )


def _lost(family: Family, config: ByteConfig) -> list[str]:
    """What would be another model there, in words."""
    limit = family.limit(config)
    if limit is not None:
        return [limit]
    try:
        back = parse_family(family, settings_json(family, config), family.model_type)
    except ValueError as error:
        return [str(error)]
    return differences(config, back)


def differences(config: ByteConfig, other: ByteConfig) -> list[str]:
    """Settings by which the second computes another model than the first, in words."""
    ours, theirs = _meaning(config), _meaning(other)
    return [
        f"{name} is {shown(value)}, there {shown(theirs[name])}"
        for name, value in ours.items()
        if name in theirs and value != theirs[name]
    ]


def _meaning(config: ByteConfig) -> Mapping[str, Any]:
    """Every setting that says what the model computes, with what is derived filled in."""
    values = {name: value for name, value in config.to_dict().items() if name not in _WITHOUT_MEANING}
    values |= {
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.mlp_size,
        "layer_types": None,
        "sliding_window": list(config.windows),
    }
    if len(config.moe_layers) == config.num_hidden_layers:  # no layer has an MLP of that size
        del values["intermediate_size"]
    scaling = values.pop("rope_scaling")
    original = scaling["original_max_position_embeddings"] or config.max_position_embeddings
    values |= {f"rope_scaling.{name}": value for name, value in scaling.items()}
    values["rope_scaling.original_max_position_embeddings"] = original
    values |= {f"memory.{name}": value for name, value in values.pop("memory").items()}
    return values | {f"moe.{name}": value for name, value in _meaning_of_experts(config, values.pop("moe")).items()}


def _meaning_of_experts(config: ByteConfig, values: Mapping[str, Any]) -> dict[str, Any]:
    """The same of ``config.moe``; their number alone where there are none."""
    c = config.moe
    if not c.num_experts:
        return {"num_experts": 0}
    values = {name: value for name, value in values.items() if name not in _OF_TRAINING}
    for name in ("first_k_dense_replace", "decoder_sparse_step", "mlp_only_layers"):
        del values[name]
    limited = c.topk_group < c.n_group
    return values | {
        "layers": list(config.moe_layers),
        "intermediate_size": config.expert_size,
        "n_group": c.n_group if limited else 1,
        "topk_group": c.topk_group if limited else 1,
    }
