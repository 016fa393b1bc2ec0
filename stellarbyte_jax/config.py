"""Every setting of a run, as frozen dataclasses that check themselves.

A run is a Python file with ``def config() -> TrainConfig``. :func:`load` reads it and applies ``a.b=c`` overrides.
This module imports neither jax nor the rest of the package, so it costs nothing to import.
"""

import contextlib
import dataclasses
import difflib
import importlib.util
import json
import math
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

AttentionImplementation = Literal["auto", "reference", "xla", "cudnn"]


class ConfigError(ValueError):
    """A setting that does not exist, has the wrong type or contradicts another one."""


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


@dataclass(frozen=True)
class _Rule:
    """What a number must satisfy, said in its field's type."""

    words: str
    holds: Callable[[float], bool]


_POSITIVE = _Rule("positive", lambda v: 0 < v < math.inf)
_NOT_NEGATIVE = _Rule("not negative", lambda v: 0 <= v < math.inf)
PositiveInt = Annotated[int, _POSITIVE]
PositiveFloat = Annotated[float, _POSITIVE]
NonNegativeInt = Annotated[int, _NOT_NEGATIVE]
NonNegativeFloat = Annotated[float, _NOT_NEGATIVE]
Fraction = Annotated[float, _Rule("in [0, 1)", lambda v: 0 <= v < 1)]
Share = Annotated[float, _Rule("in [0, 1]", lambda v: 0 <= v <= 1)]


class _Section:
    """What every settings class can do: check types, turn into plain JSON values and back."""

    _aliases: ClassVar[Mapping[str, str]] = {}

    def __new__(cls, **values: Any) -> Self:
        """Raises ConfigError on a name that does not exist."""
        for name in values:
            if name not in _hints(cls):
                raise ConfigError(_unknown(name, _hints(cls), cls.__name__))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, hint in _hints(type(self)).items():
            value = getattr(self, name)
            if isinstance(value, list):
                value = tuple(value)
            elif type(value) is int and _fits(0.5, hint):
                value = float(value)
            object.__setattr__(self, name, value)
            _require(_fits(value, hint), f"{type(self).__name__}.{name} must be {_spell(hint)}, got {value!r}")
        self._check()

    def _check(self) -> None:
        """Raises ConfigError where settings contradict each other."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, nested as the classes are."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_dict`. Raises ConfigError on a name that does not exist."""
        _require(isinstance(values, Mapping), f"{cls.__name__} must be an object with named settings, got {values!r}")
        hints = _hints(cls)
        settings: dict[str, Any] = {}
        for name, value in values.items():
            known = cls._aliases.get(name, name)
            _require(known not in settings, f"{cls.__name__}.{known} is given twice: once as {name!r}; give it once")
            settings[known] = hints[known].from_dict(value) if _is_section(hints.get(known)) else value
        return cls(**settings)


# The original StellarByte's names for the same settings, accepted by ByteConfig.from_dict.
_ALIASES = {
    "model_dim": "hidden_size",
    "dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "n_kv_heads": "num_key_value_heads",
    "hidden_dim": "intermediate_size",
    "max_seq_len": "max_position_embeddings",
    "layer_norm_eps": "rms_norm_eps",
    "xpos_rope_theta": "rope_theta",
    "hidden_dropout_prob": "hidden_dropout",
    "attention_dropout_prob": "attention_dropout",
    "residual_dropout_prob": "residual_dropout",
}


