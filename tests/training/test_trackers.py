"""Where metrics go: the file that a resume mends, and packages that are not here, played by modules of the test."""

import errno
import json
import os
import re
import sys
import types
from types import ModuleType

import pytest
from helpers.training import settings

from stellarbyte_jax.command import MendableError
from stellarbyte_jax.config import LoggingConfig
from stellarbyte_jax.training import trackers
from stellarbyte_jax.training.trackers import JsonlTracker, make_trackers


def run_of(directory, *trackers):
    return settings(output_dir=str(directory), logging=LoggingConfig(trackers=trackers))


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


@pytest.fixture
def played(monkeypatch):
    """Puts a module in the place of a package; what is called in it is noted as (name, arguments, named arguments)."""

    def play(name, made, result=None):
        calls = []

        def noting(attribute, returned=None):
            def call(*args, **kwargs):
                calls.append((attribute, args, kwargs))
                return returned

            return call

        module, run = ModuleType(name), ModuleType(f"{name}.run")
        for attribute in ("log", "define_metric", "finish", "add_scalar", "add_text", "close"):
            setattr(run, attribute, noting(attribute))
            setattr(module, attribute, noting(attribute))
        setattr(module, made, noting(made, run))
        module.Table = lambda columns, data: ("table", columns, data)
        module.Text = lambda data, caption: ("text", data, caption)
        monkeypatch.setitem(sys.modules, name, module)
        return calls

    return play


def test_each_step_is_a_line_at_once(path):
    tracker = JsonlTracker(path, 0)
    tracker.log(1, {"loss": 2.5, "tokens_per_second": 10})
    assert lines_of(path) == [{"step": 1, "loss": 2.5, "tokens_per_second": 10}], "before it is closed"
    tracker.log(2, {"validation/loss": 2.0})
    tracker.close()
    assert lines_of(path)[1:] == [{"step": 2, "validation/loss": 2.0}]
    assert path.read_bytes().endswith(b"\n")


@pytest.mark.parametrize(("start", "kept"), [(0, []), (2, [1, 2, 2]), (9, [1, 2, 2, 3, 4])])
def test_a_resume_drops_the_lines_past_its_step(path, start, kept):
    steps = [1, 2, 2, 3, 4]
    path.write_text("".join(f'{{"step": {step}, "loss": {number}.5}}\n' for number, step in enumerate(steps)))
    tracker = JsonlTracker(path, start)
    expected = [{"step": step, "loss": number + 0.5} for number, step in enumerate(steps[: len(kept)])]
    assert lines_of(path) == expected, "on disk before the first step"
    tracker.log(start + 1, {"loss": 1.0})
    tracker.close()
    assert lines_of(path) == [*expected, {"step": start + 1, "loss": 1.0}]


def test_lines_that_a_kill_cut_short_are_dropped(path):
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "lo\n\n{"loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"ste')
    JsonlTracker(path, 5).close()
    assert lines_of(path) == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}]


@pytest.mark.parametrize("damage", [b"\xff\xfe\x80garbage", b"\0" * 50, b"[" * 100_000, b"3", b'{"step": "x"}'])
def test_a_damaged_line_costs_that_line_alone(path, damage):
    path.write_bytes(b'{"step": 1, "loss": 3.0}\n' + damage + b'\n{"step": 2, "loss": 2.0}\n')
    JsonlTracker(path, 5).close()
    assert lines_of(path) == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}]


def test_without_names_there_is_the_file_alone(tmp_path, path):
    (tracker,) = make_trackers(run_of(tmp_path), 0)
    assert isinstance(tracker, JsonlTracker)
    tracker.log(1, {"loss": 2.5})
    tracker.close()
    assert lines_of(path) == [{"step": 1, "loss": 2.5}]


def test_the_file_goes_on_at_the_step_of_the_run(tmp_path, path):
    path.write_text('{"step": 4}\n{"step": 5}\n')
    for tracker in make_trackers(run_of(tmp_path), 4):
        tracker.close()
    assert lines_of(path) == [{"step": 4}]


