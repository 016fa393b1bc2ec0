"""How a run is spread over devices."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from stellarbyte_jax.config.section import ConfigError, Rule, Section, require

if TYPE_CHECKING:
    from stellarbyte_jax.config.model import ByteConfig

REST = -1
Devices = Annotated[int, Rule("positive, or -1 for what is left", lambda v: v == REST or 0 < v < 2**31)]


@dataclass(frozen=True, kw_only=True)
class MeshConfig(Section):
    """The devices of a run as a grid. The product of its axes is the number of devices.

    Attributes:
      data: copies of the weights, each with rows of its own; -1: as many as the other axes leave devices for
      fsdp: parts that weights, averages and the optimizer's state are cut into; rows are cut over them too
      expert: parts that the experts of each layer are cut into; rows, and all other weights, are cut over them too
      context: parts that each row is cut into by position
      tensor: parts that heads, feed-forward channels and the vocabulary are cut into
    """

    data: Devices = REST
    fsdp: Devices = 1
    expert: Devices = 1
    context: Devices = 1
    tensor: Devices = 1

    def _check(self) -> None:
        rest = [name for name in self.names() if getattr(self, name) == REST]
        require(
            len(rest) < 2,
            f"mesh.{' and mesh.'.join(rest)} are -1, and one axis alone can be what is left: give the others a number",
        )

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The axes, from the slowest links to the fastest."""
        return ("data", "fsdp", "expert", "context", "tensor")

    def sizes(self, devices: int) -> dict[str, int]:
        """The size of each axis on so many devices.

        Raises:
          ConfigError: the axes ask for more devices than there are, or do not divide them.
        """
        given = {name: getattr(self, name) for name in self.names()}
        rest = [name for name, size in given.items() if size == REST]
        fixed = math.prod(size for size in given.values() if size != REST)
        asked = (
            " ".join(f"mesh.{name}={size}" for name, size in given.items() if size not in (1, REST)) or "mesh.data=1"
        )
        if fixed > devices:
            raise ConfigError(f"{asked} asks for {fixed} devices, and there are {devices}: lower it, or add devices")
        if rest:
            if devices % fixed:
                raise ConfigError(
                    f"{asked} does not divide the {devices} devices: set sizes whose product divides {devices}, or "
                    f"mesh.{rest[0]}"
                )
            given[rest[0]] = devices // fixed
        return given


def check_mesh(sizes: dict[str, int], model: "ByteConfig", rows: int, parts: int, sequence_length: int) -> None:
    """Checks what a mesh cuts.

    Args:
      sizes: of the axes.
      model: the network.
      rows: of a batch.
      parts: accumulation steps that a batch is cut into.
      sequence_length: tokens of a row.

    Raises:
      ConfigError: an axis does not divide what it is to cut.
    """
    over_rows = ("data", "fsdp", "expert")
    shards = math.prod(sizes[name] for name in over_rows)
    told = " x ".join(f"mesh.{name}={sizes[name]}" for name in over_rows if sizes[name] > 1)
    steps = "" if parts == 1 else f" in gradient_accumulation_steps={parts} parts"
    require(
        (rows // parts) % shards == 0,
        f"{told} cuts the rows of a batch, and global_batch_size={rows}{steps} does not divide by {shards}: "
        f"set a multiple of {shards * parts}",
    )
    cuts = sizes["fsdp"] * sizes["expert"]
    axes = [name for name in ("fsdp", "expert") if sizes[name] > 1]
    expert = math.gcd(sizes["expert"], model.hidden_size, model.moe.num_experts) if model.moe.num_experts else 1
    fits = {"fsdp": math.gcd(sizes["fsdp"], model.hidden_size // expert), "expert": expert}
    require(
        model.hidden_size % cuts == 0,
        f"{' x '.join(f'mesh.{name}={sizes[name]}' for name in axes)} cuts model.hidden_size={model.hidden_size}, "
        f"which it does not divide: set {' '.join(f'mesh.{name}={fits[name]}' for name in axes)}",
    )
    _check_tensor(sizes["tensor"], model)
    if sizes["expert"] > 1:
        require(
            model.moe.num_experts > 0,
            f"mesh.expert={sizes['expert']} cuts experts, and the model has none: set model.moe.num_experts, or "
            f"mesh.fsdp={cuts} mesh.expert=1",
        )
        _divides("expert", sizes["expert"], model.moe.num_experts, "model.moe.num_experts", f"set mesh.expert={expert}")
    _check_context(sizes["context"], model, sequence_length)
    model.moe.check_capacity(rows // parts * sequence_length // (shards * sizes["context"]))


def _divides(axis: str, size: int, value: int, name: str, advice: str) -> None:
    require(value % size == 0, f"mesh.{axis}={size} cuts {name}={value}, which it does not divide: {advice}")


def _check_tensor(size: int, model: "ByteConfig") -> None:
    if size == 1:
        return
    cut = {"model.num_attention_heads": model.num_attention_heads, "model.intermediate_size": model.mlp_size}
    if model.moe.num_experts:
        cut["model.moe.intermediate_size"] = model.expert_size
    most, kv = math.gcd(size, *cut.values()), model.kv_heads
    # A divisor of the size that was asked for, so that it divides the devices too; 1 always does.
    fits = next(n for n in range(most, 0, -1) if most % n == 0 and (kv % n == 0 or n % kv == 0))
    for name, value in cut.items():
        _divides("tensor", size, value, name, f"set mesh.tensor={fits}")
    require(
        kv % size == 0 or size % kv == 0,
        f"mesh.tensor={size} and model.num_key_value_heads={kv}, of which one must divide the other: "
        f"set mesh.tensor={fits}",
    )
    multiple = math.lcm(size, model.vocab_size_multiple)
    _divides(
        "tensor", size, model.padded_vocab_size, "the vocabulary's rows", f"set model.vocab_size_multiple={multiple}"
    )


def _check_context(size: int, model: "ByteConfig", sequence_length: int) -> None:
    if size == 1:
        return
    require(
        sequence_length % (2 * size) == 0,
        f"mesh.context={size} cuts rows into {2 * size} chunks, which do not divide data.sequence_length="
        f"{sequence_length}: set a multiple of {2 * size}",
    )
    reason = None
    if model.has_memory:
        reason = "segment memory reads rows as a whole: set model.memory.length=0"
    elif model.moe.history_decay:
        reason = "gates read the history of a row in its order: set model.moe.history_decay=0"
    elif model.moe.num_experts and "sticky" in model.moe.overflow:
        reason = "the overflow step sticky reads the token before: leave it out of model.moe.overflow"
    elif model.attention_dropout or model.attention_prune_below:
        reason = "no weights of attention are dropped there: set model.attention_dropout and attention_prune_below to 0"
    elif model.attention_implementation == "reference":
        reason = "the reference of attention reads rows as a whole: set model.attention_implementation=auto"
    require(reason is None, f"mesh.context={size} cuts rows by position, and {reason}, or mesh.context=1")