@dataclass(frozen=True, kw_only=True)
class ByteConfig(_Section):
    """The network. Field names are Hugging Face's where one exists.

    ``None`` means "derived": see the properties ``kv_heads``, ``head_size`` and ``mlp_size``.
    """

    _aliases = _ALIASES

    vocab_size: PositiveInt = 32000
    hidden_size: PositiveInt = 768
    num_hidden_layers: PositiveInt = 12
    num_attention_heads: PositiveInt = 12
    num_key_value_heads: PositiveInt | None = None  # fewer than the heads: grouped-query attention, a smaller KV cache
    head_dim: PositiveInt | None = None
    intermediate_size: PositiveInt | None = None
    hidden_act: Literal["silu", "gelu", "gelu_pytorch_tanh"] = "silu"  # silu: SwiGLU; gelu: GEGLU
    max_position_embeddings: PositiveInt = 2048
    tie_word_embeddings: bool = False

    position_embedding: Literal["rope", "xpos"] = "rope"  # xpos cannot be written as a Llama checkpoint
    rope_theta: PositiveFloat = 10000.0
    rope_pairing: Literal["half", "interleaved"] = "half"  # half: channel i turns with i + H/2, as in Hugging Face
    xpos_scale_base: PositiveFloat = 512.0  # smaller: attention decays faster with distance

    rms_norm_eps: PositiveFloat = 1e-5
    rms_norm_eps_rule: Literal["add", "clamp"] = "add"
    attention_bias: bool = False  # on q, k and v
    qk_norm: bool = False  # RMSNorm over each head of q and k: tames growing attention logits
    sliding_window: PositiveInt | None = None
    layer_types: tuple[str, ...] | None = None  # "full_attention" | "sliding_attention" for each layer
    attention_logit_softcap: PositiveFloat | None = None  # refuses the fused kernels

    attention_dropout: Fraction = 0.0  # refuses the fused kernels
    hidden_dropout: Fraction = 0.0
    residual_dropout: Fraction = 0.0
    initializer_range: PositiveFloat = 0.02

    # How it is computed; none of this changes the function or the checkpoint.
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    attention_implementation: AttentionImplementation = "auto"
    remat: Literal["none", "dots", "full"] = "none"  # full: least memory, about a third more time
    scan_unroll: PositiveInt | None = 1  # None: all layers; faster steps on small models, longer compilation

    def _check(self) -> None:
        _require(
            self.head_dim is not None or self.hidden_size % self.num_attention_heads == 0,
            f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}: "
            "change one of them, or give head_dim",
        )
        _require(
            self.num_attention_heads % self.kv_heads == 0,
            f"num_attention_heads {self.num_attention_heads} is not divisible by num_key_value_heads {self.kv_heads}",
        )
        _require(self.head_size % 2 == 0, f"the head size must be even for rotary embeddings, got {self.head_size}")
        if self.layer_types is not None:
            known = ("full_attention", "sliding_attention")
            unknown = sorted(set(self.layer_types) - set(known))
            _require(not unknown, f"layer_types may hold {known}, got {unknown}")
            _require(
                len(self.layer_types) == self.num_hidden_layers,
                f"layer_types names {len(self.layer_types)} layers, num_hidden_layers is {self.num_hidden_layers}",
            )
            _require(
                self.sliding_window is not None or "sliding_attention" not in self.layer_types,
                "layer_types asks for sliding_attention: give sliding_window",
            )

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """Channels of one head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def mlp_size(self) -> int:
        """Width of the feed-forward layer; 4 x hidden_size where none is given."""
        return self.intermediate_size or 4 * self.hidden_size

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Sliding window of each layer, None where attention is full."""
        if self.layer_types is None:
            return (self.sliding_window,) * self.num_hidden_layers
        return tuple(self.sliding_window if t == "sliding_attention" else None for t in self.layer_types)


@dataclass(frozen=True, kw_only=True)
class DataConfig(_Section):
    """Documents, and how they become [batch, sequence_length] arrays."""

    # Paths or globs of .jsonl, .jsonl.gz, .jsonl.zst, .parquet, or directories made by scripts/prepare_data.py.
    train: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    tokenizer: str = "tokenizer"
    fields: tuple[str, ...] = ("text",)  # joined by a newline where there is no template
    template: str | None = None  # such as "Question: {question}\nAnswer: {answer}"
    sequence_length: PositiveInt = 1024
    add_bos: bool = True
    add_eos: bool = True
    max_documents_per_sequence: PositiveInt = 16  # a row that would hold more is closed early and padded
    shuffle: bool = True
    epochs: PositiveInt | None = None  # None: as many as the steps need
    on_error: Literal["raise", "skip"] = "raise"  # skip: bad lines are left out and counted in the log
    workers: NonNegativeInt = 1  # processes that tokenise; 0: in the training process. The batches do not depend on it
    prefetch: PositiveInt = 2  # batches prepared ahead of the device
    cache_dir: str | None = None  # decompressed files and line indexes; None: ~/.cache/stellarbyte_jax

    def _check(self) -> None:
        _require(self.sequence_length >= 2, "data.sequence_length must be at least 2: one token predicts the next")
        _require(len(self.fields) > 0, "data.fields must name at least one field")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(_Section):
    """The update rule. ``learning_rate`` is the peak of the schedule."""

    name: Literal["adamw", "lion", "muon"] = "adamw"
    learning_rate: PositiveFloat = 6e-4
    b1: Fraction = 0.9
    b2: Fraction = 0.95
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1  # only on matrices: norms, biases and scales are left alone
    decay_embeddings: bool = True
    gradient_clip_norm: PositiveFloat | None = 1.0


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(_Section):
    """Learning rate over optimizer steps, counted after accumulation."""

    name: Literal["cosine", "cosine_restarts", "wsd", "linear", "constant"] = "cosine"
    warmup_steps: NonNegativeInt = 100
    final_ratio: Share = 0.1  # of the peak, at the last step
    decay_steps: PositiveInt | None = None  # wsd: length of the last phase; None: a fifth of the run
    cycles: PositiveInt = 1  # cosine_restarts
    cycle_decay: PositiveFloat = 1.0  # cosine_restarts: each cycle's peak is this times the last one's

    def _check(self) -> None:
        _require(
            self.name == "cosine_restarts" or (self.cycles == 1 and self.cycle_decay == 1.0),
            f"schedule.cycles and cycle_decay belong to cosine_restarts, the schedule is {self.name}",
        )
        _require(
            self.name == "wsd" or self.decay_steps is None,
            f"schedule.decay_steps belongs to wsd, the schedule is {self.name}",
        )


