"""Files of the original StellarByte: its configs, and pickles of torch."""

import functools
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.hostile import RAW, TEXTS, accepts, damaged, files_like
from helpers.original_models import DECEMBER, DECEMBER_REST, SEED, SEED_REST, december_state, seed_state
from hypothesis import example, given
from hypothesis import strategies as st

from stellarbyte_jax.hf.original.checkpoint import open_checkpoint
from stellarbyte_jax.hf.original.config_file import read_settings
from stellarbyte_jax.hf.original.layouts import LAYOUTS
from stellarbyte_jax.hf.original.settings import byte_config, settings_of_file, settings_of_tensors

WHOLE = {"seed": SEED_REST | SEED, "december": DECEMBER_REST | DECEMBER}
STATES = {"seed": seed_state(), "december": december_state()}
SHAPES = {name: {tensor: array.shape for tensor, array in state.items()} for name, state in STATES.items()}
TRAINERS = {"seed": {"model": SEED, "training": {"batch_size": 3}}, "december": DECEMBER | {"learning_rate": "1e-4"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return functools.cache(tmp_path_factory.mktemp)


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
@pytest.mark.parametrize("layout", LAYOUTS)
@given(data=st.data())
def test_configs(layout: str, suffix: str, data: st.DataObject, folder: Callable[[str], Path]) -> None:
    valid = data.draw(st.sampled_from([WHOLE[layout], TRAINERS[layout]]))
    path = folder("configs") / f"c{suffix}"
    path.write_bytes(data.draw(files_like(valid, tuple(WHOLE[layout]))))
    chosen = LAYOUTS[layout]

    def read() -> None:
        stated, _ = settings_of_file(chosen, SHAPES[layout], read_settings(path, chosen))
        byte_config(chosen, stated, {}, str(path))

    accepts(read)


@pytest.mark.parametrize("layout", LAYOUTS)
@given(changes=st.dictionaries(st.integers(0, 99), st.lists(st.integers(0, 2**40), max_size=3)), names=st.sets(TEXTS))
@example(changes={}, names={"layers.999999.x", "model.layers.999999.x"})
def test_shapes(layout: str, changes: dict[int, list[int]], names: set[str]) -> None:
    shapes: dict[str, Any] = {**SHAPES[layout], **dict.fromkeys(names, (1,))}
    for at, shape in changes.items():
        shapes[list(shapes)[at % len(shapes)]] = tuple(shape)
    chosen = LAYOUTS[layout]
    accepts(lambda: byte_config(chosen, settings_of_tensors(chosen, shapes, tied=False)[0], {}, "file"))


@pytest.mark.parametrize("zipped", [True, False])
@given(data=st.data())
def test_torch_files(zipped: bool, data: st.DataObject, folder: Callable[[str], Path]) -> None:
    torch = pytest.importorskip("torch", reason="pip install -e '.[torch]'")
    file = io.BytesIO()
    content = {"model_state": {"a": torch.ones(2, 3), "b": torch.ones(2).half()}, "epoch": 3, "other": os.sep}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    path = folder("torch") / "x.pth"
    path.write_bytes(data.draw(damaged(file.getvalue()) | RAW))

    def read() -> None:
        with open_checkpoint(path) as tensors:
            for name in tensors.names():
                assert tensors.read(name).shape == tensors.shape(name)

    accepts(read)
