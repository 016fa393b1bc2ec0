"""Which card a plan is for."""

import pytest

from stellarbyte_jax.config import ConfigError
from stellarbyte_jax.training.plan_devices import KINDS, device_of


@pytest.mark.parametrize("kind", ["H100", "h100", "NVIDIA H100 80GB HBM3"])
def test_names_of_one_card(kind):
    assert device_of(kind) is KINDS["H100"]


@pytest.mark.parametrize(
    "kind",
    ["NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA H200 NVL", "h100 pcie", "NVIDIA A100-PCIE-40GB", "A100 80GB PCIe"],
)
def test_other_cards_of_a_name_are_refused(kind):
    with pytest.raises(ConfigError, match=r"is another card than the [HA][12]00 \(SXM\)"):
        device_of(kind)


def test_unknown_cards_are_refused():
    with pytest.raises(ConfigError, match="--device-kind T4 is not known: choose H100, H200, A100"):
        device_of("T4")
