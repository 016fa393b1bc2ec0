"""Where metrics go: the file that a resume mends, and packages that are not here, played by modules of the test."""

import json
import sys
import types
from types import ModuleType

import pytest
from helpers.training import settings

from stellarbyte_jax.command import MendableError
from stellarbyte_jax.config import LoggingConfig
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
        for attribute in ("log", "finish", "add_scalar", "add_text", "close"):
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


def test_wandb_continues_the_run_named_after_the_directory(tmp_path, played):
    calls = played("wandb", "init")
    config = run_of(tmp_path / "small", "wandb")
    (tmp_path / "small").mkdir()
    file, tracker = make_trackers(config, 7)
    tracker.log(8, {"loss": 2.5, "accuracy": 0.5})
    tracker.samples(8, [("a", "b"), ("c", "d")])
    tracker.close()
    (_, positional, named), *others = calls
    assert positional == () and named == {
        "project": "stellarbyte",
        "name": "small",
        "id": "small",
        "resume": "allow",
        "dir": str(tmp_path / "small"),
        "config": config.to_dict(),
    }
    assert others == [
        ("log", ({"loss": 2.5, "accuracy": 0.5},), {"step": 8}),
        ("log", ({"samples": ("table", ["prompt", "text"], [["a", "b"], ["c", "d"]])},), {"step": 8}),
        ("finish", (), {}),
    ]
    file.close()


def test_swanlab_has_an_experiment_named_after_the_directory(tmp_path, played):
    calls = played("swanlab", "init")
    config = run_of(tmp_path / "small", "swanlab")
    (tmp_path / "small").mkdir()
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
    }
    assert others == [
        ("log", ({"loss": 2.5},), {"step": 8}),
        ("log", ({"samples": [("text", "b", "a"), ("text", "d", "c")]},), {"step": 8}),
        ("finish", (), {}),
    ]
    file.close()


def test_trackers_come_in_the_order_of_their_names(tmp_path, played):
    for name, made in (("wandb", "init"), ("swanlab", "init"), ("tensorboardX", "SummaryWriter")):
        played(name, made)
    trackers = make_trackers(run_of(tmp_path, "swanlab", "tensorboard", "wandb"), 0)
    assert [type(t).__name__ for t in trackers] == [
        "JsonlTracker",
        "SwanLabTracker",
        "TensorBoardTracker",
        "WandbTracker",
    ]
    trackers[0].close()


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


@pytest.mark.parametrize("kind", ["UsageError", "CommError"])
def test_a_tracker_without_a_login_is_one_line_with_a_way_out(tmp_path, monkeypatch, kind):
    def init(**settings):
        raise type(kind, (Exception,), {})("No API key configured.\nUse `wandb login` to log in.")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    closed = []
    close = JsonlTracker.close
    monkeypatch.setattr(JsonlTracker, "close", lambda self: closed.append(self) or close(self))
    with pytest.raises(MendableError) as caught:
        make_trackers(run_of(tmp_path, "wandb"), 0)
    assert str(caught.value) == (
        f"logging.trackers names 'wandb', which could not begin ({kind}: No API key configured. Use `wandb login` to "
        "log in.): log in with `wandb login`, or set WANDB_MODE=offline"
    )
    assert len(closed) == 1
