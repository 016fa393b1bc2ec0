"""Files of the original: what torch.save writes, wrappers and containers, and everything that is refused."""

import collections
import os
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.hf_models import assert_same_tree
from helpers.hostile import is_one_line
from helpers.original_models import SEED, december_state, saved, saved_config, seed_state

from stellarbyte_jax.hf.original import from_original
from stellarbyte_jax.hf.original.checkpoint import open_checkpoint

NEEDS_TORCH = "checkpoints of the original are torch's: pip install -e '.[torch]'"


def state_of(states: dict[str, np.ndarray], dtype: str = "float32") -> dict[str, Any]:
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    return {name: torch.from_numpy(tensor).to(getattr(torch, dtype)) for name, tensor in states.items()}


def torch_saved(path: Path, content: Any, **options: Any) -> Path:
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    torch.save(content, path, **options)
    return path


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(ValueError) as caught:
        from_original(path, **options)
    assert is_one_line(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("prefix", "container"),
    [
        ("", None),
        ("_orig_mod.", "model_state"),
        ("module.", "model_state_dict"),
        ("module._orig_mod.", "model"),
        ("_orig_mod.module.module.", None),
    ],
)
def test_wrappers_and_containers(prefix: str, container: str | None, tmp_path: Path) -> None:
    state = seed_state()
    expected = from_original(saved(tmp_path / "x.safetensors", state)).params
    content: Any = collections.OrderedDict((prefix + name, value) for name, value in state_of(state).items())
    if container is not None:
        content = {container: content, "epoch": 3, "step": 40, "val_loss": 2.5, "optimizer_state": {"state": {}}}
    found = from_original(torch_saved(tmp_path / "x.pth", content))
    assert_same_tree(found.params, expected)