@dataclass(frozen=True, kw_only=True)
class LossConfig(_Section):
    """What is minimised."""

    label_smoothing: Fraction = 0.0
    z_loss: NonNegativeFloat = 0.0  # weight of log(Z)^2, keeps logits near zero; 1e-4 is usual


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(_Section):
    """Validation during training."""

    interval: PositiveInt = 500  # optimizer steps
    batches: PositiveInt | None = 50  # None: the whole validation set
    patience: PositiveInt | None = None  # stop after so many validations without a better loss


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(_Section):
    """What is kept on disk."""

    interval: PositiveInt = 500  # optimizer steps
    keep_latest: PositiveInt = 2
    keep_best: NonNegativeInt = 1  # by validation loss


@dataclass(frozen=True, kw_only=True)
class LoggingConfig(_Section):
    """Where metrics go. The console and ``metrics.jsonl`` are always written."""

    interval: PositiveInt = 10  # optimizer steps
    trackers: tuple[str, ...] = ()  # of "tensorboard", "wandb", "swanlab"

    def _check(self) -> None:
        known = ("tensorboard", "wandb", "swanlab")
        unknown = [t for t in self.trackers if t not in known]
        _require(not unknown, f"logging.trackers may hold {known}, got {unknown}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(_Section):
    """One complete run."""

    output_dir: str
    steps: PositiveInt  # optimizer steps
    global_batch_size: PositiveInt = 32  # sequences in one optimizer step, over all devices and accumulation steps
    gradient_accumulation_steps: PositiveInt = 1
    seed: NonNegativeInt = 0
    ema_decay: Fraction | None = None  # keeps an average of the weights, used for validation and export
    sample_prompts: tuple[str, ...] = ()  # continued at the end of the run
    export_at_end: bool = False  # writes output_dir/hf; the model must be one that a Hugging Face family expresses
    model: ByteConfig = field(default_factory=ByteConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def _check(self) -> None:
        _require(
            self.global_batch_size % self.gradient_accumulation_steps == 0,
            f"global_batch_size {self.global_batch_size} is not divisible by "
            f"gradient_accumulation_steps {self.gradient_accumulation_steps}",
        )
        _require(
            self.data.sequence_length <= self.model.max_position_embeddings,
            f"data.sequence_length {self.data.sequence_length} is longer than "
            f"model.max_position_embeddings {self.model.max_position_embeddings}",
        )
        _require(
            self.schedule.warmup_steps + (self.schedule.decay_steps or 0) <= self.steps,
            f"schedule.warmup_steps {self.schedule.warmup_steps} and decay_steps {self.schedule.decay_steps} "
            f"do not fit into {self.steps} steps",
        )
        _require(
            self.evaluation.patience is None or bool(self.data.validation),
            "evaluation.patience stops by the validation loss: give data.validation, or leave patience out",
        )

    def to_json(self) -> str:
        """The resolved config, as stored beside every checkpoint."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)


def load(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Runs a config file's ``config()`` and applies ``section.name=value`` overrides.

    Values are read as the field's type; lists as JSON or comma-separated words; ``none`` is None.

    Raises:
      ConfigError: the file is missing or fails, or an override names no setting or has the wrong type.
    """
    path = Path(path)
    if not path.is_file():
        nearby = sorted(p.name for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        guess = difflib.get_close_matches(path.name, nearby, n=1)
        hint = f"; did you mean {path.parent / guess[0]}?" if guess else ""
        raise ConfigError(f"config file {path} does not exist{hint}")
    spec = importlib.util.spec_from_file_location(f"_config_{path.stem}", path)
    _require(spec is not None, f"config file {path} must be a Python file, ending in .py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        _require(callable(getattr(module, "config", None)), "must define `def config() -> TrainConfig`")
        made = module.config()
        _require(isinstance(made, TrainConfig), f"config() must return a TrainConfig, got {type(made).__name__}")
    except Exception as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        lines += [error.lineno] if isinstance(error, SyntaxError) else []
        kind = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
        raise ConfigError(f"{path}{f', line {lines[-1]}' if lines else ''}: {kind}{error}") from error
    return override(made, overrides)


def override(config: TrainConfig, overrides: Sequence[str]) -> TrainConfig:
    """Returns ``config`` with ``section.name=value`` strings applied together, then checked once.

    Raises:
      ConfigError: as :func:`load`.
    """
    values = config.to_dict()
    settings = _settings(TrainConfig)
    for text in overrides:
        name, equals, raw = (part.strip() for part in text.partition("="))
        _require(bool(equals), f"--set {text!r}: expected section.name=value")
        _require(name in settings, _unknown(name, settings, "--set"))
        readings = [value for value in _readings(raw) if _fits(value, settings[name])]
        _require(len(readings) > 0, f"--set {name}={raw}: {name} must be {_spell(settings[name])}")
        *sections, leaf = name.split(".")
        target = values
        for section in sections:
            target = target[section]
        target[leaf] = readings[0]
    return TrainConfig.from_dict(values)


def _hints(cls: type) -> dict[str, Any]:
    return {n: h for n, h in typing.get_type_hints(cls, include_extras=True).items() if not n.startswith("_")}


def _is_section(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, _Section)


def _settings(cls: type, prefix: str = "") -> dict[str, Any]:
    """The type of every setting under its dotted name."""
    settings = {}
    for name, hint in _hints(cls).items():
        settings |= _settings(hint, f"{prefix}{name}.") if _is_section(hint) else {prefix + name: hint}
    return settings


def _unknown(name: str, known: Mapping[str, Any], where: str) -> str:
    guess = [k for k in known if k.startswith(f"{name}.") or k.rpartition(".")[2] == name.rpartition(".")[2]]
    guess += difflib.get_close_matches(name, known, n=2, cutoff=0.6)
    hint = f"; did you mean {' or '.join(dict.fromkeys(guess))}?" if guess else ""
    return f"{where}: there is no setting {name!r}{hint} (settings: {', '.join(known)})"


def _options(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def _fits(value: Any, hint: Any) -> bool:
    """Whether ``value`` has a type of ``hint`` and keeps its rule; an int is also a float, a bool is neither."""
    for option in _options(hint):
        origin, arguments = typing.get_origin(option), typing.get_args(option)
        if origin is Annotated:
            fits = _fits(value, arguments[0]) and arguments[1].holds(value)
        elif origin is Literal:
            fits = value in arguments
        elif origin is tuple:
            fits = isinstance(value, tuple) and all(_fits(v, arguments[0]) for v in value)
        elif option in (int, float):
            fits = isinstance(value, int | option) and not isinstance(value, bool)
        else:
            fits = isinstance(value, option)
        if fits:
            return True
    return False


def _spell(hint: Any) -> str:
    words = []
    for option in _options(hint):
        origin, arguments = typing.get_origin(option), typing.get_args(option)
        if origin is Annotated:
            words.append(f"{_spell(arguments[0])} ({arguments[1].words})")
        elif origin is Literal:
            words.append("one of " + ", ".join(map(repr, arguments)))
        elif origin is tuple:
            words.append(f"a list of {_spell(arguments[0])}")
        else:
            words.append("none" if option is type(None) else option.__name__)
    return " or ".join(words)


def _readings(raw: str) -> Iterator[Any]:
    """What the text of an override can mean, the most specific first."""
    constants = {"none": None, "null": None, "true": True, "false": False}
    if raw.lower() in constants:
        yield constants[raw.lower()]
    for number in (int, float):
        with contextlib.suppress(ValueError):
            yield number(raw)
    with contextlib.suppress(ValueError):
        parsed = json.loads(raw)
        if isinstance(parsed, list):
            yield tuple(parsed)
    yield raw
    yield tuple(word.strip() for word in raw.split(",") if word.strip())