def test_tensorboard_gets_scalars_and_hides_what_is_past_the_step(tmp_path, played):
    calls = played("tensorboardX", "SummaryWriter")
    file, tracker = make_trackers(run_of(tmp_path, "tensorboard"), 7)
    tracker.log(8, {"loss": 2.5, "validation/loss": 2.0})
    assert calls == [
        ("SummaryWriter", (str(tmp_path / "tensorboard"),), {"purge_step": 8}),
        ("add_scalar", ("loss", 2.5, 8), {}),
        ("add_scalar", ("validation/loss", 2.0, 8), {}),
    ]
    tracker.samples(8, [("春", "a\n# b\n"), ("x", "y")])
    tracker.close()
    assert calls[3:] == [
        ("add_text", ("samples/1", "    春|a\n    # b\n", 8), {}),
        ("add_text", ("samples/2", "    x|y\n", 8), {}),
        ("close", (), {}),
    ]
    file.close()


def test_wandb_gets_a_run_named_after_the_directory(tmp_path, played):
    calls = played("wandb", "init")
    config = run_of(tmp_path / "small", "wandb")
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "trackers.json").write_text('{"wandb": "abc"}')
    file, tracker = make_trackers(config, 7)
    tracker.log(8, {"loss": 2.5, "accuracy": 0.5})
    tracker.samples(8, [("a", "b"), ("c", "d")])
    tracker.close()
    (_, positional, named), *others = calls
    assert positional == () and named == {
        "project": "stellarbyte",
        "name": "small",
        "id": "abc",
        "resume": "allow",
        "dir": str(tmp_path / "small"),
        "config": config.to_dict(),
    }
    assert others == [
        ("define_metric", ("step",), {"hidden": True}),
        ("define_metric", ("*",), {"step_metric": "step"}),
        ("log", ({"loss": 2.5, "accuracy": 0.5, "step": 8},), {}),
        ("log", ({"samples": ("table", ["prompt", "text"], [["a", "b"], ["c", "d"]]), "step": 8},), {}),
        ("finish", (), {}),
    ]
    file.close()


@pytest.mark.parametrize("mode", [None, "online", "local", "offline"])
def test_swanlab_has_an_experiment_named_after_the_directory(mode, tmp_path, played, monkeypatch):
    monkeypatch.delenv("SWANLAB_MODE", raising=False)
    if mode is not None:
        monkeypatch.setenv("SWANLAB_MODE", mode)
    continues = {"id": "abc", "resume": "allow"} if mode in (None, "online") else {}  # refused elsewhere
    calls = played("swanlab", "init")
    config = run_of(tmp_path / "small", "swanlab")
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "trackers.json").write_text('{"swanlab": "abc"}')
    file, tracker = make_trackers(config, 7)
    tracker.log(8, {"loss": 2.5})
    tracker.samples(8, [("a", "b"), ("c", "d")])
    tracker.close()
    (_, positional, named), *others = calls
    assert positional == () and named == {
        "project": "stellarbyte",
        "experiment_name": "small",
        "logdir": str(tmp_path / "small" / "swanlab"),
        "config": config.to_dict(),
        **continues,
    }
    assert others == [
        ("log", ({"loss": 2.5},), {"step": 8}),
        ("log", ({"samples": [("text", "b", "a"), ("text", "d", "c")]},), {"step": 8}),
        ("finish", (), {}),
    ]
    file.close()


def ids_of(calls):
    return [named["id"] for name, _, named in calls if name == "init"]


