"""What a table of a family is made of: where each weight lies, and what each setting is called.

The same table is read both ways. ``{i}`` in a name is the layer, ``{e}`` the expert.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.hf.layout import Layout

_FILES = Path(__file__).parent / "torch_model"


def modelling_file(name: str) -> Path:
    """Where the package keeps a modelling file for transformers."""
    return _FILES / name


@dataclass(frozen=True)
class Row:
    """One weight: our path, their name, and the layout between them.

    Rows of the same name are parts of one tensor of theirs, joined along its first axis in the table's order.

    Attributes:
      ours: path in the parameter tree; ``layers/...`` leaves out the number of the stack.
      theirs: name in the checkpoint; one with ``{e}`` is a tensor for each expert, the first axis of a layer's weight.
      layout: from one to the other.
      slot: index in the last axis but one, "gate", of ``gate_up``, which is two tensors of theirs.
      rotary: the last axis of ours is rotated in pairs, in the pairing of the settings or another one of the family's.
      vocab: axis of ours that is padded beyond the vocabulary, which theirs is not.
      float32: it stays so in files of another dtype, since rounding would change more than a weight.
    """

    ours: str
    theirs: str
    layout: Layout
    slot: int | None = None
    rotary: bool = False
    vocab: int | None = None
    float32: bool = False


@dataclass(frozen=True)
class Piece:
    """A row for one layer: the part ``index``, of shape ``shape``, of the leaf at ``path``."""

    path: str
    index: tuple[int | slice, ...]
    shape: tuple[int, ...]
    row: Row

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """Its shape in their layout."""
        return self.row.layout.hf_shape(self.shape)


@dataclass(frozen=True)
class Entry:
    """One tensor of theirs: its pieces, joined along the first axis."""

    theirs: str
    pieces: tuple[Piece, ...]

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """Shape of their tensor."""
        first, *rest = (piece.hf_shape for piece in self.pieces)
        return (first[0] + sum(shape[0] for shape in rest), *first[1:])

    def rows_of(self, number: int) -> slice:
        """Where that piece lies along the first axis."""
        start = sum(piece.hf_shape[0] for piece in self.pieces[:number])
        return slice(start, start + self.pieces[number].hf_shape[0])

    def dtype(self, asked: np.dtype) -> np.dtype:
        """Of the tensor in files that hold ``asked``."""
        return np.dtype(np.float32) if any(piece.row.float32 for piece in self.pieces) else asked


@dataclass(frozen=True)
class Field:
    """Fields of ``config.json`` that are read and written together.

    Attributes:
      defaults: their names, with what an absent one means.
      read: settings of ByteConfig from the values of all fields; raises ValueError for what it cannot express.
      write: the values from the settings.
      nullable: those that may be null in a file; transformers refuses it in the others, some of them in training alone.
    """

    defaults: Mapping[str, Any]
    read: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    write: Callable[[ByteConfig], Mapping[str, Any]]
    nullable: tuple[str, ...] = ()


def same(
    name: str,
    default: Any,
    *,
    ours: str | None = None,
    derived: Callable[[ByteConfig], Any] | None = None,
    nullable: bool = False,
) -> Field:
    """A field that is one setting of ByteConfig.

    Args:
      name: theirs.
      default: what its absence means.
      ours: the setting, where it has another name.
      derived: what is written, where that is not the setting as it stands.
      nullable: see :class:`Field`.
    """
    setting = ours or name
    write = derived or (lambda config: getattr(config, setting))
    return Field(
        {name: default},
        lambda values: {setting: values[name]},
        lambda config: {name: write(config)},
        (name,) if nullable else (),
    )


@dataclass(frozen=True)
class Family:
    """What a Hugging Face ``model_type`` means here.

    Attributes:
      model_type: the name in config.json.
      architecture: the class with a language-modelling head.
      rows: the weights.
      fused: rows that files may have in place of those of the same paths, read and never written.
      buffers: patterns of tensors that older checkpoints hold and nobody needs.
      fields: what can be said in config.json, beside the rotary settings, which are the same everywhere.
      constants: settings of ByteConfig that are always so in this family.
      fixed: their fields that may only have the values listed (the first is the default).
      told: fields of training alone: accepted, and told where they are not 0 or false.
      rope_theta: what its absence means.
      rope_types: kinds of rotary scaling that it has, under their names; None for all.
      pairings: of rotated channels; weights of another pairing are reordered to the first.
      limit: why transformers refuses a model that the table can express; None where it does not.
      reads_tokenizer: whether transformers, which reads every tokenizer of the family by one rule, makes the ids that
        its tokenizer.json says; None where it goes by the file.
      modelling_file: of the package, which goes with the weights where transformers does not know the family.
    """

    model_type: str
    architecture: str
    rows: tuple[Row, ...]
    buffers: tuple[str, ...]
    fields: tuple[Field, ...]
    constants: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    fused: tuple[Row, ...] = ()
    told: tuple[str, ...] = ()
    rope_theta: float = 10000.0
    rope_types: tuple[str, ...] | None = None
    pairings: tuple[str, ...] = ("half",)
    limit: Callable[[ByteConfig], str | None] = lambda config: None
    reads_tokenizer: Callable[[Mapping[str, Any]], bool] | None = None
    modelling_file: str | None = None

    @property
    def auto_map(self) -> dict[str, str]:
        """Where transformers finds the classes of the modelling file."""
        assert self.modelling_file is not None
        module, name = self.modelling_file.removesuffix(".py"), self.architecture.removesuffix("ForCausalLM")
        classes = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}
        return {auto: f"{module}.{name}{suffix}" for auto, suffix in classes.items()}

    @property
    def defaults(self) -> dict[str, Any]:
        """Every field with what its absence means."""
        return {name: default for f in self.fields for name, default in f.defaults.items()}

    @property
    def nullable(self) -> frozenset[str]:
        """Fields that may be null."""
        return frozenset(name for f in self.fields for name in f.nullable)

    def keeps_float32(self, path: str) -> bool:
        """Whether the leaf at a path of the parameter tree is float32 in files of every dtype."""
        ours = re.sub(r"^layers/\d+/", "layers/", path)
        return any(row.float32 for row in self.rows if row.ours == ours)

    def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of ByteConfig, but the rotary ones, that ``values`` with all fields ask for."""
        settings = dict(self.constants)
        for each in self.fields:
            settings |= each.read(values)
        return settings

    def write(self, config: ByteConfig) -> dict[str, Any]:
        """The fields that say what ``config`` says."""
        return {name: value for each in self.fields for name, value in each.write(config).items()}

    def entries(self, config: ByteConfig, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Entry]:
        """Every tensor of a checkpoint, layer after layer, for the leaves whose ``shapes`` are given by path.

        What a model does not have, such as biases or a tied head, has no shape and gives no tensor.
        """
        yield from _joined(self._outside(config, shapes))
        for i, (stack, place) in enumerate(config.layer_places):
            yield from _joined(self._layer(shapes, i, stack, place))

    def _outside(self, config: ByteConfig, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Piece]]:
        for row in self.rows:
            if row.ours in shapes:
                index: tuple[int | slice, ...] = ()
                shape = shapes[row.ours]
                if row.vocab is not None and shape[row.vocab] != config.vocab_size:
                    index = (slice(None),) * row.vocab + (slice(config.vocab_size),)
                    shape = (*shape[: row.vocab], config.vocab_size, *shape[row.vocab + 1 :])
                yield row.theirs, Piece(row.ours, index, shape, row)

    def _layer(
        self, shapes: Mapping[str, tuple[int, ...]], i: int, stack: int, place: int
    ) -> Iterator[tuple[str, Piece]]:
        for row in self.rows:
            path = row.ours.replace("layers/", f"layers/{stack}/", 1)
            if not row.ours.startswith("layers/") or path not in shapes:
                continue
            shape = shapes[path][1:]
            if "{e}" not in row.theirs:
                yield row.theirs.format(i=i), _piece(row, path, (place,), shape)
                continue
            for e in range(shape[0]):
                yield row.theirs.format(i=i, e=e), _piece(row, path, (place, e), shape[1:])


def _piece(row: Row, path: str, index: tuple[int | slice, ...], shape: tuple[int, ...]) -> Piece:
    if row.slot is not None:
        index += (slice(None),) * (len(shape) - 2) + (row.slot,)
        shape = (*shape[:-2], shape[-1])
    return Piece(path, index, shape, row)


def _joined(named: Iterator[tuple[str, Piece]]) -> Iterator[Entry]:
    tensors: dict[str, list[Piece]] = {}
    for name, piece in named:
        tensors.setdefault(name, []).append(piece)
    for name, pieces in tensors.items():
        yield Entry(name, tuple(pieces))
