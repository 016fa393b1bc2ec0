"""``config.json`` of a Hugging Face directory from and to ByteConfig.

A field that is neither implemented nor known to be without effect is an error: ignoring it could change every logit.
"""

import difflib
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.config.foreign import listed, shown
from stellarbyte_jax.hf.families import FAMILIES
from stellarbyte_jax.hf.files import read_json
from stellarbyte_jax.hf.rope import ROPE_NAMES, check_rope_type, parse_rope, rope_json
from stellarbyte_jax.hf.table import Family
from stellarbyte_jax.tokenizer.directory import SPECIAL_IDS

_log = logging.getLogger(__name__)

# About generation, storage, bookkeeping or other heads: none of it changes the logits.
_WITHOUT_EFFECT = {
    *SPECIAL_IDS,
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_commit_hash",
    "_from_model_config",
    "_model_name_or_path",
    "_name_or_path",
    "architectures",
    "chunk_size_feed_forward",
    "dtype",
    "id2label",
    "is_encoder_decoder",
    "is_decoder",
    "is_llama_config",
    "label2id",
    "model_type",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
    "task_specific_params",
    "tokenizer_class",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "unk_token_id",
    "use_cache",
}

# Of sampling, which older files keep here, and of programs that trained: accepted, and told.
_TOLD = {
    *("bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping"),
    *("encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id"),
    *("forced_eos_token_id", "length_penalty", "max_length", "max_new_tokens", "min_length", "min_new_tokens", "min_p"),
    *("no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "output_scores", "penalty_alpha"),
    *("prefix", "remove_invalid_values", "renormalize_logits", "repetition_penalty", "return_dict_in_generate"),
    *("suppress_tokens", "temperature", "top_k", "top_p", "typical_p"),
    *("decoder_start_token_id", "finetuning_task", "sep_token_id", "tf_legacy_loss", "torchscript", "use_bfloat16"),
    *("cross_attention_hidden_size", "neftune_noise_alpha", "gradient_checkpointing", "max_sequence_length"),
}
# Of every config of transformers 4, which programs write whole: what it says of other kinds of models.
_OF_OTHERS = {"add_cross_attention": (False, None), "pruned_heads": ({}, None), "tie_encoder_decoder": (False, None)}
_TOLD_PATTERN = re.compile(r"_?(unsloth|axolotl|llamafactory|llama_factory|trl|swift|mlx|optimum)_\w+|\w+_version")
# What to do about fields that mean another computation.
_REMEDIES = {
    "quantization_config": "the weights are quantized: save them dequantized, as dequantize() of transformers does",
    "auto_map": "the directory has a modelling file of its own, which may compute anything: remove the field where the "
    "model is an ordinary {}",
}


def is_bookkeeping(name: str) -> bool:
    """Whether a field of a config class of transformers says nothing of the network."""
    return name in _WITHOUT_EFFECT


def is_told(name: str) -> bool:
    """Whether a field is of sampling or of another program: accepted, and told."""
    return name in _TOLD or _TOLD_PATTERN.fullmatch(name) is not None


def read_config(directory: Path) -> tuple[Family, ByteConfig]:
    """The family of a directory, and its settings.

    Raises:
      ValueError: a field of ``config.json`` asks for something that ByteConfig cannot express.
    """
    path = directory / "config.json"
    return parse_config(read_json(path), str(path))


def parse_config(values: Mapping[str, Any], where: str) -> tuple[Family, ByteConfig]:
    """As :func:`read_config`, of the file's content; ``where`` names it in messages."""
    model_type = values.get("model_type")
    if not (isinstance(model_type, str) and model_type in FAMILIES):
        raise ValueError(f"{where}: model_type is {shown(model_type)}; supported are {', '.join(FAMILIES)}")
    family = FAMILIES[model_type]
    architectures = values.get("architectures")
    if not isinstance(architectures, list | None):
        raise ValueError(f"{where}: architectures must be a list of names, got {shown(architectures)}")
    # The first converters wrote LLaMAForCausalLM.
    if architectures and family.architecture.lower() not in [str(name).lower() for name in architectures]:
        raise ValueError(f"{where}: architectures is {shown(architectures)}; supported is {family.architecture}")
    return family, parse_family(family, values, where)


def parse_family(family: Family, values: Mapping[str, Any], where: str) -> ByteConfig:
    """As :func:`parse_config`, of a file that is known to be the family's."""
    fixed = {**_OF_OTHERS, **family.fixed}
    for name, allowed in fixed.items():
        if name in values and values[name] not in allowed:
            if values[name] is None:
                raise ValueError(f"{where}: {name} is null: give {allowed[0]!r}, or remove the field for the default")
            raise ValueError(f"{where}: {name} is {shown(values[name])}; only {allowed[0]!r} is implemented")
    defaults, nullable = family.defaults, family.nullable
    # A field of another family that is null asks for nothing.
    known = {*defaults, *fixed, *ROPE_NAMES, *_WITHOUT_EFFECT, *family.told}
    known |= {"auto_map"} if family.modelling_file else set()  # it names our own file
    unknown = [name for name, value in values.items() if name not in known and value is not None]
    told = [name for name in unknown if is_told(name)]
    unknown = [name for name in unknown if name not in told]
    if unknown:
        guess = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f" (did you mean {guess[0]}?)" if guess else ""
        remedy = "If the model computes the same without it, remove it from config.json"
        if unknown[0] in _REMEDIES:
            remedy = _REMEDIES[unknown[0]].format(family.model_type).capitalize()
        raise ValueError(
            f"{where}: {listed(unknown)}{hint}: not implemented for {family.model_type}, nor known to be without "
            f"effect. {remedy}"
        )
    told += [name for name in family.told if values.get(name)]
    if told:
        _log.warning("%s: without effect on the logits: %s", where, listed(told))
    stated = {name: values.get(name, default) for name, default in defaults.items()}
    nulls = [name for name in stated if name in values and values[name] is None and name not in nullable]
    if nulls:  # ByteConfig would derive some of them, and transformers refuses them
        raise ValueError(f"{where}: {nulls[0]} is null: give a value, or remove the field for the default")
    theta, scaling = parse_rope(values, stated["max_position_embeddings"], where, family.rope_theta)
    check_rope_type(scaling, family.rope_types, where)
    try:
        return ByteConfig(**family.read(stated), rope_theta=theta, rope_scaling=scaling)
    except ValueError as error:  # ConfigError among them
        raise ValueError(f"{where}: {error}") from error


def settings_json(family: Family, config: ByteConfig) -> dict[str, Any]:
    """What ``config.json`` says of the network, under the names of transformers 4 and 5 where they differ."""
    return {**family.write(config), **rope_json(config)}


def config_json(family: Family, config: ByteConfig, dtype: str, special_ids: Mapping[str, Any]) -> dict[str, Any]:
    """Content of ``config.json``."""
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **({"auto_map": family.auto_map} if family.modelling_file else {}),
        **settings_json(family, config),
        "torch_dtype": dtype,
        "dtype": dtype,
        "use_cache": True,
        # Without them a reader would take the family's defaults, 1 and 2.
        **{name: special_ids.get(name) for name in SPECIAL_IDS},
    }


def generation_json(special_ids: Mapping[str, Any]) -> dict[str, Any]:
    """Content of ``generation_config.json``: where generation starts and stops."""
    return {name: special_ids.get(name) for name in SPECIAL_IDS}
