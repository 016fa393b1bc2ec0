"""Devices that a run can be planned for, and what of their peaks a plan counts on.

Operations and NVLink are those of ``launch.hardware``, which names its sources. Bandwidths of memory are of the same
pages and sheets: H100 SXM 3.35 TB/s, H200 SXM 4.8 TB/s, A100 80GB SXM 2,039 GB/s. The network is that of the vendor's
own machines, an adapter for each GPU: DGX H100 and H200 400 Gb/s ("DGX BasePOD Reference Architecture", 2025,
https://docs.nvidia.com/dgx-basepod/reference-architecture-infrastructure-foundation-enterprise-ai/latest/), DGX A100
200 Gb/s ("DGX A100 System User Guide", 2020, https://docs.nvidia.com/dgx/dgxa100-user-guide/). Memory is no figure of a
data sheet but the whole that nvidia-smi tells of the device, in MiB.
"""

from dataclasses import dataclass

from stellarbyte_jax.config import ConfigError
from stellarbyte_jax.launch.hardware import hardware_of

DEVICES_OF_A_MACHINE = 8  # HGX and DGX boards: NVLink reaches so many GPUs


@dataclass(frozen=True)
class Device:
    """One GPU of a machine with eight.

    Attributes:
      name: as ``--device-kind`` has it.
      flops: dense bfloat16 operations a second.
      bandwidth: bytes a second of its memory.
      memory: bytes of it that programs can have.
      nvlink: bytes a second to the other GPUs of the machine, one way.
      network: bytes a second to other machines, one way.
      hopper: whether it runs kernels for Hopper GPUs.
    """

    name: str
    flops: float
    bandwidth: float
    memory: int
    nvlink: float
    network: float
    hopper: bool


def _device(name: str, bandwidth: float, mebibytes: int, network: float, *, hopper: bool = True) -> Device:
    peaks = hardware_of(name)
    assert peaks is not None
    return Device(name, peaks.bfloat16_flops, bandwidth, mebibytes * 2**20, peaks.link_bytes, network, hopper)


_KINDS = (
    _device("H100", 3.35e12, 81_559, 50e9),
    _device("H200", 4.8e12, 143_771, 50e9),
    _device("A100", 2.039e12, 81_920, 25e9, hopper=False),
)
KINDS = {kind.name: kind for kind in _KINDS}


@dataclass(frozen=True)
class Assumptions:
    """What a plan counts on. All are guesses.

    ``products``, ``memory``, ``passes`` and ``logit_passes`` were chosen together, so that configs/pretrain.py on one
    H100 comes out near the speed in benchmarks/train.json; that does not determine any of them alone. ``attention`` is
    what rows of 32,768 tokens reach on an H200, head size 64 (0.38); shorter rows reach less.

    Attributes:
      products: share of the peak that products with weights reach.
      attention: share that attention reaches, of the operations of a causal mask.
      memory: share of the memory's bandwidth that everything else reaches.
      links: share of a link's bandwidth that collectives reach.
      passes: how often a step reads or writes each byte of activations that it could keep (``remat=none``).
      logit_passes: how often each float32 logit.
      hidden: share of the time of products behind which exchanges of weights and gradients can lie.
      room: share of the memory that a run may fill.
    """

    products: float = 0.7
    attention: float = 0.4
    memory: float = 0.85
    links: float = 0.7
    passes: float = 7.0
    logit_passes: float = 5.0
    hidden: float = 0.5
    room: float = 0.9


ASSUMED = Assumptions()


def device_of(kind: str) -> Device:
    """The device of a name, or of a name that holds one, as jax and nvidia-smi call them.

    Raises:
      ConfigError: there is none, or it is another card of the name, with other peaks.
    """
    found = next((device for name, device in KINDS.items() if name in kind.upper()), None)
    if found is None:
        raise ConfigError(f"--device-kind {kind} is not known: choose {', '.join(KINDS)}")
    if hardware_of(kind.upper().replace("PCIE", "PCIe")) != hardware_of(found.name):
        raise ConfigError(
            f"--device-kind {kind} is another card than the {found.name} (SXM) of a machine with eight: a plan for it "
            f"would be wrong; --device-kind {found.name} plans for that one"
        )
    return found
