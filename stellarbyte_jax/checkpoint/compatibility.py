"""Which settings a run may change when it goes on from a checkpoint."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from glob import has_magic
from pathlib import Path
from typing import Any

from stellarbyte_jax.checkpoint.store import TOKENIZER, CheckpointError
from stellarbyte_jax.config import ByteConfig, DataConfig, RopeScaling, TrainConfig
from stellarbyte_jax.config.foreign import clipped, shown
from stellarbyte_jax.config.moe import REBALANCING
from stellarbyte_jax.config.paths import real
from stellarbyte_jax.data.patterns import expand
from stellarbyte_jax.data.sources import TEXT_SUFFIX, DataError
from stellarbyte_jax.data.text import TextFormat
from stellarbyte_jax.tokenizer.codec import load_tokenizer

_RUNTIME_FIELDS = (
    "compute_dtype",
    "matmul_dtype",
    "attention_implementation",
    "remat",
    "scan_unroll",
    "attention_dropout",
    "hidden_dropout",
    "residual_dropout",
    "drop_path",
    "initialization",
    "initializer_range",
    "cache",
)
# A run that begins with weights of another one may give them other positions: a longer text, above all.
_POSITION_FIELDS = (
    "max_position_embeddings",
    "rope_theta",
    "rope_scaling",
    "sliding_window",
    "layer_types",
    "sink_tokens",
)
# What experts and routers do in training alone, what follows from it, and how they are computed: a run may change it.
_TRAINED_MOE_FIELDS = (
    "implementation",
    "noise_scale",
    "router_warmup_steps",
    "dispatch",
    "capacity_factor",
    "min_capacity",
    "max_capacity",
    "dynamic_capacity",
    "overflow",
    "bias_update_rate",
    "state_decay",
    *(name for name in REBALANCING if name != "rebalance_interval"),
)
_TRAINED_LORA_FIELDS = ("init", "dropout", "regularization")  # likewise of adapters
# Which experts tokens go to, with the weights as they are: a run that begins with them may choose otherwise.
_ROUTING_FIELDS = (
    "moe.num_experts_per_tok",
    "moe.dynamic_k",
    "moe.n_group",
    "moe.topk_group",
    "moe.temperature",
    "moe.expert_priority",
    "moe.cooling_steps",
)
# With another value the position in the data would point elsewhere.
_ORDER_FIELDS = (
    "train",
    "text_documents",
    "tokenizer",
    "fields",
    "template",
    "sequence_length",
    "arrangement",
    "add_bos",
    "add_eos",
    "max_documents_per_sequence",
    "shuffle",
    "on_error",
)


def _architecture(config: ByteConfig) -> dict[str, tuple[Any, Any]]:
    """What a checkpoint depends on: by setting what it means, and how it is shown, with derived sizes spelt out."""
    spelt = {name: value for name, value in config.to_dict().items() if name not in (*_RUNTIME_FIELDS, "moe", "lora")}
    windows = _windows(config)
    sizes = {
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.mlp_size,
        "layer_types": windows,
    }
    meanings = {
        **sizes,
        "vocab_size_multiple": config.padded_vocab_size,
        "sliding_window": windows,
        "sink_tokens": config.sink_tokens if any(windows) else 0,  # what no window hides needs no exception
        "rope_scaling": _scaling(config),
        "memory": (config.layer_specs, config.memory.compression_weight),
        "layer_scale_init": config.layer_scale_init is not None,  # how much it is matters to new weights alone
    }
    found = {name: (meanings.get(name, value), sizes.get(name, value)) for name, value in spelt.items()}
    return found | _experts(config) | _adapters(config)


def _adapters(config: ByteConfig) -> dict[str, tuple[Any, Any]]:
    """The same of adapters."""
    lora = config.lora
    if not lora.r:
        return {"lora.r": (0, 0)}
    meanings = {
        "lora_alpha": lora.scale,
        "rslora": lora.scale,
        "target_modules": lora.targets,
        "modules_to_save": set(lora.modules_to_save),
        "layers": set(range(config.num_hidden_layers) if lora.layers is None else lora.layers),
    }
    spelt = {name: value for name, value in lora.to_dict().items() if name not in _TRAINED_LORA_FIELDS}
    return {f"lora.{name}": (meanings.get(name, value), value) for name, value in spelt.items()}


def _experts(config: ByteConfig) -> dict[str, tuple[Any, Any]]:
    """The same of layers with experts."""
    m = config.moe
    spelt = {name: value for name, value in m.to_dict().items() if name not in _TRAINED_MOE_FIELDS}
    sizes = {
        "intermediate_size": config.expert_size,
        "gate_intermediate_size": m.gate_intermediate_size or m.context_size,
    }
    groups = (m.n_group, m.topk_group) if m.topk_group < m.n_group else None  # a token may use all of them
    meanings = {
        **sizes,
        **dict.fromkeys(("first_k_dense_replace", "decoder_sparse_step", "mlp_only_layers"), config.moe_layers),
        **dict.fromkeys(("n_group", "topk_group"), groups),
        "noise": m.noise == "noisy_topk",  # which has weights
        "temperature": None if m.adaptive_temperature else m.temperature,  # else it is where a weight begins
        "cooling_steps": m.cooling_steps > 0,
        "rebalance_interval": m.rebalance_interval is not None,  # of which routers keep a record
    }
    if not m.num_experts:
        return {"moe.num_experts": (0, 0)}
    return {f"moe.{name}": (meanings.get(name, value), sizes.get(name, value)) for name, value in spelt.items()}


def _windows(config: ByteConfig) -> tuple[int | None, ...]:
    """The windows that hide something of the longest text; memories, whose own they may be, are compared too."""
    longest = config.max_position_embeddings
    return tuple(None if w is not None and w >= longest else w for w in config.windows)


def _scaling(config: ByteConfig) -> RopeScaling:
    """The rotary scaling with all that its settings leave to be derived."""
    scaling = config.rope_scaling
    if scaling.name in ("yarn", "llama3") and scaling.original_max_position_embeddings is None:
        scaling = replace(scaling, original_max_position_embeddings=config.max_position_embeddings)
    if scaling.name == "yarn" and scaling.attention_factor is None:
        scaling = replace(scaling, attention_factor=0.1 * math.log(scaling.factor) + 1.0)
    return scaling


def _order(name: str, data: DataConfig) -> Any:
    """What a setting of the data means for the order of its tokens."""
    if name == "train":
        return _files(data.train)
    if name == "text_documents":
        return data.text_documents if any(str(file).endswith(TEXT_SUFFIX) for file in _files(data.train)) else None
    if name == "tokenizer":
        return real(data.tokenizer)
    if name in ("fields", "template"):
        try:
            return TextFormat(data.fields, data.template).meaning
        except DataError:
            return data.fields, data.template  # one that cannot be read, which the loader tells
    if name == "max_documents_per_sequence":
        return min(data.max_documents_per_sequence, data.sequence_length)
    return getattr(data, name)


def _files(patterns: Sequence[str]) -> list[Path] | Sequence[str]:
    """The files that patterns name now; the patterns where they name none."""
    try:
        return [path.resolve() for pattern in patterns for path in expand(pattern, "data.train")]
    except DataError:
        return patterns


def _may_be_moved(before: DataConfig, now: DataConfig) -> bool:
    """Whether the files of ``before`` have the names of those of now, in other folders.

    What a pattern named in a folder that is gone is not known here; the loader compares names and contents.
    """
    names = [[Path(file).name for file in _files(data.train)] for data in (before, now)]
    return names[0] == names[1] or any(has_magic(str(file)) for file in _files(before.train) if not Path(file).exists())


def check_same_model(
    before: ByteConfig,
    config: ByteConfig,
    where: str | Path,
    initial: bool,
    say: Callable[[str], None],
    advice: str = "Use the same settings, or another output_dir",
) -> None:
    """Checks that weights of one model are weights of another.

    Args:
      before: settings that the weights were made with.
      config: those of now.
      where: the weights lie, for messages.
      initial: whether a run begins with them; such a run may have other positions, and send tokens to other experts.
      say: told what changes.
      advice: the end of a refusal.

    Raises:
      CheckpointError: settings differ that must not; the message lists them.
    """
    _check_same_kind(before, config, where)
    there = _architecture(before)
    differ = {
        name: f"model.{name} is {shown(there[name][1])} there and {shown(value)} here"
        for name, (meaning, value) in _architecture(config).items()
        if name in there and there[name][0] != meaning and there[name][1] != value
    }
    if initial:
        for what, fields in (("positions", _POSITION_FIELDS), ("routing of tokens to experts", _ROUTING_FIELDS)):
            for name in fields:
                if name in differ:
                    say(f"the weights in {where} get other {what}: {differ.pop(name)}")
    if differ:
        raise CheckpointError(f"{where} holds another model: {'; '.join(differ.values())}. {advice}")


def _check_same_kind(before: ByteConfig, config: ByteConfig, where: str | Path) -> None:
    """Raises CheckpointError where one of two models has experts and the other has none."""
    there, here = before.moe.num_experts, config.moe.num_experts
    if here and not there:
        raise CheckpointError(
            f"{where} holds a dense model, and model.moe.num_experts is {here} here: make experts of its MLPs first, "
            "with the command convert upcycle, and begin with what that writes; or leave model.moe out"
        )
    if there and not here:
        raise CheckpointError(
            f"{where} holds a model with {there} experts, and model.moe.num_experts is 0 here: set model.moe as it is "
            "there, or begin with a dense model (convert upcycle makes experts of one, and nothing leads back)"
        )


def check_resumable(
    stored: Mapping[str, Any],
    config: TrainConfig,
    path: Path,
    initial: bool,
    say: Callable[[str], None],
    tokenizer: str | Path | None = None,
) -> TrainConfig:
    """Checks that a run with ``config`` may go on from the checkpoint at ``path``.

    What settings mean is compared, not how they are spelled. A run that met no bad line so far may begin to skip them.

    Args:
      stored: settings that the checkpoint was written with, as JSON values.
      config: those of now.
      path: for messages.
      initial: whether it holds foreign weights without any training; such a run may have other positions and data.
      say: told what changes, a line for each setting.
      tokenizer: the directory of that of now; None: its setting names it.

    Returns:
      The settings to record from now on: those of now, with what the run began with. That is its ``init_from``, and
      the tokenizer of before where now its copy in the run is in use.

    Raises:
      CheckpointError: settings differ that must not; the message lists them.
    """
    before = TrainConfig.from_dict(stored)  # settings that are newer than it have their defaults
    copy = path.parents[1] / TOKENIZER
    directory = Path(config.data.tokenizer if tokenizer is None else tokenizer)
    original = _with_tokenizer(config, before.data.tokenizer)
    recorded = replace(original if _same_place(directory, copy) else config, init_from=before.init_from)
    config = original if _same_tokenizer(directory, copy) else config
    check_same_model(before.model, config.model, path, initial, say, _advice(before, config))
    if initial:
        if not _same_origin(before, config):
            say(_changed("init_from", before.init_from, config.init_from))
        return recorded
    refused = _refused(before, config)
    if refused:
        raise CheckpointError(
            f"{path} cannot be continued with these settings: {'; '.join(refused)}. "
            "Use the same ones, or another output_dir"
        )
    for line in _changes(before, config):
        say(line)
    return recorded


def _with_tokenizer(config: TrainConfig, tokenizer: str) -> TrainConfig:
    return replace(config, data=replace(config.data, tokenizer=tokenizer))


def _same_place(one: str | Path, other: str | Path) -> bool:
    return real(one) == real(other)


def _same_tokenizer(directory: Path, copy: Path) -> bool:
    """Whether a directory holds the tokenizer of which a run keeps a copy, wherever it lies and however it is named."""
    if _same_place(directory, copy):
        return True
    try:
        one, other = load_tokenizer(copy), load_tokenizer(directory)
    except ValueError:  # one of them is missing or broken; those who read it tell
        return False
    return one.is_same(other)


def _same_origin(before: TrainConfig, config: TrainConfig) -> bool:
    """Whether the settings name no other weights to begin with than those that the run began with."""
    was, now = before.init_from, config.init_from
    return now is None or (was is not None and _same_place(was, now))


def _advice(before: TrainConfig, config: TrainConfig) -> str:
    """The end of a refusal of another model."""
    began = ""
    if before.init_from is not None and config.init_from is None:
        began = f" (the run began with the model of init_from={clipped(before.init_from)}: name that again)"
    return f"Use the same settings{began}, or another output_dir"


def _refused(before: TrainConfig, config: TrainConfig) -> list[str]:
    """What differs of the settings that a run must keep, besides those of the model."""
    changed = [
        name
        for name in _ORDER_FIELDS
        if getattr(before.data, name) != getattr(config.data, name)
        and _order(name, before.data) != _order(name, config.data)
    ]
    if before.data.on_error == "raise" and "on_error" in changed:
        changed.remove("on_error")  # no line of those that were read is left out now
    if "train" in changed and _may_be_moved(before.data, config.data):
        changed.remove("train")
    stored, now = json.loads(before.to_json()), json.loads(config.to_json())
    differ = [f"data.{name} was {shown(stored['data'][name])} and is {shown(now['data'][name])}" for name in changed]
    differ += [
        f"{name} was {stored[name]!r} and is {now[name]!r}"
        for name in ("seed", "global_batch_size")
        if stored[name] != now[name]
    ]
    if stored["optimizer"]["name"] != now["optimizer"]["name"]:
        differ.append(f"optimizer.name was {stored['optimizer']['name']!r} and is {now['optimizer']['name']!r}")
    clips = [c["optimizer"]["gradient_clip_norm"] for c in (stored, now)]
    if (clips[0] is None) != (clips[1] is None):
        differ.append(f"optimizer.gradient_clip_norm was {clips[0]} and is {clips[1]}")
    if (stored["ema_decay"] is None) != (now["ema_decay"] is None):
        differ.append(f"ema_decay was {stored['ema_decay']} and is {now['ema_decay']}")
    return differ


# The same weights and the same network, which is trained in another way.
_OTHERWISE_TRAINED = {"model.moe.noise", "model.moe.cooling_steps", "model.moe.rebalance_interval"}
_REMARKS = {
    "init_from": " (without effect: the run goes on with its own weights)",
    "data.train": ": the run goes on where the files there have the same names and contents",
}


def _changes(before: TrainConfig, config: TrainConfig) -> list[str]:
    """A line for each setting that means something else than before, of two runs that may be one."""
    there, here = _architecture(before.model), _architecture(config.model)
    same = {f"model.{name}" for name, (meaning, _) in here.items() if name in there and there[name][0] == meaning}
    same -= _OTHERWISE_TRAINED
    same |= {f"data.{name}" for name in _ORDER_FIELDS if _order(name, before.data) == _order(name, config.data)}
    if _same_place(before.output_dir, config.output_dir):
        same.add("output_dir")
    if _same_origin(before, config):
        same.add("init_from")
    stored, now = (_flat(json.loads(each.to_json())) for each in (before, config))
    return [
        _changed(name, stored[name], value)
        for name, value in now.items()
        if stored[name] != value and not any(name == s or name.startswith(f"{s}.") for s in same)
    ]


def _changed(name: str, was: Any, now: Any) -> str:
    return f"setting changed: {name} {shown(was)} -> {shown(now)}" + _REMARKS.get(name, "")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
