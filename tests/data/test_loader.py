"""The loader: the same batches whatever the number of workers, each document once an epoch, exact resume."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from helpers.hostile import accepts
from helpers.processes import alive, until
from helpers.tiny_documents import save_byte_tokenizer

from stellarbyte_jax.config import DataConfig
from stellarbyte_jax.data.encode import GROUP_DOCUMENTS
from stellarbyte_jax.data.loader import make_loader, measure_loader
from stellarbyte_jax.data.shards import prepare
from stellarbyte_jax.data.sources import DataError
from stellarbyte_jax.data.text import TextFormat
from stellarbyte_jax.tokenizer.codec import load_tokenizer

DOCUMENTS = 3 * GROUP_DOCUMENTS + 5


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return save_byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def texts():
    rng = np.random.default_rng(0)
    return [f"<{i}>" + "春x" * int(rng.integers(1, 12)) for i in range(DOCUMENTS)]


@pytest.fixture
def data(tmp_path, tokenizer, texts):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    return DataConfig(
        train=(str(path),),
        validation=(str(path),),
        tokenizer=tokenizer,
        sequence_length=64,
        epochs=2,
        workers=0,
        cache_dir=str(tmp_path / "cache"),
    )


def _replace(config, **changes):
    return DataConfig.from_dict({**config.to_dict(), **changes})


def _loader(config, split="train", batch_size=4, **more):
    return make_loader(config, split=split, batch_size=batch_size, seed=more.pop("seed", 7), **more)


def _all(config, **more):
    with _loader(config, **more) as loader:
        return list(loader)


def _assert_equal(got, expected):
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.keys() == b.keys()
        for key in b:
            np.testing.assert_array_equal(a[key], b[key])


def _documents(batches, config):
    """The texts in reading order, glued from the tokens between BOS and EOS."""
    tokenizer = load_tokenizer(config.tokenizer)
    tokens = np.concatenate([b["tokens"][b["segment_ids"] > 0] for b in batches])
    ends = np.flatnonzero(tokens == tokenizer.eos_id)
    found = np.split(tokens, ends + 1)
    assert len(found.pop()) == 0
    assert all(d[0] == tokenizer.bos_id for d in found)
    return [tokenizer.decode(d[1:-1].tolist()) for d in found]


def test_each_epoch_holds_each_document_once_in_an_order_of_its_own(data, texts):
    got = _documents(_all(data), data)
    first, second = got[:DOCUMENTS], got[DOCUMENTS:]
    assert sorted(first) == sorted(second) == sorted(texts)
    assert first != second
    assert first != texts
    assert _documents(_all(data, seed=8), data) != got
    assert _documents(_all(data), data) == got
    assert _documents(_all(_replace(data, shuffle=False, epochs=1)), data) == texts


def test_bos_and_eos_follow_the_settings(data):
    tokenizer = load_tokenizer(data.tokenizer)
    plain = _replace(data, add_bos=False, add_eos=False)
    tokens = np.concatenate([b["tokens"] for b in _all(plain)])
    assert not np.isin(tokens, [tokenizer.bos_id, tokenizer.eos_id]).any()


def test_a_state_of_an_earlier_version_resumes_where_one_process_made_it(data):
    with _loader(data) as loader:
        next(loader)
        state = loader.state()
        following = next(loader)["tokens"]
    earlier = {**state, "stream": {**state["stream"], "process_index": 0, "process_count": 1}}
    with _loader(data) as loader:
        loader.restore(earlier)
        np.testing.assert_array_equal(next(loader)["tokens"], following)
        earlier["stream"]["process_count"] = 2
        with pytest.raises(DataError, match=r"2 processes had parts of it.* init_from=RUN"):
            loader.restore(earlier)


def test_state_belongs_to_the_batches_handed_out_and_restores_everywhere(data):
    with _loader(_replace(data, prefetch=5)) as loader:
        states, batches = [loader.state()], []
        for batch in loader:
            batches.append(batch)
            states.append(json.loads(json.dumps(loader.state())))
    assert len(batches) > 10
    for begin in range(len(states)):
        with _loader(_replace(data, prefetch=1)) as loader:
            loader.restore(states[begin])
            assert loader.state() == states[begin]
            _assert_equal(list(loader), batches[begin:])
            assert loader.state() == states[-1]


def test_restoring_goes_back_as_well(data):
    with _loader(data) as loader:
        first = [next(loader) for _ in range(3)]
        state = loader.state()
        second = [next(loader) for _ in range(3)]
        loader.restore(state)
        _assert_equal([next(loader) for _ in range(3)], second)
    _assert_equal(_all(data)[:3], first)


def test_workers_change_neither_batches_nor_states(data):
    expected = _all(data)
    with _loader(data) as loader:
        states = [loader.state() for _ in loader]
    with _loader(_replace(data, workers=2)) as loader:
        got = []
        for batch, state in zip(loader, states, strict=True):
            got.append(batch)
            assert loader.state() == state
    _assert_equal(got, expected)
    with _loader(_replace(data, workers=1)) as loader:
        loader.restore(states[4])
        _assert_equal(list(loader), expected[5:])


def test_a_file_that_is_trained_and_validated_on_is_told(data, tmp_path, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("train", "train/in"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "b.jsonl").write_text('{"text": "b"}\n')
    os.symlink("train/b.jsonl", "link.jsonl")

    def told(train, validation):
        caplog.clear()
        _loader(_replace(data, train=train, validation=validation), "validation").close()
        return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]

    for train, validation in (
        (["train/b.jsonl"], ["train/b.jsonl"]),
        (["train/**/*.jsonl"], [str(tmp_path / "train" / "b.jsonl")]),
        (["./train/*.jsonl"], ["link.jsonl", "a.jsonl"]),
    ):
        (message,) = told(train, validation)
        assert f"{validation[0]} is in both data.train and data.validation" in message and "\n" not in message
        assert "a.jsonl" not in message
    assert told(["train/b.jsonl"], ["train/in/*.jsonl", "a.jsonl"]) == []
    assert told([], ["a.jsonl"]) == []
    caplog.clear()
    _loader(data).close()
    assert caplog.records == []


def test_a_place_in_a_folder_that_was_moved_is_one_in_the_same_files(data, tmp_path):
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n')
    with _loader(_replace(data, train=[str(tmp_path / "[ab].jsonl")])) as loader:
        batches = [next(loader)]
        state = loader.state()
        batches.append(next(loader))
    (tmp_path / "moved").mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        os.rename(tmp_path / name, tmp_path / "moved" / name)
    moved = _replace(data, train=[str(tmp_path / "moved" / name) for name in ("a.jsonl", "b.jsonl")])
    with _loader(moved) as loader:
        loader.restore(state)
        _assert_equal([next(loader)], batches[1:])
    (tmp_path / "moved" / "b.jsonl").write_text('{"text": "c"}\n')
    with _loader(moved) as loader, pytest.raises(DataError, match=r"b\.jsonl: other content than before"):
        loader.restore(state)


def test_restoring_other_data_is_refused(data, tmp_path):
    with _loader(data) as loader:
        state = loader.state()
    with _loader(data, seed=1) as loader, pytest.raises(DataError, match="shuffle_seed was 7 and is now 1"):
        loader.restore(state)
    other = tmp_path / "b.jsonl"
    other.write_text('{"text": "b"}\n')
    with (
        _loader(_replace(data, train=[str(other)])) as loader,
        pytest.raises(DataError, match=r"the files were a\.jsonl and are now b\.jsonl; put them back"),
    ):
        loader.restore(state)
    renamed = tmp_path / "c.jsonl"
    renamed.write_bytes((tmp_path / "a.jsonl").read_bytes())
    with _loader(_replace(data, train=[str(renamed)])) as loader, pytest.raises(DataError, match="files was"):
        loader.restore(state)
    with _loader(data) as loader, pytest.raises(DataError, match="format 99"):
        loader.restore({**state, "format": 99})
    now = state["stream"]["tokenizer"]
    with (
        _loader(data) as loader,
        pytest.raises(DataError, match=f"tokenizer was {'0' * 12} and is now {now[:12]}; keep"),
    ):
        loader.restore({**state, "stream": {**state["stream"], "tokenizer": "0" * 64}})
    long = "x\n\x1b[2J" * 10**5
    for hostile in ({**state, "format": long}, {**state, "stream": {**state["stream"], "tokenizer": long}}):
        with _loader(data) as loader:
            assert not accepts(lambda: loader.restore(hostile))  # noqa: B023
    before = (tmp_path / "a.jsonl").read_text()
    (tmp_path / "a.jsonl").write_text(before.replace("<", "("))
    with (
        _loader(data) as loader,
        pytest.raises(DataError, match=r"stopped: .*/a\.jsonl: other content than before .* put them back"),
    ):
        loader.restore(state)
    (tmp_path / "a.jsonl").write_text(before)
    with _loader(data) as loader:
        earlier = {name: value for name, value in state["stream"].items() if name != "contents"}
        loader.restore({**state, "stream": earlier})  # from before contents were noted


@pytest.mark.parametrize("changes", [{"fields": None}, {"fields": 3}, {"template": 3}, {"fields": ["a", 3]}], ids=str)
def test_a_state_whose_fields_are_damaged_is_refused(data, changes):
    with _loader(data) as loader:
        state = loader.state()
        with pytest.raises(DataError, match="cannot continue the data where it stopped"):
            loader.restore({**state, "stream": {**state["stream"], **changes}})


def test_a_state_without_fields_is_refused(data):
    with _loader(data) as loader:
        state = loader.state()
        del state["stream"]["fields"]
        with pytest.raises(DataError, match="fields was None"):
            loader.restore(state)


def test_of_several_files_those_that_changed_are_named(data, tmp_path):
    paths = [tmp_path / f"{name}.jsonl" for name in "xyz"]
    for path in paths:
        path.write_text('{"text": "a"}\n' * 3)
    config = _replace(data, train=[str(path) for path in paths])
    with _loader(config) as loader:
        state = json.loads(json.dumps(loader.state()))
    paths[1].write_text('{"text": "b"}\n' * 3)
    with _loader(config) as loader, pytest.raises(DataError) as caught:
        loader.restore(state)
    assert f"{paths[1]}: other content" in str(caught.value)
    assert not any(str(path) in str(caught.value) for path in (paths[0], paths[2]))
    paths[1].write_text('{"text": "a"}\n' * 3)
    with _loader(config) as loader:
        loader.restore(state)


def test_how_many_batches_a_pass_has_is_known_after_one(data):
    with _loader(data, "validation") as loader:
        next(loader), next(iter(loader))
        assert loader.pass_batches is None
        batches = list(loader)
        assert loader.pass_batches == len(batches) > 2
        next(iter(loader))
        assert loader.pass_batches == len(batches)
    with _loader(data) as loader:
        list(loader)
        assert loader.pass_batches is None  # it may have begun anywhere


def test_a_place_does_not_depend_on_how_the_format_of_texts_is_spelled(data):
    with _loader(data) as loader:
        next(loader)
        states = [loader.state()]
        expected = next(loader)
    same = _replace(data, template="{text}")
    with _loader(same) as loader:
        states.append(loader.state() | {name: states[0][name] for name in ("group", "offset", "skipped")})
    for state in states:
        for settings in (data, same):
            with _loader(settings) as loader:
                loader.restore(state)
                _assert_equal([next(loader)], [expected])
        with (
            _loader(_replace(data, template="{text}!")) as loader,
            pytest.raises(DataError, match=r"template was (None|'\{text\}') and is now '\{text\}!'"),
        ):
            loader.restore(state)


def test_epochs_none_goes_on_for_ever(data):
    with _loader(_replace(data, epochs=None)) as loader:
        _assert_equal([next(loader) for _ in range(3)], _all(data)[:3])
        while loader.epoch < 3:
            next(loader)
        assert loader.epoch < 3.5


def test_documents_without_text_are_left_out(data, texts):
    with open(data.train[0], "a") as file:
        file.write('{"text": ""}\n' * 2)
    assert _documents(_all(_replace(data, epochs=1, shuffle=False)), data) == texts


def test_one_document_is_enough(data, tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text('{"text": "alone"}')
    assert _documents(_all(_replace(data, train=[str(path)], epochs=3)), data) == ["alone"] * 3


def test_validation_starts_again_and_is_in_order(data, texts):
    with _loader(_replace(data, workers=1), split="validation") as loader:
        first = list(loader)
        assert _documents(first, data) == texts
        _assert_equal(list(loader), first)
        next(iter(loader))
        _assert_equal(list(loader), first)


def test_transform_runs_in_the_background_thread(data):
    threads = set()

    def transform(batch):
        threads.add(threading.current_thread())
        return batch["tokens"].sum()

    sums = _all(data, transform=transform)
    assert sums == [b["tokens"].sum() for b in _all(data)]
    assert threading.main_thread() not in threads


def _add_bad_lines(data, count=3):
    path = data.train[0]
    with open(path, "ab") as file:
        file.write(b'{"txt": "x"}\n' * count)


@pytest.mark.parametrize("workers", [0, 1])
def test_skipped_lines_are_counted(data, texts, workers):
    _add_bad_lines(data)
    config = _replace(data, on_error="skip", epochs=1, workers=workers)
    with _loader(config) as loader:
        assert loader.skipped == 0
        assert sorted(_documents(list(loader), data)) == sorted(texts)
        assert loader.skipped == 3
        state = loader.state()
    with _loader(config) as loader:
        loader.restore(state)
        assert loader.skipped == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_line_is_one_clear_error(data, workers, capfd):
    _add_bad_lines(data, 1)
    message = rf"a\.jsonl:{DOCUMENTS + 1}: no field 'text'; the fields here are: txt"
    with _loader(_replace(data, workers=workers, shuffle=False)) as loader:
        for _ in range(2):
            with pytest.raises(DataError, match=message) as caught:
                list(loader)
            assert not hasattr(caught.value, "__notes__")
    assert capfd.readouterr() == ("", "")


def test_a_run_stopped_by_a_bad_line_goes_on_with_skip(data, texts):
    _add_bad_lines(data, 1)
    with _loader(_replace(data, shuffle=False, sequence_length=16, prefetch=1)) as loader:
        before = [next(loader)]
        state = loader.state()
        with pytest.raises(DataError):
            list(loader)
    with _loader(_replace(data, shuffle=False, sequence_length=16, on_error="skip", epochs=1)) as loader:
        loader.restore(state)
        assert _documents(before + list(loader), data) == texts
        assert loader.skipped == 1


def test_a_wrong_field_is_found_before_training(data):
    with pytest.raises(DataError, match=r"a\.jsonl:1: no field 'content'; the fields here are: text"):
        _loader(_replace(data, fields=["content"]))


@pytest.mark.parametrize("text", ["", "x"])
def test_validation_without_a_token_to_predict_is_refused_before_training(data, tmp_path, text):
    """One token predicts nothing where no bos comes before it."""
    path = tmp_path / "few.jsonl"
    line = json.dumps({"text": text}) + "\n"
    path.write_text(line * DOCUMENTS)
    config = _replace(data, validation=[str(path)], add_bos=False, add_eos=False)
    with pytest.raises(DataError, match=r"data\.validation=.*few\.jsonl holds no token to predict: "):
        _loader(config, "validation")
    path.write_text(line * DOCUMENTS + '{"text": "ab"}\n')
    with _loader(config, "validation") as loader:
        assert sum(batch["loss_mask"].sum() for batch in loader) == 1


def test_of_validation_no_more_is_read_before_training_than_its_beginning(data, texts, tmp_path):
    with open(data.validation[0], "a") as file:
        file.write("{not json\n")
    with _loader(data, "validation") as loader, pytest.raises(DataError, match=rf"a\.jsonl:{DOCUMENTS + 1}:"):
        list(loader)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(data):
    size = load_tokenizer(data.tokenizer).vocab_size
    with pytest.raises(
        ValueError, match=rf"has {size} tokens, model\.vocab_size is 100: give a new model model\.vocab_size={size}"
    ):
        _loader(data, vocab_size=100)
    _loader(data, vocab_size=size).close()


def _children(pid):
    path = Path(f"/proc/{pid}/task/{pid}/children")
    found = [int(c) for p in path.parent.parent.glob("*/children") for c in p.read_text().split()]
    return [c for c in found if "resource_tracker" not in Path(f"/proc/{c}/cmdline").read_text()]


def test_close_ends_threads_and_workers(data):
    children = _children(os.getpid())
    loader = _loader(_replace(data, workers=2, epochs=None))
    next(loader)
    started = set(_children(os.getpid())) - set(children)
    assert len(started) == 2
    loader.close()
    until(lambda: not any(alive(p) for p in started))
    until(lambda: not any(t.name.startswith("grain") for t in threading.enumerate()))
    with pytest.raises(RuntimeError, match="the loader is closed"):
        next(loader)


PROGRAM = """
import signal, sys, time
from stellarbyte_jax.config import DataConfig
from stellarbyte_jax.data.loader import make_loader
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # under nohup it would be ignored
    config = DataConfig.from_dict({**__import__("json").loads(sys.argv[1]), "workers": 2, "epochs": None})
    loader = make_loader(config, split="train", batch_size=4, seed=0)
    next(loader)
    try:
        print("ready", flush=True)
        while sys.argv[2] != "exit":
            next(loader)
            time.sleep(0.01)
    except KeyboardInterrupt:
        for _ in range(50):
            next(loader)
        loader.close()
        print("stopped by the parent", flush=True)
