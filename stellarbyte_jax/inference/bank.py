"""Adapters of one base at run time: added, replaced and removed while texts are generated, and chosen row by row.

All adapters of a bank have arrays of the same shapes, padded with zeros to one rank, so that whichever are chosen the
same compiled programs run. R is that rank, B the rows of a batch.
"""

import dataclasses
import threading
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import jax
import numpy as np

from stellarbyte_jax.checkpoint.adapters import Adapters, read_adapters
from stellarbyte_jax.checkpoint.checksum import array_checksums
from stellarbyte_jax.config import ByteConfig, LoRAConfig
from stellarbyte_jax.hf.tensors import flatten
from stellarbyte_jax.inference.bank_arrays import Form, by_row, joined, merge_into, padded, with_shares
from stellarbyte_jax.inference.bank_checks import (
    EXPERTS,
    check_adapters,
    check_checksums,
    check_routers,
    targets_in,
)
from stellarbyte_jax.model.decoder import ByteTransformer, param_shapes
from stellarbyte_jax.model.layers import layers_are_apart
from stellarbyte_jax.model.lora import A
from stellarbyte_jax.model.trees import Params, merge, partition

Choice = str | Mapping[str, float] | None
Choices = Choice | Sequence[Choice]
Given = str | Path | tuple[ByteTransformer, Params]


class _Held(NamedTuple):
    """An adapter of the bank.

    Attributes:
      arrays: see ``bank_arrays.Form``.
      rank: its own; what is beyond is zero.
      dora: whether it has DoRA.
    """

    arrays: Params
    rank: int
    dora: bool


