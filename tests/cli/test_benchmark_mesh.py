"""The command benchmark mesh: which parts a row has, how they are compared, and that it runs on devices of a CPU."""

import json
import math
import types
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.grids import REPEATS
from helpers.training import settings

from stellarbyte_jax.cli import benchmark, mesh_speed, torch_peers, workers
from stellarbyte_jax.cli.program import load_settings
from stellarbyte_jax.config.mesh import check_mesh
from stellarbyte_jax.inspect.costs import parameter_counts
from stellarbyte_jax.model.decoder import ByteTransformer

RATES = {"single": 1000, "all": 1900, "peer": 950}


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with so many devices, whose measurements are made up; returns which ones were made."""
    monkeypatch.chdir(tmp_path)
    made = []

    def make(devices=2, platform="gpu", fails=(), torch=True):
        def run(name, options, processes=1):
            if name == "device":
                return {"platform": platform, "devices": devices}
            made.append((name, options, processes))
            config = load_settings(options.config, options.set)
            used = math.prod(config.mesh.sizes(devices).values())
            if (error := next((error for text, error in fails if text in (name, *options.set)), None)) is not None:
                return {"error": error}
            part = "peer" if name.startswith("huggingface") else "single" if used == 1 else "all"
            more = {"mfu": 0.5} if platform == "gpu" and part != "peer" else {}
            return {"tokens_per_second": RATES[part], **more, **({"devices": used} if used > 1 else {})}

        monkeypatch.setattr(benchmark, "_run_worker", run)
        monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: object() if torch else None)
        return made

    return make


def report(file="out.json"):
    return json.loads(Path(file).read_text())


def test_a_row_is_one_device_all_of_them_and_the_peer(machine, capsys):
    made = machine()
    assert benchmark.main("mesh --only fsdp --output out.json".split()) == 0
    assert [(name, processes) for name, _, processes in made] == [
        ("synthetic", 1),
        ("synthetic", 1),
        ("huggingface_fsdp2", 2),
    ]
    single, on_all, peer = (load_settings(options.config, options.set) for _, options, _ in made)
    assert (single.mesh.sizes(2)["data"], single.mesh.sizes(2)["fsdp"], single.global_batch_size) == (1, 1, 8)
    assert (on_all.mesh.sizes(2)["data"], on_all.mesh.sizes(2)["fsdp"], on_all.global_batch_size) == (1, 2, 16)
    assert peer == on_all and all(options.steps == 5 for _, options, _ in made)
    row = report()["results"]["fsdp"]
    assert row["speedup"] == 1.9 and row["target"] == 1.92 and row["times_the_peer"] == 2.0 and row["mfu"] == 0.5
    assert (row["tokens_per_second"], row["tokens_per_second_per_device"], row["mesh"]) == (1900, 950, {"fsdp": 2})
    assert row["single"]["tokens_per_second"] == 1000 and row["settings"] == made[1][1].set
    assert row["peer"]["tokens_per_second_per_device"] == 475 and row["peer"]["mfu"] == 0.25
    assert "speedup 1.9" in capsys.readouterr().out


@pytest.mark.parametrize(("typed", "steps"), [("", 20), ("--steps 3", 3)])
def test_short_steps_are_measured_more_often(machine, typed, steps):
    made = machine()
    assert benchmark.main(f"mesh --only data {typed} --output out.json".split()) == 0
    assert [options.steps for _, options, _ in made] == [steps] * 3


@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize("small", [False, True])
def test_every_row_can_be_made(small, devices):
    """The mesh divides what it cuts, and each device with rows of its own has as many as a single one."""
    axes = set()
    for name in mesh_speed.NAMES:
        if mesh_speed.least_devices(name) > devices:
            continue
        for row in mesh_speed.rows(name, small).values():
            config = load_settings(row.config, row.typed(devices))
            sizes = config.mesh.sizes(devices)
            assert {axis: size for axis, size in sizes.items() if size > 1} == row.sizes(devices), name
            assert math.prod(sizes.values()) == devices and all(row.sizes(devices)[axis] == 2 for axis in row.axes[1:])
            rows, parts = config.global_batch_size, config.gradient_accumulation_steps
            check_mesh(sizes, config.model, rows, parts, config.data.sequence_length)
            alone = load_settings(row.config, row.typed(1))
            assert math.prod(alone.mesh.sizes(devices).values()) == 1
            assert rows == alone.global_batch_size * sizes["data"] * sizes["fsdp"] * sizes["expert"]
            axes |= set(row.axes)
    assert axes == {"data", "fsdp", "expert", "context", "tensor"}


def test_rows_of_larger_machines_are_left_out_and_refused_where_they_are_asked_for(machine, capsys):
    made = machine()
    assert benchmark.main("mesh --no-peer --output out.json".split()) == 0
    assert set(report()["results"]) == {"fsdp", "data", "tensor", "expert", "context", "large"}
    assert "llama          is for 4 devices or more, and left out" in capsys.readouterr().out
    made.clear()
    assert benchmark.main("mesh --only tensor_fsdp".split()) == 1 and not made
    assert "--only tensor_fsdp: that row is for 4 devices or more, and JAX finds 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "model", "billions"),
    [
        ("fsdp", "1.10B", 1.104),
        ("tensor", "1.10B", 1.104),
        ("tensor_fsdp", "1.10B", 1.104),
        ("data", "162M", 0.162),
        ("context", "355M", 0.355),
        ("context_fsdp", "355M", 0.355),
        ("large", "6.74B", 6.738),
        ("large", "3.01B", 3.015),
        ("llama", "8.03B", 8.030),
        ("large_expert", "30.5B, 3.4B active", 30.532),
        ("large_expert", "23.1B, 2.7B active", 23.055),
        ("large_expert_fsdp", "15.6B, 2.0B active", 15.577),
        ("large_expert_fsdp", "8.1B, 1.3B active", 8.100),
    ],
)
def test_models_have_the_size_that_they_are_named_by(name, model, billions):
    row = mesh_speed.ROWS[name][model]
    counts = parameter_counts(ByteTransformer(load_settings(row.config, row.typed(4)).model))
    assert counts.total / 1e9 == pytest.approx(billions, abs=5e-4)
    if "active" in model:
        assert f"{counts.active / 1e9:.1f}B active" == model.split(", ")[1]


@pytest.mark.parametrize("fails", [None, "model.remat=full"])
def test_the_peer_is_measured_in_each_way_and_the_fastest_counts(fails, machine):
    """With layers computed again, and without."""
    made = machine(devices=4, fails=[(fails, "exit code 1")] if fails else [])
    assert benchmark.main("mesh --only llama --output out.json".split()) == 0
    row = report()["results"]["llama"]
    peers = [options.set for name, options, _ in made if name == "huggingface_fsdp2"]
    assert len(peers) == 2 and "model.remat=full" in peers[1] and "model.remat=full" not in peers[0]
    assert (
        "single" not in row and row["model"] == "8.03B" and row["mesh"] == {"fsdp": 4} and "changes" not in row["peer"]
    )
    (other,) = row["peer"]["others"]
    assert other["changes"] == ["model.remat=full"] and other.get("error") == ("exit code 1" if fails else None)


def test_a_part_that_fails_leaves_the_others(machine, capsys):
    machine(fails=[("global_batch_size=8", "exit code 1"), ("huggingface_ddp", "killed after 9 s (--limit)")])
    assert benchmark.main("mesh --only fsdp --only data --output out.json".split()) == 1
    assert not Path("out.json").exists()
    results = report("out.json.part")["results"]
    assert results["fsdp"]["single"]["error"] == "exit code 1" and "speedup" not in results["fsdp"]
    assert results["fsdp"]["times_the_peer"] == 2.0 and results["data"]["speedup"] == 1.9
    assert results["data"]["peer"] == {"error": "killed after 9 s (--limit)"}
    assert "out.json is as it was: a measurement failed" in capsys.readouterr().err


def test_a_row_is_kept_part_after_part(machine, monkeypatch):
    machine()
    run, kept = benchmark._run_worker, []

    def seen(name, options, processes=1):
        part = Path("out.json.part")
        kept.append(report(part)["results"]["fsdp"].keys() & {"single", "speedup", "peer"} if part.exists() else None)
        if name == "huggingface_fsdp2":
            raise KeyboardInterrupt
        return run(name, options, processes)

    monkeypatch.setattr(benchmark, "_run_worker", seen)
    assert benchmark.main("mesh --only fsdp --output out.json".split()) == 130
    assert kept == [None, None, {"single"}, {"single", "speedup"}]
    assert report("out.json.part")["results"]["fsdp"]["speedup"] == 1.9


@pytest.mark.parametrize("error", ["out of memory", "exit code 1"])
def test_the_largest_model_that_fits_is_measured(error, machine, capsys):
    made = machine(fails=[("model.hidden_size=4096", error)])
    assert benchmark.main("mesh --only large --output out.json".split()) == 0
    row = report()["results"]["large"]
    assert row["model"] == "3.01B" and row["failed"] == {"6.74B": error, "6.74B, a row a device": error}
    assert len(made) == 3 and "single" not in row and row["tokens_per_second_per_device"] == 950
    words = "does not fit" if error == "out of memory" else "could not be measured"
    assert f"6.74B {words}: {error}" in capsys.readouterr().out


def test_where_none_fits_the_row_is_an_error(machine):
    machine(fails=[("mesh.fsdp=2", "out of memory")])
    assert benchmark.main("mesh --only large --output out.json".split()) == 1
    row = report("out.json.part")["results"]["large"]
    assert row["error"].startswith("none of 6.74B, ") and len(row["failed"]) == 4


def test_targets_are_those_of_two_gpus(machine):
    machine(devices=4)
    assert benchmark.main("mesh --only tensor --output out.json".split()) == 0
    row = report()["results"]["tensor"]
    assert row["speedup"] == 1.9 and "target" not in row and row["mesh"] == {"tensor": 4}


def test_nothing_is_aimed_at_on_devices_of_a_cpu(machine):
    machine(platform="cpu")
    assert benchmark.main("mesh --only fsdp --no-peer --output out.json".split()) == 0
    row = report()["results"]["fsdp"]
    assert (row["model"], row["speedup"]) == ("tiny", 1.9) and "target" not in row


@pytest.mark.parametrize(("options", "torch"), [("--no-peer", True), ("", False)])
def test_peers_may_be_left_out(options, torch, machine, capsys):
    made = machine(torch=torch)
    assert benchmark.main(f"mesh --only fsdp --only data {options} --output out.json".split()) == 0
    assert {name for name, *_ in made} == {"synthetic"} and "peer" not in report()["results"]["data"]
    assert ("no peer: torch is not installed" in capsys.readouterr().out) == (not torch)


def test_one_gpu_is_too_few(machine, capsys):
    made = machine(devices=1)
    assert benchmark.main(["mesh"]) == 1
    assert "needs at least two GPUs" in capsys.readouterr().err and not made


def test_settings_are_checked_before_any_measurement_and_change_every_part(machine, capsys):
    made = machine()
    assert benchmark.main("mesh --set model.hiden_size=3".split()) == 2
    assert "did you mean" in capsys.readouterr().err and not made and not Path("benchmarks").exists()
    assert benchmark.main("mesh --only context --set model.max_position_embeddings=2048".split()) == 2
    assert "data.sequence_length 32768 is longer" in capsys.readouterr().err and not made, "that of the row"
    assert benchmark.main("mesh --only fsdp --set model.remat=full --output out.json".split()) == 0
    assert [options.set[-1] for _, options, _ in made] == 3 * ["model.remat=full"]
    assert report()["config"]["set"] == ["model.remat=full"]


def test_profiles_lie_apart_and_peers_have_none(machine):
    made = machine()
    assert benchmark.main("mesh --only fsdp --profile traces --output out.json".split()) == 0
    assert [options.profile for _, options, _ in made] == [Path("traces/fsdp_single"), Path("traces/fsdp"), None]


def test_the_machine_is_asked_without_limit_and_measures_with_more_memory(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    asked = []

    def run(words, **options):
        asked.append((words[2], options))
        return {"platform": "gpu", "devices": 2}

    monkeypatch.setattr(benchmark, "run_worker", run)
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "4")
    assert benchmark.main("mesh --only tensor --limit 7 --output out.json".split()) == 0
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"}
    limits = [(name, options["limit"]) for name, options in asked]
    assert limits == [("device", None), ("synthetic", 7), ("synthetic", 7)]
    assert all(options["environment"] == environment for _, options in asked)
    assert report()["environment"] | environment | {"JAX_NUM_CPU_DEVICES": "4"} == report()["environment"]


TINY = "--steps 1 --set model.vocab_size=64 model.hidden_size=16 model.intermediate_size=32 data.sequence_length=16"


@pytest.mark.parametrize(
    ("row", "peer"),
    [
        pytest.param("fsdp", True, marks=pytest.mark.slow),  # the peer starts torch in two processes
        pytest.param("data", True, marks=REPEATS),
        ("context", False),
    ],
)
def test_rows_run_on_two_devices_of_a_cpu(row, peer, monkeypatch, tmp_path, capfd):
    monkeypatch.chdir(tmp_path)
    if peer:
        pytest.importorskip("torch", reason="the peer is transformers on torch: pip install -e '.[torch]'")
    typed = f"mesh --only {row} --output out.json --profile traces {TINY}"
    assert benchmark.main(typed.split()) == 0, capfd.readouterr().err
    found = report()
    result = found["results"][row]
    assert 0 < result["lowest"] <= result["tokens_per_second"] and result["devices"] == 2 and result["mesh"] == {row: 2}
    assert result["single"]["devices"] == 1 and result["compile_seconds"] > 0
    assert result["speedup"] == round(result["tokens_per_second"] / result["single"]["tokens_per_second"], 3)
    assert found["environment"]["JAX_NUM_CPU_DEVICES"] == "2"
    assert len(list(Path(f"traces/{row}").rglob("*.xplane.pb"))) == 1
    assert list(Path(f"traces/{row}_single").rglob("*.xplane.pb")) and "collectives" not in result
    if row == "context":  # the same batch
        assert result["loss"] == pytest.approx(result["single"]["loss"], rel=1e-5)
    if peer:
        assert result["peer"]["devices"] == 2 and 0 < result["peer"]["loss"] < 10
        assert result["peer"]["weights"] == "float32"
    printed = capfd.readouterr()
    assert "figures say nothing of speed" in printed.out
    assert printed.err.count("5 steps to warm up") == 2 and printed.err.count("10 steps to warm up") == peer


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")  # of torch
@pytest.mark.parametrize(
    ("name", "remat"), [("huggingface_ddp", "none"), ("huggingface_fsdp2", "none"), ("huggingface_fsdp2", "full")]
)
def test_a_peer_is_measured_in_its_group(name, remat, monkeypatch):
    """Of one process here; each takes its part of the rows, and the rate is that of all."""
    torch = pytest.importorskip("torch", reason="the peer is transformers on torch: pip install -e '.[torch]'")
    pytest.importorskip("transformers")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for variables in workers.ranks(1):
        for variable, value in variables.items():
            monkeypatch.setenv(variable, value)
    counted = []
    monkeypatch.setattr(
        torch_peers, "timed", lambda run, tokens, steps: counted.append((tokens, steps)) or {"tokens_per_second": 5}
    )
    again, checkpoint = [], torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.torch_utils_checkpoint",
        lambda *args, **more: again.append(1) or checkpoint(*args, **more),
    )
    config = settings()
    config = replace(config, model=replace(config.model, remat=remat))
    result = torch_peers.WORKERS[name](config, 3)
    assert counted == [(4 * 16, 3)] and 0 < result["loss"] < 10 and result["weights"] == "float32"
    assert bool(again) == (remat == "full"), "layers are computed again"
    assert not torch.distributed.is_initialized()


def test_each_process_of_a_peer_takes_its_rows(monkeypatch):
    torch = pytest.importorskip("torch", reason="the peer is transformers on torch: pip install -e '.[torch]'")
    shapes = []

    class Model(torch.nn.Linear):
        def forward(self, input_ids, labels):
            shapes.append(tuple(input_ids.shape))
            return types.SimpleNamespace(loss=super().forward(torch.ones(1, 1)).sum())

    counted = []
    monkeypatch.setattr(torch_peers, "timed", lambda run, tokens, steps: counted.append(tokens) or {})
    result = torch_peers.measure_peer(settings(), 1, Model(1, 1), torch.device("cpu"), False, 2)
    assert set(shapes) == {(2, 16)} and counted == [4 * 16] and result["devices"] == 2