"""


@contextlib.contextmanager
def running(program, *arguments):
    """A Python program in a session of its own, of which nothing is left afterwards, whatever happens."""
    process = subprocess.Popen(
        [sys.executable, str(program), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize("how", ["exit", "interrupt", "kill"])
def test_workers_end_with_the_program_and_leave_signals_to_it(data, tmp_path, how):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    with running(program, json.dumps(data.to_dict()), how) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        children = _children(process.pid) if how != "exit" else []
        for child in children:
            status = Path(f"/proc/{child}/status").read_text()
            blocked = int(status.split("SigBlk:")[1].split()[0], 16)
            assert blocked & 1 << signal.SIGINT - 1
            assert blocked & 1 << signal.SIGTERM - 1
        if how == "interrupt":
            os.killpg(process.pid, signal.SIGINT)
        elif how == "kill":
            process.kill()
        out, errors = process.communicate(timeout=300)
        # Python's own resource tracker reports what a killed program could not give back.
        assert errors == "" or (how == "kill" and "resource_tracker" in errors)
        if how == "interrupt":
            assert out == "stopped by the parent\n"
        assert process.returncode == (-signal.SIGKILL if how == "kill" else 0)
        assert len(children) == (0 if how == "exit" else 2)
        until(lambda: not any(alive(c) for c in children))


def test_what_a_test_starts_ends_with_it(tmp_path):
    """Also where it fails or is interrupted in the middle."""
    program = tmp_path / "program.py"
    program.write_text(
        "import subprocess, time\n"
        "children = [subprocess.Popen(['sleep', '600']) for _ in range(2)]\n"
        "print('ready', flush=True)\n"
        "time.sleep(600)\n"
    )
    with pytest.raises(KeyboardInterrupt), running(program) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        started = [process.pid, *_children(process.pid)]
        raise KeyboardInterrupt
    assert len(started) == 3
    until(lambda: not any(alive(p) for p in started))


def test_measuring_counts_real_tokens(data):
    measured = measure_loader(_replace(data, epochs=None), batch_size=2, seconds=0.1)
    assert measured["tokens_per_second"] > 0
    assert 0 <= measured["padding"] < 0.2


def test_what_was_made_again_under_the_same_name_is_read_anew(tmp_path):
    """In one process, such as a notebook: prepared shards, and a tokenizer."""

    def first_batch():
        data = DataConfig(
            train=(str(tmp_path / "out"),), tokenizer=tokenizer, sequence_length=8, workers=0, shuffle=False,
            add_bos=False, add_eos=False,
        )  # fmt: skip
        with contextlib.closing(make_loader(data, split="train", batch_size=1, seed=0)) as loader:
            return np.asarray(next(loader)["tokens"])[0]

    tokenizer = save_byte_tokenizer(tmp_path / "tokenizer")
    for text in ("abcdefgh", "ijklmnop"):
        (tmp_path / "a.txt").write_text(text)
        form = {"text": TextFormat(("text",), None), "workers": 0, "overwrite": True, "cache_dir": str(tmp_path / "c")}
        prepare([str(tmp_path / "a.txt")], tmp_path / "out", tokenizer, **form)
        assert first_batch().tolist() == load_tokenizer(tokenizer).encode(text)
