"""Config files of the original: fields of its config classes, or settings of its trainers, as JSON or YAML."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stellarbyte_jax.config.foreign import absent, clipped, json_object, listed, shown
from stellarbyte_jax.hf.original.layouts import Original

_MODEL = "model"
# Of the seed's trainer: other sections than that of the model, the parts of that one, and its names for fields.
_SECTIONS = (
    *("experiment", "training", "evaluation", "distributed", "dataset", "dataset_loader", "optimizer"),
    *("lr_scheduler", "precision", "logging"),
)
_PARTS = ("dropout", "norm", "embeddings", "xpos", "attention", "kv_cache", "parallel")
_RENAMED = {
    "dim": "model_dim",
    "n_layers": "num_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_kv_heads",
    "rope_theta": "xpos_rope_theta",
    "scale_base": "xpos_scale_base",
    "key_dtype": "key_cache_dtype",
    "value_dtype": "value_cache_dtype",
}
# Of December's trainer, whose file is flat.
_TRAINING = (
    *("train_data_path", "eval_data_path", "tokenizer_path", "max_length", "learning_rate", "weight_decay"),
    *("adam_epsilon", "max_grad_norm", "warmup_steps", "total_steps", "scheduler_type", "epochs", "batch_size"),
    *("gradient_accumulation_steps", "save_steps", "log_steps", "eval_steps", "seed", "checkpoint_dir", "log_file"),
    *("device", "mixed_precision", "resume_training", "num_workers", "pin_memory", "drop_last", "use_swanlab"),
    *("api_key", "project", "workspace", "experiment_name"),
    *("swanlab_api_key", "swanlab_project", "swanlab_workspace", "swanlab_experiment_name"),
)
_MARKS = ("train_data_path", "learning_rate", "tokenizer_path")  # which no config class has
# What the original's trainers did not hand over: the model was made with the default, whatever the file says.
_NOT_READ = {"seed": ("use_causal",), "december": ("rope_theta",)}
_DEEPEST = 32  # levels of YAML: the time that PyYAML takes grows with the square of their number


@dataclass(frozen=True)
class OriginalSettings:
    """Fields of a config class, by the original's names.

    Attributes:
      where: names the file in messages.
      values: what it says of the model.
      of_training: whether it was a trainer's file, whose sizes the trainer did not always heed.
      notes: what is to be told of it.
    """

    where: str
    values: Mapping[str, Any]
    of_training: bool
    notes: tuple[str, ...]


def read_settings(path: Path, layout: Original) -> OriginalSettings:
    """The settings in a file.

    Raises:
      ImportError: it is YAML, and PyYAML is not installed.
      ValueError: it is missing or broken, or holds settings that no trainer of this layout has.
    """
    if not path.is_file():
        raise ValueError(f"config file {absent(path)}")
    is_yaml = path.suffix.lower() in (".yaml", ".yml")
    values = yaml_object(path.read_bytes(), str(path)) if is_yaml else json_object(path.read_bytes(), str(path))
    if isinstance(values.get(_MODEL), Mapping):
        return _of_seed_trainer(values, str(path), layout)
    if any(name in values for name in _MARKS):
        return _of_december_trainer(values, str(path), layout)
    return OriginalSettings(str(path), values, False, ())


def _of_seed_trainer(values: Mapping[str, Any], where: str, layout: Original) -> OriginalSettings:
    _check_layout("seed", where, layout)
    unknown = [name for name in values if name not in (_MODEL, *_SECTIONS)]
    if unknown:
        guess = difflib.get_close_matches(str(unknown[0]), [_MODEL, *_SECTIONS], n=1)
        hint = f" (did you mean {guess[0]}?)" if guess else ""
        raise ValueError(f"{where}: {listed(unknown)}{hint}: the original's trainer has no such section; remove it")
    fields: dict[str, Any] = {}
    parts = values[_MODEL]
    nested = [parts[name] for name in _PARTS if parts.get(name) is not None]
    for part in ({n: v for n, v in parts.items() if n not in _PARTS}, *nested):
        if not isinstance(part, Mapping):
            raise ValueError(f"{where}: a part of the section model is {shown(part)}, not named settings")
        for name, value in part.items():
            field = _RENAMED.get(str(name), str(name))
            if field in fields:
                raise ValueError(f"{where}: the section model gives {clipped(field)} twice: keep one of them")
            fields[field] = value
    return _without_ignored(fields, where, layout, [name for name in _SECTIONS if name in values])


def _of_december_trainer(values: Mapping[str, Any], where: str, layout: Original) -> OriginalSettings:
    _check_layout("december", where, layout)
    fields = {name: value for name, value in values.items() if name not in _TRAINING}
    if "max_length" in values:
        fields["max_position_embeddings"] = values["max_length"]
    return _without_ignored(fields, where, layout, [name for name in _TRAINING if name in values])


def _check_layout(name: str, where: str, layout: Original) -> None:
    if layout.name != name:
        raise ValueError(
            f"{where} is a config of the trainer of layout {name}, and the checkpoint has the layout {layout.name}: "
            "give the config that the model was trained with"
        )


def _without_ignored(fields: dict[str, Any], where: str, layout: Original, training: list[str]) -> OriginalSettings:
    notes = [f"settings of a training, which are not imported: {', '.join(training)}"] if training else []
    defaults = layout.family.defaults | {name: allowed[0] for name, allowed in layout.family.fixed.items()}
    for name in _NOT_READ[layout.name]:
        if fields.pop(name, defaults[name]) != defaults[name]:
            notes.append(f"{name} is not the file's but {defaults[name]}: the original's trainer did not read it")
    return OriginalSettings(where, fields, True, tuple(notes))


def yaml_object(content: bytes, where: str) -> dict[str, Any]:
    """The mapping that a YAML file holds, of plain values; YAML takes numbers such as ``1e-5`` for texts.

    Raises:
      ImportError: PyYAML is not installed.
      ValueError: it is no YAML, no mapping, nested too deeply, has aliases, or gives a key twice.
    """
    try:
        import yaml
    except ImportError as error:
        raise ImportError(f"reading {where} needs PyYAML: pip install pyyaml, or write the settings as JSON") from error
    try:
        depth = 0
        for event in yaml.parse(content, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:
                raise ValueError(f"{where} is nested too deeply: copy the file again")
            if isinstance(event, yaml.AliasEvent):  # it may stand for itself, or for more than memory holds
                raise ValueError(f"{where} uses YAML aliases (*name): write the values out")
        value = _plain(yaml.compose(content, Loader=yaml.SafeLoader), where)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not valid YAML: {clipped(' '.join(str(error).split()))}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where} must hold named settings, got {type(value).__name__}")
    return value


def _plain(node: Any, where: str) -> Any:
    import yaml

    if node is None:
        return None
    if isinstance(node, yaml.MappingNode):
        made: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError(f"{where}: a key on line {key.start_mark.line + 1} is no name")
            if key.value in made:
                raise ValueError(f"{where}: {shown(key.value)} is given twice: keep one of them")
            made[key.value] = _plain(value, where)
        return made
    if isinstance(node, yaml.SequenceNode):
        return [_plain(each, where) for each in node.value]
    return _scalar(node)


def _scalar(node: Any) -> Any:
    from yaml.constructor import SafeConstructor

    text, kind = node.value, node.tag.rpartition(":")[2]
    try:
        if kind == "null":
            return None
        if kind in ("bool", "int", "float"):
            return getattr(SafeConstructor(), f"construct_yaml_{kind}")(node)
    except (ValueError, KeyError):  # a tag that does not fit its value, or an integer that is too long
        return text
    return text
