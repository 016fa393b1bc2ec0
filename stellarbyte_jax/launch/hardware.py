"""What accelerators can do by their vendors' data sheets: the peaks that measured rates stand beside."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Hardware:
    """Peaks of one device.

    Attributes:
      bfloat16_flops: dense bfloat16 operations a second.
      link_bytes: bytes a second of its links to its neighbours, in one direction.
      link: name of these links.
    """

    bfloat16_flops: float
    link_bytes: float
    link: str


def _hardware(tflops: float, gigabytes: float, link: str) -> Hardware:
    return Hardware(1e12 * tflops, 1e9 * gigabytes, link)


# By a part of jax's device_kind; the first one that fits counts.
_KNOWN = {
    "H100 PCIe": _hardware(756.0, 64, "PCIe 5"),
    "H100 NVL": _hardware(835.0, 300, "NVLink bridge"),
    "H100": _hardware(989.4, 450, "NVLink 4"),
    "H200": _hardware(989.4, 450, "NVLink 4"),
    "A100-PCI": _hardware(312.0, 32, "PCIe 4"),
    "A100 80GB PCIe": _hardware(312.0, 32, "PCIe 4"),
    "A100": _hardware(312.0, 300, "NVLink 3"),
    "B200": _hardware(2250.0, 900, "NVLink 5"),
    "L40S": _hardware(362.0, 32, "PCIe 4"),
    "4090": _hardware(165.2, 32, "PCIe 4"),
}


def hardware_of(kind: str) -> Hardware | None:
    """The peaks of a device of this ``device_kind``, None where it is not known."""
    return next((known for name, known in _KNOWN.items() if name in kind), None)
