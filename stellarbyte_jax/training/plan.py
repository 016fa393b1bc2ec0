"""What a run takes of each device before it is started: memory, operations, exchanges and time, from shapes alone.

Weights and what the optimizer keeps are exact, from the shapes and places of the run's own state on a mesh of devices
that need not be there; nothing is compiled or computed. The rest is an estimate.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType

from stellarbyte_jax.config import ByteConfig, ConfigError, TrainConfig
from stellarbyte_jax.config.mesh import check_mesh
from stellarbyte_jax.inspect.activations import Activations, Cut, activations_of
from stellarbyte_jax.inspect.costs import FlopsPerToken, ParameterCounts, flops_per_token, parameter_counts
from stellarbyte_jax.model.decoder import ByteTransformer, param_uses, trained, weights_alone
from stellarbyte_jax.model.trees import partition
from stellarbyte_jax.training.optimizer import make_optimizer
from stellarbyte_jax.training.placement import placed
from stellarbyte_jax.training.plan_devices import ASSUMED, Device
from stellarbyte_jax.training.plan_exchange import Exchange, Matrices, buffer_bytes, of_activations, of_weights
from stellarbyte_jax.training.plan_muon import Update, of_update
from stellarbyte_jax.training.state import state_shapes

_FLOAT32 = 4
_TOKEN_BYTES = 3 * 4 + 1  # of a batch: tokens, segments and positions in int32, a mask of bool (data.batches)


@dataclass(frozen=True)
class StateBytes:
    """The state of a run as one device has it, in bytes: exact.

    Attributes:
      weights: that are trained, float32.
      frozen: weights that are not.
      optimizer: what it keeps.
      ema: the average, where one is kept.
      carried: what routers keep, segment memory, and the number of the step.
    """

    weights: int
    frozen: int
    optimizer: int
    ema: int
    carried: int


@dataclass(frozen=True)
class DeviceBytes:
    """What a device holds at the peak of a step, in bytes: an upper estimate, as if all were there at once.

    Attributes:
      weights: all of them, see :class:`StateBytes`.
      gradients: float32; twice where parts of an accumulated batch are added up.
      optimizer: as in :class:`StateBytes`.
      ema: likewise.
      carried: likewise.
      batch: rows of this step and of those that are loaded ahead.
      activations: that the forward pass keeps.
      working: of the layer that computes, or of an update that needs more than the layers and the loss (Muon).
      logits: of a chunk of tokens, and their gradients.
      collectives: weights and activations of other devices.
    """

    weights: int
    gradients: int
    optimizer: int
    ema: int
    carried: int
    batch: int
    activations: int
    working: int
    logits: int
    collectives: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True)
class Times:
    """Seconds of a step by what they go into; see ``plan_devices.Assumptions``.

    Attributes:
      products: matrix products, attention's among them.
      memory: activations, logits, weights and the optimizer's state going through the device's memory.
      exchanges: that products do not hide.
    """

    products: float
    memory: float
    exchanges: float

    @property
    def step(self) -> float:
        """Of a step."""
        return self.products + self.memory + self.exchanges


@dataclass(frozen=True)
class Plan:
    """A run on a mesh.

    Attributes:
      config: of the run, with the plan's accumulation and remat.
      sizes: of the mesh.
      device: its kind.
      bytes: of each device.
      flops: of a step, of all devices, as MFU counts them: without what is computed again.
      exchanges: what a device sends in a step.
      times: of a step.
    """

    config: TrainConfig
    sizes: Mapping[str, int]
    device: Device
    bytes: DeviceBytes
    flops: float
    exchanges: tuple[Exchange, ...]
    times: Times

    @property
    def devices(self) -> int:
        """Their number."""
        return math.prod(self.sizes.values())

    @property
    def rows(self) -> int:
        """That a device computes at once."""
        return _rows(self.config, self.sizes)

    @property
    def limit(self) -> float:
        """Bytes that a run may fill."""
        return ASSUMED.room * self.device.memory

    @property
    def fits(self) -> bool:
        """Whether the peak is below the limit."""
        return self.bytes.total <= self.limit

    @property
    def tokens_per_second(self) -> float:
        """Of all devices."""
        return self.config.global_batch_size * self.config.data.sequence_length / self.times.step

    @property
    def mfu(self) -> float:
        """Model FLOP utilisation, with causal attention counted by the half that is computed."""
        return self.flops / (self.times.step * self.device.flops * self.devices)


class Planner:
    """Plans a run for any mesh, parts of its batch, and remat; what these do not change is worked out once."""

    def __init__(self, config: TrainConfig, device: Device, *, packed: bool = True):
        """Works out the shapes of the run's state.

        Args:
          config: of the run.
          device: its kind.
          packed: whether rows may hold several documents, as those of ``data`` do in every arrangement; False: each is
            one, as in a batch of nothing but tokens.

        Raises:
          ConfigError: the device does not run the kernels that the config names.
        """
        if config.model.moe_layers and not device.hopper:
            if config.model.moe.implementation == "pallas":
                raise ConfigError(
                    f"model.moe.implementation=pallas is of Hopper GPUs, which {device.name} is not: set it to auto"
                )
            blocks = dataclasses.replace(config.model.moe, implementation="xla")
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, moe=blocks))
        self.config, self.device, self.packed = config, device, packed
        self.model = ByteTransformer(config.model)
        self.parameters: ParameterCounts = parameter_counts(self.model)
        self._plain = dataclasses.replace(config.model, remat="none")
        self._on: dict[tuple[int, ...], Any] = {}
        self._fixed: dict[tuple[int, ...], tuple[StateBytes, Update]] = {}
        self._configs: dict[tuple[int, str], TrainConfig] = {}

    @cached_property
    def _shapes(self) -> Any:
        optimizer = make_optimizer(self.config, self.model)
        return optimizer, state_shapes(self.config, self.model, optimizer)

    @cached_property
    def _uses(self) -> Any:
        return partition(param_uses(self.model), trained(self.model))[0]

    def _base(self, frozen: Any) -> Any:
        """Of what is frozen, shapes or uses, the weights that have adapters beside them."""
        return partition(frozen, weights_alone(self.model))[0]

    def _tracked(self, frozen: Any) -> Any:
        return partition(frozen, weights_alone(self.model))[1]

    def _collectives_of_weights(self, config: ByteConfig, sizes: Mapping[str, int]) -> Matrices:
        """Frozen weights are gathered as others are, and have no gradients."""
        state = self.placed(sizes)
        learnt = of_weights(config, state.params, self._uses, sizes)
        if not config.lora.r:
            return learnt
        uses = self._base(partition(param_uses(self.model), trained(self.model))[1])
        base = of_weights(config, self._base(state.frozen), uses, sizes)
        gathered = [each for each in base.exchanges if each.what == "weights"]
        return Matrices([*learnt.exchanges, *gathered], learnt.buffers + base.buffers)

    @cached_property
    def flops(self) -> FlopsPerToken:
        """Of a token."""
        return flops_per_token(self.config.model, self.parameters.active, self.config.data.sequence_length)

    def placed(self, sizes: Mapping[str, int]) -> Any:
        """The shapes of the state, with the place of each array on a mesh."""
        key = tuple(sizes.values())
        if key not in self._on:
            optimizer, shapes = self._shapes
            mesh = AbstractMesh(key, tuple(sizes), axis_types=(AxisType.Auto,) * len(key))
            self._on = {key: placed(shapes, self.model, optimizer, planned=mesh)}
        return self._on[key]

    def state_bytes(self, sizes: Mapping[str, int]) -> StateBytes:
        """What each device has of the state, to the byte."""
        state = self.placed(sizes)
        return StateBytes(
            weights=bytes_of(state.params),
            frozen=bytes_of(self._base(state.frozen)),
            optimizer=bytes_of(state.opt_state),
            ema=bytes_of(state.ema),
            carried=bytes_of((self._tracked(state.frozen), state.carried, state.step)),
        )

    def _whatever_the_parts(self, sizes: Mapping[str, int]) -> tuple[StateBytes, Update]:
        """What neither parts of a batch nor remat change: a search tries many of both on each mesh."""
        key = tuple(sizes.values())
        if key not in self._fixed:
            update = of_update(self.config.optimizer.name, self.placed(sizes).params, self._uses, sizes)
            self._fixed = {key: (self.state_bytes(sizes), update)}
        return self._fixed[key]

    def plan(self, sizes: Mapping[str, int], *, parts: int | None = None, remat: str | None = None) -> Plan:
        """The run on a mesh.

        Args:
          sizes: of its axes.
          parts: of a batch; None: those of the config.
          remat: None: that of the config.

        Raises:
          ConfigError: an axis does not divide what it is to cut.
        """
        config = self._changed(parts or self.config.gradient_accumulation_steps, remat or self.config.model.remat)
        m, length, parts = config.model, config.data.sequence_length, config.gradient_accumulation_steps
        check_mesh(dict(sizes), m, config.global_batch_size, parts, length)
        rows, (state, update) = _rows(config, sizes), self._whatever_the_parts(sizes)
        kept = activations_of(m, rows, length, self._cut(sizes))
        weights = self._collectives_of_weights(m, sizes)
        parted = weights.exchanges + of_activations(m, rows, length, sizes, packed=self.packed)
        exchanges = (*(dataclasses.replace(each, sent=each.sent * parts) for each in parted), *update.exchanges)
        collectives = weights.buffers + buffer_bytes(m, rows, length, sizes)
        ahead = 1 + config.data.prefetch
        found = DeviceBytes(
            weights=state.weights + state.frozen,
            gradients=state.weights * (1 if parts == 1 else 2),
            optimizer=state.optimizer,
            ema=state.ema,
            carried=state.carried,
            batch=ahead * rows * parts * length * _TOKEN_BYTES,
            activations=kept.kept,
            working=max(kept.working, update.buffers - kept.kept - kept.logits - collectives),
            logits=kept.logits,
            collectives=collectives,
        )
        flops = self.flops.causal * config.global_batch_size * length
        times = self._times(config, sizes, exchanges, found, kept, update)
        return Plan(config, dict(sizes), self.device, found, flops, exchanges, times)

    def _changed(self, parts: int, remat: Any) -> TrainConfig:
        if (parts, remat) not in self._configs:
            model = dataclasses.replace(self.config.model, remat=remat)
            changed = dataclasses.replace(self.config, model=model, gradient_accumulation_steps=parts)
            self._configs[parts, remat] = changed
        return self._configs[parts, remat]

    def _times(
        self,
        config: TrainConfig,
        sizes: Mapping[str, int],
        exchanges: tuple[Exchange, ...],
        held: DeviceBytes,
        kept: Activations,
        update: Update,
    ) -> Times:
        m, length, parts = config.model, config.data.sequence_length, config.gradient_accumulation_steps
        devices, tokens = math.prod(sizes.values()), config.global_batch_size * length
        of_weights_, of_attention = self._flops_done(config)
        products = (of_weights_ / ASSUMED.products + of_attention / ASSUMED.attention) * tokens / devices
        products /= self.device.flops
        rows, cut = _rows(config, sizes), self._cut(sizes)
        layers = activations_of(self._plain, rows, length, cut).kept
        passes = ASSUMED.passes + (ASSUMED.passes / 3 if m.remat in ("dots", "full") else 0)
        logits = tokens / devices * m.padded_vocab_size * _FLOAT32 * ASSUMED.logit_passes
        # A step reads and writes weights, optimizer and average, and reads gradients; each part reads the weights.
        learnt = held.gradients if parts == 1 else held.gradients // 2
        moved = 2 * (learnt + held.optimizer + held.ema) + held.gradients + parts * 3 * held.weights
        memory = (parts * (layers * passes + 2 * kept.working) + logits + moved) / (
            ASSUMED.memory * self.device.bandwidth
        )
        behind = {"weights", "gradients"}
        hidden = sum(each.seconds(sizes, self.device) for each in exchanges if each.what in behind)
        open_ = sum(each.seconds(sizes, self.device) for each in exchanges if each.what not in behind)
        updating = update.seconds(self.device)
        return Times(products + updating, memory, open_ + max(0.0, hidden - ASSUMED.hidden * products))

    def _flops_done(self, config: TrainConfig) -> tuple[float, float]:
        """Of a token, with what is computed again: of products with weights, and of attention."""
        m = config.model
        attention = self.flops.full - self.flops.causal
        products = self.flops.causal - attention
        if m.remat in ("none", "weights"):
            return products, attention
        again = products - 6 * m.padded_vocab_size * m.hidden_size if m.remat == "full" else 0
        return products + again / 3, attention * 4 / 3

    def _cut(self, sizes: Mapping[str, int]) -> Cut:
        return Cut(sizes["tensor"], sizes["context"], sizes["expert"], packed=self.packed)


def bytes_of(tree: Any) -> int:
    """Bytes that one device has of a tree of shapes, by their places; all of those that have none."""
    return sum(
        math.prod(x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def _rows(config: TrainConfig, sizes: Mapping[str, int]) -> int:
    shards = sizes["data"] * sizes["fsdp"] * sizes["expert"]
    return config.global_batch_size // (config.gradient_accumulation_steps * shards)