class AdapterBank:
    """A base and adapters of it by name: given to ``generate`` in place of weights.

    ``generate(model, bank, prompts, adapter=["a", None, "b"], max_new_tokens=32)``

    Adding, replacing and removing adapters changes no array: calls that run at the time, in other threads too, go on
    with the adapters that they began with.

    Attributes:
      model: the base, without adapters.
      params: its weights, never changed: merged weights are others, and these are what unmerging gives.
      slots: how many adapters it holds at most.
      max_rank: the rank that adapters are padded to.
    """

    def __init__(
        self,
        model: ByteTransformer,
        params: Params,
        *,
        slots: int = 8,
        max_rank: int = 16,
        target_modules: Sequence[str] = ("all-linear",),
        dora: bool = False,
    ) -> None:
        """A bank without adapters.

        Under ``jax.set_mesh`` adapters lie on the mesh as those of a run do.

        Args:
          model: the network without adapters.
          params: its weights; best cast once, see ``programs.cast_for_inference``.
          slots: how many adapters it holds at most.
          max_rank: the largest rank of an adapter, or of several that are chosen together. Memory and operations of
            every adapter are those of this rank.
          target_modules: weights that adapters may be of, as in ``LoRAConfig``.
          dora: whether there may be adapters with DoRA, which costs another product of every output.

        Raises:
          ValueError: the model has adapters itself, numbers are not positive, or there are no such weights.
        """
        if model.config.lora.r:
            raise ValueError("the base of a bank has no adapters of its own: merge these (stellarbyte_jax.lora)")
        if layers_are_apart(params):
            raise ValueError("a bank takes stacks of weights: give those of cast_for_inference, not of split_layers")
        for name, value in (("slots", slots), ("max_rank", max_rank)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}: give a whole number from 1 on")
        self.model, self.params, self.slots, self.max_rank = model, params, slots, max_rank
        # Adapters have their own factors in B, so that the network's is 1.
        lora = LoRAConfig(r=max_rank, lora_alpha=float(max_rank), target_modules=tuple(target_modules), dora=dora)
        self._lora, self._form = lora, Form(_with_adapters(model.config, lora))
        self._writing = threading.Lock()
        self._held: Mapping[str, _Held] = MappingProxyType({})
        self._checksums: Mapping[str, int] | None = None
        self._scales, self._zeros = map(self._form.placed, (self._form.factors(), self._form.empty()))
        adapted = {path.removesuffix(A) for path in flatten(self._zeros) if path.endswith(A)}
        self._adapted, self._rest = partition(params, lambda path: "/".join(path) in adapted)

    @classmethod
    def holding(
        cls, model: ByteTransformer, params: Params, adapters: Mapping[str, Given], *, slots: int | None = None
    ) -> "AdapterBank":
        """A bank of these adapters, of the largest of their ranks and all of their weights; see :meth:`add`.

        Args:
          model: the base.
          params: its weights.
          adapters: by name.
          slots: None: as many as there are adapters.
        """
        read = {name: _read(given) for name, given in adapters.items()}
        configs = [each.model.config.lora for each in read.values()]
        targets = sorted({target for each in read.values() for target in targets_in(each.params)})
        bank = cls(
            model,
            params,
            slots=max(1, len(read)) if slots is None else slots,
            max_rank=max([1, *(config.r for config in configs)]),
            target_modules=targets or ("all-linear",),
            dora=any(config.dora for config in configs),
        )
        for name, each in read.items():
            bank._add(name, each)
        return bank

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the adapters, in the order in which they came."""
        return tuple(self._held)

    def add(
        self,
        name: str,
        adapter: Given,
        *,
        step: int | None = None,
        revision: str | None = None,
        base: str | Path | None = None,
    ) -> None:
        """Adds an adapter, or replaces the one of this name. Nothing is compiled for it.

        Args:
          name: by which it is chosen.
          adapter: a run with adapters, ``RUN/checkpoints/STEP``, a directory of PEFT, ``owner/name`` of the hub; or a
            network with adapters and its weights, or its adapters alone.
          step: checkpoint of a run; None for the newest, or for the one that the path names.
          revision: branch, tag or commit of a name of the hub.
          base: of an adapter of PEFT, the directory of its base, where the one that it names is not here.

        Raises:
          ValueError: the bank is full, or the adapter is of another base, of a larger rank, of weights that the bank
            has no adapters of, or of a kind that a bank cannot hold; the message says what to do.
          CheckpointError: the run's checkpoint cannot be read.
        """
        self._add(name, _read(adapter, step=step, revision=revision, base=base))

    def remove(self, name: str) -> None:
        """Removes an adapter; calls that run with it go on.

        Raises:
          ValueError: there is none of this name.
        """
        with self._writing:
            held = self._held
            self._known(name, held)
            self._held = MappingProxyType({other: each for other, each in held.items() if other != name})

    def merge(self, adapter: str | Mapping[str, float]) -> Params:
        """Weights of the base with an adapter in them, or with a sum of several: the base's programs run with them.

        Arrays that have no adapter are the base's own, the others are new ones in the same dtype: the memory of these
        matrices a second time. To unmerge is to use :attr:`params` again.

        Raises:
          ValueError: as :meth:`chosen`.
        """
        adapters = merge(self._resolved(adapter, self._held), self._scales)
        return merge(merge_into(self._form, self._adapted, adapters), self._rest)

    def chosen(self, model: ByteTransformer, adapter: Choices, rows: int) -> tuple[ByteTransformer, Params]:
        """The network that generates with adapters, and what it has besides the weights of the base.

        Args:
          model: the base, maybe with other settings of the cache or of positions.
          adapter: of all rows, or a list with one for each: a name; names and what their adapters are multiplied by,
            which are added up; or None, for the base.
          rows: number of rows.

        Raises:
          ValueError: there is no such adapter, the list is of another length, ranks of several add up to more than
            ``max_rank``, experts have adapters and rows differ, or the model is another one.
        """
        self._check_model(model)
        held = self._held
        if adapter is None:
            return model, {}
        network = _with_adapters(model.config, dataclasses.replace(self._lora, dora=False))
        if isinstance(adapter, str | Mapping):
            return network, merge(self._resolved(adapter, held), self._scales)
        if not isinstance(adapter, Sequence):
            raise ValueError(f"adapter is {adapter!r}: give a name, or a list with one for each row")
        if len(adapter) != rows:
            raise ValueError(f"adapter names {len(adapter)} adapters for {rows} rows: give one for each row, or one")
        found: list[Params] = []
        for number, each in enumerate(adapter):
            same = adapter.index(each)
            found.append(found[same] if same < number else self._resolved(each, held))
        if not EXPERTS & targets_in(self._zeros):
            return network, merge(by_row(self._form, tuple(found)), self._scales)
        if any(each is not found[0] for each in found):
            raise ValueError(
                "rows differ in their adapters, and adapters of experts, which get the tokens of all rows together, "
                "are the same for all: generate the rows of each adapter in a call of their own, or make the bank "
                "without experts in target_modules"
            )
        return network, merge(found[0], self._scales)

    def _add(self, name: str, adapters: Adapters) -> None:
        if not isinstance(name, str) or not name:
            raise ValueError(f"the name of an adapter is {name!r}: give a text that is not empty")
        self._check_room(name)
        check_adapters(name, adapters.model.config.lora, targets_in(adapters.params), self._lora)
        check_routers(name, adapters, self.params)
        if adapters.checksums is not None and all(x.dtype == np.float32 for x in jax.tree.leaves(self.params)):
            if self._checksums is None:  # those of weights that were cast would be others
                self._checksums = array_checksums(self.params)
            check_checksums(name, adapters.checksums, self._checksums)
        arrays, magnitudes = map(self._form.placed, padded(name, adapters, self._form))
        lora = adapters.model.config.lora
        if lora.dora:
            arrays = with_shares(self._form, self._adapted, arrays, magnitudes, self._scales)
        held = _Held(arrays, lora.r, lora.dora)
        with self._writing:
            self._check_room(name)
            self._held = MappingProxyType({**self._held, name: held})

    def _check_room(self, name: str) -> None:
        held = self._held
        if name not in held and len(held) >= self.slots:
            raise ValueError(
                f"the bank is full: its {self.slots} slots hold {_listed(held)}. Remove one before {name!r} is added, "
                "or make a bank with more slots"
            )

    def _check_model(self, model: ByteTransformer) -> None:
        if model.config != self.model.config and _shapes(model) != _shapes(self.model):
            raise ValueError("the model is not the base of this bank: give bank.model, or a bank of this model")

    def _known(self, name: object, held: Mapping[str, _Held]) -> _Held:
        if not isinstance(name, str) or name not in held:
            raise ValueError(f"there is no adapter {name!r}; there are {_listed(held) or 'none'}: add it, or name one")
        return held[name]

    def _resolved(self, choice: Choice, held: Mapping[str, _Held]) -> Params:
        """The arrays of one adapter, of a sum of several, or of none."""
        if choice is None:
            return self._zeros
        if isinstance(choice, str):
            return self._known(choice, held).arrays
        if not isinstance(choice, Mapping) or not choice:
            raise ValueError(f"an adapter is {choice!r}: give a name, names with what to multiply them by, or None")
        parts = {name: self._known(name, held) for name in choice}
        multiplied = [name for name, part in parts.items() if part.dora]
        if multiplied:
            raise ValueError(
                f"adapter {multiplied[0]!r} has DoRA, which multiplies outputs and is no sum: choose it alone, by its "
                "name"
            )
        total = sum(part.rank for part in parts.values())
        if total > self.max_rank:
            ranks = " + ".join(f"{part.rank} of {name}" for name, part in parts.items())
            raise ValueError(
                f"together these adapters have rank {total} ({ranks}), and max_rank of the bank is {self.max_rank}: "
                f"make it with max_rank={total}"
            )
        summed, rank = self._zeros, 0
        for name, part in parts.items():
            weight = choice[name]
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not np.isfinite(weight):
                raise ValueError(f"adapter {name!r} is multiplied by {weight!r}: give a finite number")
            summed = joined(self._form, summed, part.arrays, np.int32(rank), np.float32(weight))
            rank += part.rank
        return summed


def _read(
    given: Given, *, step: int | None = None, revision: str | None = None, base: str | Path | None = None
) -> Adapters:
    if not isinstance(given, tuple):
        return read_adapters(given, step=step, revision=revision, base=base)
    return Adapters(*given)


@lru_cache(maxsize=64)
def _with_adapters(config: ByteConfig, lora: LoRAConfig) -> ByteTransformer:
    return ByteTransformer(dataclasses.replace(config, lora=lora))


def _shapes(model: ByteTransformer) -> Params:
    return jax.tree.map(lambda leaf: leaf.shape, param_shapes(model))


def _listed(held: Mapping[str, _Held]) -> str:
    return ", ".join(map(repr, held))