@pytest.mark.parametrize("tracker", ["wandb", "swanlab"])
def test_runs_of_one_name_are_told_apart_and_a_resume_is_the_same_run(tracker, tmp_path, played, monkeypatch):
    monkeypatch.delenv("SWANLAB_MODE", raising=False)
    calls = played(tracker, "init")
    for start, place in ((0, "a"), (0, "b"), (7, "a"), (7, "b")):
        (tmp_path / place / "quickstart").mkdir(parents=True, exist_ok=True)
        for each in make_trackers(run_of(tmp_path / place / "quickstart", tracker), start):
            each.close()
    first, second, *again = ids_of(calls)
    assert first != second and again == [first, second]
    assert all(re.fullmatch("[a-z0-9]{21}", each) for each in (first, second)), "what both services take"
    (tmp_path / "a" / "quickstart").rename(tmp_path / "moved")
    for each in make_trackers(run_of(tmp_path / "moved", tracker), 7):
        each.close()
    assert ids_of(calls)[-1] == first


def test_a_run_that_wandb_knows_by_the_name_of_its_directory_keeps_it(tmp_path, played):
    calls = played("wandb", "init")
    (tmp_path / "small" / "wandb").mkdir(parents=True)
    for start in (7, 9):
        for each in make_trackers(run_of(tmp_path / "small", "wandb"), start):
            each.close()
    assert ids_of(calls) == ["small", "small"]


