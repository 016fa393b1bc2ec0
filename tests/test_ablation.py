"""The scripts that say what a setting is worth: every variant is a config that loads, and results become a table."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def ablation(monkeypatch):
    monkeypatch.chdir(ROOT)
    spec = importlib.util.spec_from_file_location("ablation", ROOT / "scripts" / "ablation.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_variant_is_a_config_of_its_own(ablation):
    configs = ablation.check()
    small = configs[: len(configs) // 2]
    assert len({repr(c) for c in small}) == len(small)
    recommended = small[-1].model
    assert recommended.position_embedding == "xpos" and recommended.hidden_size == 256


def test_the_table_shows_what_was_measured(ablation):
    kept = {
        "quality": {"results": {"XPos": {"bits_per_byte": 2.5, "lowest": 2.4, "highest": 2.6}}},
        "speed": {"results": {"baseline": {"tokens_per_second": 1234, "peak_memory_gib": 1.5}}},
    }
    lines = ablation.table(kept).splitlines()
    assert lines[2:] == ["| baseline | - | 1,234 | 1.5 |", "| XPos | 2.500 (2.400 to 2.600) | - | - |"]
