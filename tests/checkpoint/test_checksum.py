"""A flipped bit is found: in arrays of every dtype, in JSON values, and anywhere in the files of a checkpoint."""

import contextlib
import gc
import shutil
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.runs import same_weights
from helpers.training import settings

from stellarbyte_jax.checkpoint import checksum, store
from stellarbyte_jax.checkpoint.checksum import array_checksums, differing, json_checksum
from stellarbyte_jax.checkpoint.store import Checkpointer, CheckpointError
from stellarbyte_jax.checkpoint.weights import load_weights
from stellarbyte_jax.config import CheckpointConfig
from stellarbyte_jax.model.decoder import ByteTransformer
from stellarbyte_jax.training import resume
from stellarbyte_jax.training.optimizer import make_optimizer
from stellarbyte_jax.training.state import create_state, state_shapes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "int8", "float16", "uint8"])
def test_every_bit_counts(dtype):
    random = np.random.default_rng(0)
    array = random.integers(0, 256, (3, 5, 7 * jnp.dtype(dtype).itemsize), np.uint8).view(jnp.dtype(dtype))
    tree = {"a": {"b": array}, "c": np.ones(2, np.float32)}
    plain = array_checksums(tree)
    assert plain.keys() == {"a/b", "c"} and array_checksums(jax.device_put(tree)) == plain
    for _ in range(50):
        changed = array.copy()
        changed.view(np.uint8)[tuple(random.integers(0, n) for n in changed.view(np.uint8).shape)] ^= (
            1 << random.integers(8)
        )
        assert differing({**tree, "a": {"b": changed}}, plain) == ["a/b"]
    swapped = array.copy()
    swapped[0, 0, 0], swapped[0, 0, 1] = array[0, 0, 1], array[0, 0, 0]
    assert differing({"a": {"b": swapped}}, plain) == ["a/b"]
    assert differing({"other": array}, plain) == ["other"]


@pytest.mark.parametrize("size", [0, 1, 3, 8, 9, 16, 29])
def test_arrays_of_numpy_are_summed_in_parts(size, monkeypatch):
    monkeypatch.setattr(checksum, "_PART", 8)
    monkeypatch.setattr(checksum, "_SMALLEST", 2)
    array = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    for shaped in (array, np.asfortranarray(np.stack([array, 2 * array]))):
        assert array_checksums({"a": shaped}) == array_checksums({"a": jax.device_put(shaped)})
    flags = array > 0
    assert array_checksums([flags]) == array_checksums([jax.device_put(flags)])


def test_an_array_that_was_summed_is_let_go():
    """Also where JAX would take over its memory: at a multiple of 64 bytes, in parts that are whole."""
    room = np.zeros((1 << 12) * 4 + 64, np.uint8)
    start = -room.ctypes.data % 64
    array = room[start : start + (1 << 12) * 4].view(np.float32)
    alive = weakref.ref(room)
    array_checksums({"x": array})
    del room, array
    assert alive() is None


