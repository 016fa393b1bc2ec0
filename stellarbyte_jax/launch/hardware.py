"""What accelerators can do by their vendor's data sheets: the peaks that measured rates stand beside.

Operations are dense ones: sheets that give them "with sparsity" name twice as many. Links are in one direction: sheets
name both together. Sources, all of NVIDIA:

- H100 (SXM): white paper "NVIDIA H100 Tensor Core GPU Architecture", 2022,
  https://resources.nvidia.com/en-us-tensor-core/gtc22-whitepaper-hopper; NVL: product page "NVIDIA H100", 2024,
  https://www.nvidia.com/en-us/data-center/h100/ (1,671 TFLOPS with sparsity); PCIe: data sheet "NVIDIA H100 Tensor Core
  GPU", 2022 (1,513)
- H200 (SXM, and NVL with 1,671 and a bridge of 900 GB/s): product page "NVIDIA H200", 2024,
  https://www.nvidia.com/en-us/data-center/h200/
- A100: data sheet "NVIDIA A100 Tensor Core GPU", 2021,
  https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf
- B200 (HGX, 1,000 W) and GB200 (1,200 W): "NVIDIA Blackwell Architecture Technical Brief", 2024,
  https://resources.nvidia.com/en-us-blackwell-architecture
- L40S: data sheet "NVIDIA L40S", 2023, https://resources.nvidia.com/en-us-l40s/l40s-datasheet-28413
- RTX 4090: white paper "NVIDIA Ada GPU Architecture", 2022 (bfloat16 with float32 sums),
  https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf
"""

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
    "H100 PCIe": _hardware(756.5, 64, "PCIe 5"),
    "H100 NVL": _hardware(835.5, 300, "NVLink bridge"),
    "H100": _hardware(989.4, 450, "NVLink 4"),
    "H200 NVL": _hardware(835.5, 450, "NVLink bridge"),
    "H200": _hardware(989.4, 450, "NVLink 4"),
    "A100-PCI": _hardware(312.0, 32, "PCIe 4"),
    "A100 80GB PCIe": _hardware(312.0, 32, "PCIe 4"),
    "A100": _hardware(312.0, 300, "NVLink 3"),
    "GB200": _hardware(2500.0, 900, "NVLink 5"),
    "B200": _hardware(2250.0, 900, "NVLink 5"),
    "L40S": _hardware(362.05, 32, "PCIe 4"),
    "4090": _hardware(165.2, 32, "PCIe 4"),
}


def hardware_of(kind: str) -> Hardware | None:
    """The peaks of a device of this ``device_kind``, None where it is not known."""
    return next((known for name, known in _KNOWN.items() if name in kind), None)