def test_wrapped_parts_of_a_network(tmp_path: Path) -> None:
    state = seed_state()
    wrapped = {name.replace("layers.1.", "layers.1._orig_mod."): tensor for name, tensor in state.items()}
    expected = from_original(saved(tmp_path / "a.safetensors", state)).params
    assert_same_tree(from_original(saved(tmp_path / "b.safetensors", wrapped)).params, expected)
    both = state | {"module.norm.weight": state["norm.weight"]}
    assert "two tensors are norm.weight but for the names of wrappers" in refused(
        saved(tmp_path / "c.safetensors", both)
    )


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_torch_files_of_each_format_and_dtype(dtype: str, zipped: bool, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    state = state_of(december_state(), dtype)
    down = "model.layers.0.mlp.down_proj.weight"
    state[down] = torch.nn.Parameter(state[down].T.contiguous().T)  # not in the order of its memory
    path = torch_saved(tmp_path / "x.pth", state, _use_new_zipfile_serialization=zipped)
    with open_checkpoint(path) as tensors:
        for name, tensor in state.items():
            read = tensors.read(name)
            assert str(read.dtype) == dtype and tensors.shape(name) == read.shape
            np.testing.assert_array_equal(read.astype(np.float64), tensor.detach().double().numpy())
    assert from_original(path).params["embed"]["embedding"].dtype == np.float32


def test_a_tensor_whose_sign_is_a_mark_is_read_as_what_it_means(tmp_path: Path) -> None:
    """As torch keeps imaginary parts of conjugates."""
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    plain = torch.from_numpy(december_state()["model.norm.weight"])
    marked = torch.complex(plain, -plain).conj().imag
    assert marked.is_neg()
    with open_checkpoint(torch_saved(tmp_path / "x.pth", {"model.norm.weight": marked})) as tensors:
        np.testing.assert_array_equal(tensors.read("model.norm.weight"), plain.numpy())


def test_too_little_memory_is_no_broken_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = torch_saved(tmp_path / "x.pth", state_of(seed_state()))

    def load(*arguments: Any, **options: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("torch.load", load)
    with pytest.raises(MemoryError):
        from_original(path)


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["zip", "old", "pickle 2", "pickle 4"])
def test_nothing_in_a_pickle_is_run(form: str, tmp_path: Path) -> None:
    content = {"model_state": state_of(seed_state()), "epoch": Malicious(tmp_path / "executed")}
    path = tmp_path / "x.pth"
    if form.startswith("pickle"):
        path.write_bytes(pickle.dumps(Malicious(tmp_path / "executed"), protocol=int(form[-1])))
    else:
        torch_saved(path, content, _use_new_zipfile_serialization=form == "zip")
    message = refused(path)
    assert not (tmp_path / "executed").exists() and "weights_only" not in message and "torch.save(model" in message
    assert form == "pickle 4" or "mkdir, which is not loaded because that can run code" in message
    with path.open("rb") as file:  # the test's own file does what it says
        if form == "pickle 4":
            pickle.load(file)
            assert (tmp_path / "executed").is_dir()


def numpy_scalar(path: Path) -> None:
    torch_saved(path, {"model_state": state_of(seed_state()), "val_loss": np.float64(2.5)})


def module(path: Path) -> None:
    import torch

    torch_saved(path, torch.nn.Linear(2, 2))


def integers(path: Path) -> None:
    import torch

    torch_saved(path, state_of(seed_state()) | {"norm.weight": torch.ones(24, dtype=torch.int8)})


def sparse(path: Path) -> None:
    torch_saved(path, {**state_of(seed_state()), "norm.weight": state_of(seed_state())["norm.weight"].to_sparse()})


def no_numbers(path: Path) -> None:
    import torch

    torch_saved(path, state_of(seed_state()) | {"norm.weight": torch.ones(24, device="meta")})


def enormous(path: Path) -> None:
    import torch

    torch_saved(path, state_of(seed_state()) | {"embed_tokens.weight": torch.ones(1).expand(1 << 30, 24)})


def cut(path: Path) -> None:
    torch_saved(path, state_of(seed_state()))
    path.write_bytes(path.read_bytes()[:5000])


def other_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a", "b")


REFUSALS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a number of numpy": (numpy_scalar, "the Python object numpy._core.multiarray.scalar, which is not loaded"),
    "a module": (module, "the Python object torch.nn.modules.linear.Linear, which is not loaded"),
    "integers": (integers, "tensor norm.weight is stored as int8, readable are F64, F32, F16, BF16"),
    "sparse": (sparse, "tensor norm.weight is no plain array"),
    "without numbers": (no_numbers, "tensor norm.weight is no plain array"),
    "more numbers than bytes": (enormous, "tensor embed_tokens.weight has more numbers than the file holds for it"),
    "a number": (lambda path: torch_saved(path, 3), "holds a int, not the weights of a model"),
    "no tensors": (
        lambda path: torch_saved(path, {"a": 1, "b": [2]}),
        "holds a, b: no tensors, and none of model_state",
    ),
    "among tensors": (
        lambda path: torch_saved(path, state_of(seed_state()) | {"epoch": 3}),
        "'epoch' is a int, not a tensor",
    ),
    "a name": (lambda path: torch_saved(path, {3: state_of(seed_state())["norm.weight"]}), "3 is a Tensor, not"),
    "text": (lambda path: path.write_bytes(b"hello world" * 10), "is not a readable file of torch.save"),
    "nothing": (lambda path: path.write_bytes(b""), "is not a readable file of torch.save (it ends too early)"),
    "half a file": (cut, "is not a readable file of torch.save"),
    "another zip": (other_zip, "is not a readable file of torch.save"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_other_files_are_refused(name: str, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason=NEEDS_TORCH)
    make, message = REFUSALS[name]
    make(tmp_path / "x.pth")
    assert message in refused(tmp_path / "x.pth")


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "does not exist" in refused(tmp_path / "x.pth")
    assert "is a directory: give the file with the weights in it" in refused(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    assert "is not a readable safetensors file" in refused(tmp_path / "x.safetensors")
    (tmp_path / "x.pth").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"x.pth needs torch: pip install torch, or give a safetensors file$"):
        from_original(tmp_path / "x.pth")


def changed(make: Callable[..., dict[str, np.ndarray]], **tensors: np.ndarray | None) -> dict[str, np.ndarray]:
    state = make() | {name: t for name, t in tensors.items() if t is not None}
    return {name: tensor for name, tensor in state.items() if tensors.get(name, tensor) is not None}


ONES, MATRIX = np.ones(24, "f4"), np.ones((4, 24), "f4")
TENSORS: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "missing": (
        changed(seed_state, **{"layers.1.ls_mlp": None}),
        "do not fit the original's defaults: give --config: missing layers.1.ls_mlp",
    ),
    "unknown": (changed(seed_state, **{"layers.1.bias": ONES}), "unknown layers.1.bias"),
    "misshapen": (
        changed(seed_state, **{"layers.1.mlp.w13.weight": MATRIX}),
        "layers.1.mlp.w13.weight has shape (4, 24), the settings ask for (40, 24)",
    ),
    "no embedding": (changed(december_state, **{"model.embed_tokens.weight": None, "lm_head.weight": None}), "missing"),
    "no sizes": (
        changed(seed_state, **{"layers.0.self_attn.rotary.log_scale_weight": None}),
        "log_scale_weight is missing, so the sizes of the model are not known",
    ),
    "no size": (
        changed(seed_state, **{"layers.0.self_attn.rotary.log_scale_weight": np.ones(0, "f4")}),
        "log_scale_weight has shape (0,), expected 1 axes: copy the file again",
    ),
    "a number of a layer": (changed(seed_state, **{f"layers.{'9' * 5000}.ls_mlp": ONES}), "unknown layers.99999"),
    "wrong sizes": (changed(seed_state, **{"layers.0.mlp.w2.weight": ONES}), "w2.weight has shape (24,), expected 2"),
    "heads": (
        changed(december_state, **{"model.layers.0.self_attn.k_proj.weight": np.ones((6, 32), "f4")}),
        "8 attention",
    ),
    "LoRA": (
        changed(
            seed_state, **{"layers.0.self_attn.W_q.lora_A": MATRIX, "layers.0.self_attn.W_q._orig_module.weight": ONES}
        ),
        "holds LoRA weights (layers.0.self_attn.W_q._orig_module.weight, layers.0.self_attn.W_q.lora_A): call the "
        "original's merge_lora",
    ),
    "MoE layer": (
        {"input_norm.weight": ONES, "router.temperature": ONES, "experts.0.w13.weight": MATRIX},
        "holds a mixture of experts that stands alone",
    ),
    "experts": (
        changed(december_state, **{"model.layers.0.mlp.gate.weight": MATRIX}),
        "holds experts (model.layers.0.mlp.gate.weight): this network has no mixture of experts",
    ),
    "August": ({"token_embedding.embed_tokens.weight": MATRIX, "norm.weight": ONES}, "ByteModel, of August"),
    "October": ({"tok_embeddings.weight": MATRIX, "norm.weight": ONES}, "StellarByteModel, of September"),
    "another model": ({"h.0.weight": ONES}, "holds h.0.weight, and none of embed_tokens.weight, model.embed_tokens"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_are_no_such_model_are_refused(name: str, tmp_path: Path) -> None:
    state, message = TENSORS[name]
    assert message in refused(saved(tmp_path / "x.safetensors", state))


def test_layouts_by_name(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.safetensors", seed_state())
    assert from_original(path, layout="seed").layout.name == "seed"
    assert "has the layout seed, not december" in refused(path, layout="december")
    assert "layout must be one of auto, seed, december, got 'x'" in refused(path, layout="x")


def test_tied_tensors_that_differ(tmp_path: Path) -> None:
    config = saved_config(tmp_path / "c.json", **SEED, tie_word_embeddings=True)
    message = refused(saved(tmp_path / "x.safetensors", seed_state()), config=config)
    assert "lm_head.weight differs from embed_tokens.weight. Set tie_word_embeddings to false in" in message