def test_the_number_of_an_array_is_what_its_docstring_says():
    def mixed(x):
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            x = (x ^ (x >> shift)) * factor % 2**32
        return x ^ (x >> 16)

    array = np.asarray([[1.5, -2.0, 0.0], [3.0, 1e-30, np.inf]], np.float32)
    bits = array.ravel().view(np.uint32).tolist()
    expected = sum(mixed(x) * (mixed(i) | 1) for i, x in enumerate(bits)) % 2**32
    assert array_checksums({"x": array}) == {"x": expected}
    assert mixed(1) == 0x514E28B7  # of the published function


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [1.0, 2.0, 0.02])
def test_a_zeroed_page_is_found_where_all_elements_are_equal(dtype, value):
    whole = np.full(1 << 16, value, jnp.dtype(dtype))
    expected = array_checksums({"x": whole})["x"]
    for size in (512, 4096):
        size //= whole.itemsize
        for start in range(0, whole.size, whole.size // 16):
            changed = whole.copy()
            changed[start : start + size] = 0
            assert array_checksums({"x": changed})["x"] != expected
            assert changed[start] == 0


def test_json_values_are_told_apart_whatever_their_order():
    assert json_checksum({"a": 1, "b": [1, 2]}) == json_checksum({"b": (1, 2), "a": 1})
    assert json_checksum({"a": 1}) != json_checksum({"a": 2})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A directory with two checkpoints, their states, and how to read what is left of a copy of it."""
    directory = tmp_path_factory.mktemp("run")
    config = settings()
    model = ByteTransformer(config.model)
    optimizer = make_optimizer(config, model)
    first = jax.jit(lambda: create_state(config, model, optimizer))()
    second = jax.tree.map(lambda x: x + jnp.ones((), x.dtype), first)
    with contextlib.closing(Checkpointer(directory, config.checkpoint)) as checkpointer:
        for step, state in ((1, first), (2, second)):
            state = state.replace(step=jax.device_put(np.asarray(step, np.int32)))
            resume.save(
                checkpointer, config, state, step, {"place": step}, resume.Progress(1.0, step), 1.5 * step - 0.5
            )
            checkpointer.wait()
    shapes = state_shapes(config, model, optimizer)

    def read(copy, verify=True):
        said = []
        with contextlib.closing(Checkpointer(copy, CheckpointConfig(verify=verify))) as checkpointer:
            return resume.restore(checkpointer, config, shapes, optimizer, said.append), said

    return directory, {1: first, 2: second}, read


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of reads that orbax abandons
def test_a_flipped_bit_anywhere_is_found_or_changes_nothing(run, tmp_path):
    directory, states, read = run
    random, set_aside = np.random.default_rng(0), 0
    files = sorted(p for p in (directory / "checkpoints" / "2").rglob("*") if p.is_file() and p.stat().st_size)
    sizes = np.asarray([p.stat().st_size for p in files])
    for number in range(16):
        copy = tmp_path / str(number)
        shutil.copytree(directory, copy)
        # Every second one by size, so that arrays are hit; the others by file, so that descriptions are.
        at = random.choice(len(files), p=sizes / sizes.sum() if number % 2 else None)
        damaged = copy / files[at].relative_to(directory)
        content = bytearray(damaged.read_bytes())
        content[random.integers(len(content))] ^= 1 << random.integers(8)
        damaged.write_bytes(content)
        found, said = read(copy)
        step = int(found.state.step)
        assert same_weights((found.state.params, found.state.opt_state), (states[step].params, states[step].opt_state))
        assert (found.data, found.progress.stale) == ({"place": step}, step)
        told = [line for line in said if "list of its items" not in line]
        assert (step == 1) == (len(told) == 1) and all("is unreadable" in line for line in said)
        set_aside += step == 1
    gc.collect()  # what is abandoned ends here, and not in another test
    assert set_aside > 4


def test_a_validation_loss_without_a_checksum_is_read_as_it_is(run, tmp_path):
    """As earlier versions wrote it."""
    directory, _, read = run
    shutil.copytree(directory, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "2" / "metrics" / "metrics"
    path.write_text('{"validation_loss": 2.5}')
    assert read(tmp_path / "run")[1] == [] and path.exists()


@pytest.mark.parametrize(
    ("item", "listing"),
    [*((item, True) for item in ("optimizer", "data", "config", "params", "format")), ("format", False)],
)
def test_a_checkpoint_that_lost_an_item_is_set_aside(run, tmp_path, item, listing):
    """One without its optimizer is not taken for initial weights, one without its format not for one of old.

    Also where orbax's list of the items is lost too.
    """
    directory, _, read = run
    shutil.copytree(directory, tmp_path / "copy")
    lost = tmp_path / "copy" / "checkpoints" / "2" / item
    shutil.rmtree(lost)
    if not listing:
        (lost.parent / "_CHECKPOINT_METADATA").unlink()
    found, said = read(tmp_path / "copy")
    assert int(found.state.step) == 1 and f"FileNotFoundError: {item} of it is missing" in said[0]


@pytest.mark.parametrize("listing", [b"{", b"{}", b"[]", b'{"item_handlers": 1}', b"[" * 100_000])
def test_a_checkpoint_that_lost_its_format_and_its_list_is_damaged(run, tmp_path, listing):
    directory, _, read = run
    shutil.copytree(directory, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "checkpoints" / "2" / "format")
    (tmp_path / "copy" / "checkpoints" / "2" / "_CHECKPOINT_METADATA").write_bytes(listing)
    found, said = read(tmp_path / "copy")
    assert int(found.state.step) == 1 and "format of it is missing" in said[-1]


@pytest.mark.parametrize("listing", [b"", b"\xff", b"[]", b'{"metrics": 1}', b'{"item_handlers": 1}', b"[" * 100_000])
def test_a_damaged_list_of_items_is_told_and_does_without(run, tmp_path, listing):
    directory, states, read = run
    shutil.copytree(directory, tmp_path / "copy")
    path = tmp_path / "copy" / "checkpoints" / "2" / "_CHECKPOINT_METADATA"
    path.write_bytes(listing)
    params = load_weights(tmp_path / "copy")[1]
    assert same_weights(params, states[2].params)
    found, said = read(tmp_path / "copy")
    assert int(found.state.step) == 2 and same_weights(found.state.params, states[2].params)
    (line,) = said
    assert line.startswith("checkpoint 2: orbax's list of its items is unreadable (") and not path.exists()
    assert read(tmp_path / "copy")[1] == []


def test_checkpoints_that_all_lost_their_format_are_damaged_and_none_of_old(run, tmp_path):
    directory, _, read = run
    shutil.copytree(directory, tmp_path / "copy")
    for step in "12":
        shutil.rmtree(tmp_path / "copy" / "checkpoints" / step / "format")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* could be read"):
        read(tmp_path / "copy")
    assert sorted(p.name for p in (tmp_path / "copy" / "corrupt").iterdir()) == ["1", "2"]


def test_a_damaged_note_of_the_format_is_no_other_format(run, tmp_path):
    """A checkpoint of another format ends the run, a damaged one is set aside."""
    directory, _, read = run
    shutil.copytree(directory, tmp_path / "copy")
    note = tmp_path / "copy" / "checkpoints" / "2" / "format" / "metadata"
    content = note.read_text()
    assert content.count('"format": 2') == 1
    note.write_text(content.replace('"format": 2', '"format": 3'))
    found, said = read(tmp_path / "copy")
    assert int(found.state.step) == 1 and "format differs from its checksum" in said[0]


@pytest.mark.parametrize("verify", [True, False])
def test_arrays_are_compared_unless_that_is_switched_off(run, tmp_path, monkeypatch, verify):
    directory, _, read = run
    shutil.copytree(directory, tmp_path / "copy")
    differs = store.differing
    second_step_alone = iter([True])
    monkeypatch.setattr(store, "differing", lambda *a: ["x"] if next(second_step_alone, False) else differs(*a))
    found, said = read(tmp_path / "copy", verify)
    assert int(found.state.step) == (1 if verify else 2)
    assert [("differs from its checksum" in line) for line in said] == [True] * verify


@pytest.mark.parametrize(
    "damage",
    [
        *(b'{"validation_loss" 1}', b"", b"[" * 100_000, b'{"validation_loss": "x"}', b"[1]", b"{}", None),
        lambda written: written.replace(b"2.5", b"2.4"),  # as a flipped bit makes it
        lambda written: written.replace(b'"checksum": "', b'"checksum": "0'),
    ],
)
def test_a_damaged_validation_loss_costs_no_checkpoint(run, tmp_path, damage):
    """orbax opens no directory with one; what is lost is whether that step was one of the best."""
    directory, states, read = run
    copy = tmp_path / "run"
    shutil.copytree(directory, copy)
    path = copy / "checkpoints" / "2" / "metrics" / "metrics"
    assert path.read_text().startswith('{"validation_loss": 2.5')
    path.unlink() if damage is None else path.write_bytes(damage(path.read_bytes()) if callable(damage) else damage)
    assert same_weights(load_weights(copy, step=2)[1], states[2].weights)
    found, said = read(copy)
    assert int(found.state.step) == 2 and same_weights(found.state.params, states[2].params)
    assert said == ["checkpoint 2: its validation loss is unreadable, so it does not count as one of the best"]
    assert read(copy)[1] == []