def test_the_name_of_the_directory_is_none_for_another_tracker(tmp_path, played, monkeypatch):
    monkeypatch.delenv("SWANLAB_MODE", raising=False)
    calls = played("swanlab", "init")
    (tmp_path / "small" / "wandb").mkdir(parents=True)
    for each in make_trackers(run_of(tmp_path / "small", "swanlab"), 7):
        each.close()
    assert len(ids_of(calls)[0]) == 21


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", r"trackers\.json must hold a JSON object, got list, or remove it: "),
        ('{"wandb": 3}', r"trackers\.json: the id of wandb must be a text, got 3; remove it for a new one$"),
        ('{"wandb": ""}', r"must be a text, got ''; remove it for a new one$"),
    ],
)
def test_a_damaged_file_of_ids_is_told(text, message, tmp_path, played):
    calls, others = played("wandb", "init"), played("tensorboardX", "SummaryWriter")
    (tmp_path / "trackers.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        make_trackers(run_of(tmp_path, "tensorboard", "wandb"), 0)
    assert calls == [] and others[-1][0] == "close"


def test_a_file_of_ids_that_cannot_be_written_is_told(tmp_path, played, monkeypatch):
    calls, others = played("wandb", "init"), played("tensorboardX", "SummaryWriter")

    def full(path, value):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(trackers, "write_json", full)
    with pytest.raises(OSError, match=rf"^{tmp_path}/trackers\.json could not be written: No space left on device; "):
        make_trackers(run_of(tmp_path, "tensorboard", "wandb"), 0)
    assert calls == [] and others[-1][0] == "close"


def test_ids_of_other_trackers_are_kept(tmp_path):
    first = trackers.known_as(tmp_path, "wandb")
    assert trackers.known_as(tmp_path, "swanlab") != first == trackers.known_as(tmp_path, "wandb")


def test_trackers_come_in_the_order_of_their_names(tmp_path, played):
    for name, made in (("wandb", "init"), ("swanlab", "init"), ("tensorboardX", "SummaryWriter")):
        played(name, made)
    made = make_trackers(run_of(tmp_path, "swanlab", "tensorboard", "wandb"), 0)
    assert [type(t).__name__ for t in made] == [
        "JsonlTracker",
        "SwanLabTracker",
        "TensorBoardTracker",
        "WandbTracker",
    ]
    made[0].close()


@pytest.mark.parametrize(
    ("name", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb"), ("swanlab", "swanlab")]
)
def test_a_package_that_is_not_installed_is_named_with_what_to_install(tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"^logging\.trackers names '{name}', but {package} is not installed: pip install {package}$"
    with pytest.raises(ModuleNotFoundError, match=message):
        make_trackers(run_of(tmp_path, name), 0)


def test_trackers_that_were_open_are_closed_where_the_next_is_missing(tmp_path, played, monkeypatch):
    calls = played("tensorboardX", "SummaryWriter")
    closed = []
    close = JsonlTracker.close
    monkeypatch.setattr(JsonlTracker, "close", lambda self: closed.append(self) or close(self))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ModuleNotFoundError, match="names 'wandb'"):
        make_trackers(run_of(tmp_path, "tensorboard", "wandb"), 0)
    assert [name for name, _, _ in calls] == ["SummaryWriter", "close"] and len(closed) == 1


def test_tensorboard_event_files_hold_the_numbers(tmp_path):
    """The real package, where it is installed."""
    pytest.importorskip("tensorboardX", reason="pip install -e '.[trackers]'")
    file, tracker = make_trackers(run_of(tmp_path, "tensorboard"), 0)
    tracker.log(1, {"loss": 2.5})
    tracker.close()
    file.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert events.name.startswith("events") and b"loss" in events.read_bytes()


def test_lines_that_are_no_metrics_are_dropped_and_the_file_is_replaced_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n3\n[4]\n{"loss": 1}\n{"step": "x"}\n{"step": 2, "lo')
    tracker = JsonlTracker(path, 5)
    tracker.log(6, {"loss": 1.0})
    tracker.close()
    assert path.read_text() == '{"step": 1, "loss": 2.0}\n{"step": 6, "loss": 1.0}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(("name", "offline"), [("wandb", "WANDB_MODE=offline"), ("swanlab", "SWANLAB_MODE=local")])
@pytest.mark.parametrize("kind", ["UsageError", "CommError"])
def test_a_tracker_without_a_login_is_one_line_with_a_way_out(tmp_path, monkeypatch, name, offline, kind):
    def init(**settings):
        raise type(kind, (Exception,), {})("No API key configured.\nUse `wandb login` to log in.")

    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(init=init))
    closed = []
    close = JsonlTracker.close
    monkeypatch.setattr(JsonlTracker, "close", lambda self: closed.append(self) or close(self))
    with pytest.raises(MendableError) as caught:
        make_trackers(run_of(tmp_path, name), 0)
    assert str(caught.value) == (
        f"logging.trackers names {name!r}, which could not begin ({kind}: No API key configured. Use `wandb login` to "
        f"log in.): log in with `{name} login`, or set {offline}"
    )
    assert len(closed) == 1


def test_a_run_that_is_the_folder_here_has_its_name(tmp_path, played, monkeypatch):
    (tmp_path / "small" / "wandb").mkdir(parents=True)  # of a version that gave that name as the id
    monkeypatch.chdir(tmp_path / "small")
    calls = {name: played(name, "init") for name in ("wandb", "swanlab")}
    for tracker in make_trackers(run_of(".", "wandb", "swanlab"), 0):
        tracker.close()
    assert (calls["wandb"][0][2]["name"], calls["wandb"][0][2]["id"]) == ("small", "small")
    assert calls["swanlab"][0][2]["experiment_name"] == "small"


@pytest.mark.parametrize("text", ["", "[]", '{"wandb": "a"', '\ufeff{"wandb": "a"}'])
def test_a_damaged_file_of_ids_may_be_removed(text, tmp_path, played):
    played("wandb", "init")
    (tmp_path / "trackers.json").write_text(text)
    with pytest.raises(ValueError, match=r"trackers\.json .*, or remove it: trackers begin new runs then$"):
        make_trackers(run_of(tmp_path, "wandb"), 0)
    (tmp_path / "trackers.json").unlink()
    for tracker in make_trackers(run_of(tmp_path, "wandb"), 0):
        tracker.close()


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_a_run_that_its_tracker_has_deleted_may_get_another_id(name, tmp_path, monkeypatch):
    """W&B lets none begin with the id of a deleted one (wandb/wandb, issue 1192)."""

    def init(**settings):
        raise RuntimeError("run was previously created and deleted; try a new run name")

    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(init=init))
    advice = rf", or where it lets no run of this id go on, write another one into {re.escape(str(tmp_path))}/trackers"
    with pytest.raises(MendableError) as first:
        make_trackers(run_of(tmp_path, name), 0)
    assert not re.search(advice, str(first.value)), "a run that has just begun"
    with pytest.raises(MendableError, match=advice):
        make_trackers(run_of(tmp_path, name), 0)
