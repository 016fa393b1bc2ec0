"""Facts of tensors, and differences, by numpy over whole arrays; NaN and infinity are counted and compared."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.hf_models import edit_tensors, random_model
from helpers.training import flat
from ml_dtypes import bfloat16
from safetensors.numpy import save_file

from stellarbyte_jax.checkpoint.source import find_source
from stellarbyte_jax.checkpoint.weights import save_initial
from stellarbyte_jax.cli.convert import main
from stellarbyte_jax.hf.directory import save_pretrained
from stellarbyte_jax.inspect import tensors as module
from stellarbyte_jax.inspect.tensors import Held, Tensors, compare, numbers, open_tensors


def held(**arrays: np.ndarray) -> Tensors:
    return {name: Held(x.shape, x.dtype.name, lambda x=x: x) for name, x in arrays.items()}


@pytest.mark.parametrize("at_once", [3, 1 << 22])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, bfloat16])
def test_numbers_are_those_of_the_whole_array(dtype: Any, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_AT_ONCE", at_once)
    x = np.random.default_rng(0).standard_normal((5, 7)).astype(dtype)
    found = numbers(x)
    exact = x.astype(np.float64)
    assert found.norm == pytest.approx(np.linalg.norm(exact)) and found.largest == np.abs(exact).max()
    assert found.not_finite == 0
    x[0, 0], x[4, 6], x[2, 2] = np.nan, np.inf, -np.inf
    found, exact = numbers(x), np.where(np.isfinite(x), x.astype(np.float64), 0)
    assert found.not_finite == 3
    assert found.norm == pytest.approx(np.linalg.norm(exact)) and found.largest == np.abs(exact).max()
    assert numbers(np.zeros((0, 3), np.float32)) == module.Numbers(0.0, 0.0, 0)


@pytest.mark.parametrize("at_once", [3, 1 << 22])
def test_differences_are_those_of_the_whole_array(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_AT_ONCE", at_once)
    random = np.random.default_rng(0)
    a, b = random.standard_normal((2, 4, 5))
    nan = np.array([np.nan, 1.0, np.inf])
    found = compare(
        held(gone=a, near=a, far=a, same=a, half=a.astype(np.float16), cut=a, nan=nan, bad=nan, zero=a * 0),
        held(near=a + 1e-3, far=b, same=a, half=a.astype(np.float16).astype(np.float32), cut=a[1:], nan=nan)
        | held(bad=np.array([1.0, 1.0, np.inf]), new=b, zero=a),
    )
    assert (found.missing, found.unexpected, found.equal) == (("gone",), ("new",), 3)
    assert found.shapes == (("cut", (4, 5), (3, 5)),)
    bad, *others = found.values
    assert (bad.name, bad.largest, bad.relative) == ("bad", np.inf, np.inf)
    by_name = {difference.name: difference for difference in others}
    assert [difference.largest for difference in others] == sorted((d.largest for d in others), reverse=True)
    assert by_name["far"].largest == np.abs(a - b).max()
    assert by_name["far"].relative == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a))
    assert by_name["near"].largest == pytest.approx(1e-3) and by_name["zero"].relative == np.inf
    assert not found.is_same
    half = compare(held(a=a), held(a=np.concatenate([a[:3], b[3:]]))).values[0]  # in one part alone
    assert half.relative == pytest.approx(np.linalg.norm(a[3] - b[3]) / np.linalg.norm(a))
    assert compare(held(a=a), held(a=a)).is_same
    for other in (held(a=b), held(a=a[1:]), held(), held(a=a, b=b)):
        assert not compare(held(a=a), other).is_same


def test_a_directory_is_read_by_its_names_or_as_the_tree(tmp_path: Path) -> None:
    model, params = random_model(qk_norm=True)
    save_pretrained(tmp_path / "hf", model, params, dtype="bfloat16")
    save_initial(tmp_path / "run", model.config, params)
    with open_tensors(find_source(tmp_path / "hf"), as_tree=False) as raw:
        assert raw["model.layers.2.self_attn.k_proj.weight"].shape == (16, 32)
        assert {tensor.dtype for tensor in raw.values()} == {"BF16"}
        assert raw["lm_head.weight"].read().dtype == bfloat16
    paths = flat(params).keys()
    for name in ("hf", "run"):
        with open_tensors(find_source(tmp_path / name), as_tree=True) as tree:
            assert tree.keys() == paths
    with open_tensors(find_source(tmp_path / "run"), as_tree=False) as tree:
        assert tree.keys() == paths and tree["layers/0/attn/q"].shape == (3, 32, 4, 8)


@pytest.fixture
def convert(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: Any) -> tuple[int, str]:
        status = main(["inspect", *map(str, arguments)])
        return status, "".join(capsys.readouterr())

    return run


def test_a_checkpoint_is_listed(tmp_path: Path, convert: Any) -> None:
    model, params = random_model(num_hidden_layers=11)
    save_pretrained(tmp_path / "hf", model, params)
    edit_tensors(tmp_path / "hf", lambda held: held["lm_head.weight"].__setitem__((0, 0), np.nan))
    status, printed = convert(tmp_path / "hf")
    cells = [[cell.strip() for cell in line.split("│")[1:]] for line in printed.splitlines() if "│" in line]
    rows = {name: more for name, *more in cells}
    assert status == 0 and rows["lm_head.weight"][:3] == ["96 x 32", "F32", "12.00 KiB"]
    norm = np.linalg.norm(np.asarray(params["final_norm"]["scale"], np.float64))
    assert rows["model.norm.weight"][3] == f"{norm:.4g}"
    assert "lm_head.weight: not finite: 1" in printed
    assert printed.index("layers.2.input_layernorm") < printed.index("layers.10.input_layernorm")
    assert f"{len(rows)} tensors, {sum(x.size for x in flat(params).values()):,} numbers, " in printed


def test_a_directory_that_no_family_knows_is_listed_too(tmp_path: Path, convert: Any) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    held = {"wte": np.ones((2, 3), np.float16), "ids": np.ones(4, np.int64), "mask": np.ones(5, bool)}
    save_file(held | {"scale": np.ones((), np.float32)}, tmp_path / "model.safetensors")
    status, printed = convert(tmp_path)
    assert status == 0 and "2 x 3" in printed and "4 tensors, 16 numbers, 53 B" in printed and "scalar" in printed
    assert "ids: " in printed and "stored as I64" in printed


def test_two_checkpoints_are_compared(tmp_path: Path, convert: Any) -> None:
    """A run with its export, whatever their names; status 1 says that they differ."""
    model, params = random_model()
    save_pretrained(tmp_path / "hf", model, params)
    save_initial(tmp_path / "run", model.config, params)
    assert convert(tmp_path / "hf", tmp_path / "hf")[0] == 0
    status, printed = convert(tmp_path / "run", tmp_path / "hf")
    assert status == 0 and printed.startswith("11 tensors are equal, 0 have other numbers")
    edit_tensors(tmp_path / "hf", lambda held: held["model.norm.weight"].__iadd__(1))
    status, printed = convert(tmp_path / "run", tmp_path / "hf")
    assert status == 1 and "10 tensors are equal, 1 have other numbers" in printed
    scale = np.asarray(params["final_norm"]["scale"])
    relative = np.linalg.norm(np.ones_like(scale)) / np.linalg.norm(scale)
    (row,) = (line.replace("│", " ").split() for line in printed.splitlines() if "final_norm/scale" in line)
    assert row == ["final_norm/scale", "1", f"{relative:.4g}"]
    save_pretrained(tmp_path / "other", *random_model(qk_norm=True, vocab_size=90))
    status, printed = convert(tmp_path / "hf", tmp_path / "other")
    assert status == 1 and f"only in {tmp_path / 'other'}: model.layers.0.self_attn.k_norm.weight" in printed
    assert f"only in {tmp_path / 'hf'}: " not in printed
    assert "other shapes: lm_head.weight: 96 x 32 and 90 x 32" in printed
    status, printed = convert(tmp_path / "other", tmp_path / "hf")
    assert status == 1 and f"only in {tmp_path / 'other'}: model.layers.0.self_attn.k_norm.weight" in printed
    assert f"only in {tmp_path / 'hf'}: " not in printed


def test_a_step_and_a_revision_are_of_the_first(tmp_path: Path, convert: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, params = random_model()
    save_pretrained(tmp_path / "hf", model, params)
    save_initial(tmp_path / "run", model.config, params)
    asked: list[tuple[Any, ...]] = []

    def find(*place: Any) -> Any:
        asked.append(place)
        return find_source(place[0])

    monkeypatch.setattr("stellarbyte_jax.cli.tensors.find_source", find)
    assert convert(tmp_path / "run", tmp_path / "hf", "--step", 0)[0] == 0
    assert convert(tmp_path / "hf", "--revision", "v1")[0] == 0
    run, hf = str(tmp_path / "run"), str(tmp_path / "hf")
    assert asked == [(run, 0, None), (hf,), (hf, None, "v1")]


def test_what_is_no_checkpoint_is_one_line(tmp_path: Path, convert: Any) -> None:
    status, printed = convert(tmp_path / "nowhere")
    assert status == 1 and printed.startswith("error: ") and printed.count("\n") == 1
