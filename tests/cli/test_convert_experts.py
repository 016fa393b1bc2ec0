"""The command convert on a model with experts, there and back."""

from pathlib import Path

import numpy as np
import pytest
from helpers.hf_models import NEEDS_TORCH, assert_same_tree
from helpers.variants import make

from stellarbyte_jax.checkpoint.weights import load_weights, save_initial
from stellarbyte_jax.cli import convert


def test_there_and_back_with_what_routers_keep(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch", reason=NEEDS_TORCH)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    model, params = make("a pool of experts, parallel, xpos")
    run, hf, again = (str(tmp_path / name) for name in ("run", "hf", "again"))
    save_initial(tmp_path / "run", model.config, params, str(tmp_path / "no tokenizer"))
    assert convert.main(["to-hf", run, str(tmp_path / "half"), "--dtype", "bfloat16", "--verify"]) == 0
    assert "agrees with transformers" in capsys.readouterr().out
    assert convert.main(["to-hf", run, hf]) == convert.main(["from-hf", hf, again]) == 0
    assert_same_tree(load_weights(tmp_path / "again")[1], params)
    tracked = 3 * (5 * 4 + 1)
    size = sum(np.size(leaf) for leaf in leaves(params)) - tracked
    assert capsys.readouterr().out.count(f": {size:,} parameters, ") == 2
    assert f"| parameters | {size:,} (float32), " in (tmp_path / "hf" / "README.md").read_text()


def leaves(tree):
    return [leaf for value in tree.values() for leaf in (leaves(value) if isinstance(value, dict) else [value])]
