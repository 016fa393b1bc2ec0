"""The command ``train --plan``: tables, JSON, and what it says of runs that do not fit."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from stellarbyte_jax.cli import plan
from stellarbyte_jax.cli.train import main
from stellarbyte_jax.config import load
from stellarbyte_jax.training import plan_search
from stellarbyte_jax.training.plan import Planner
from stellarbyte_jax.training.plan_devices import KINDS
from stellarbyte_jax.training.plan_search import advice, search

PRETRAIN = str(Path(__file__).parents[2] / "configs" / "pretrain.py")
H100 = KINDS["H100"]
LARGE = (
    "model.hidden_size=8192 model.num_hidden_layers=80 model.num_attention_heads=64 model.num_key_value_heads=8 "
    "model.intermediate_size=28672 global_batch_size=64 model.vocab_size=128256 data.sequence_length=2048"
).split()


@pytest.fixture(autouse=True)
def eight_devices(monkeypatch):
    monkeypatch.setattr(plan, "devices", jax.devices)


def test_the_command_starts_and_reads_nothing(tmp_path, capsys):
    run, data = tmp_path / "run", tmp_path / "nowhere"
    settings = [f"output_dir={run}", f"data.train={data}/*.jsonl", f"data.tokenizer={data}"]
    assert main(["--config", PRETRAIN, "--plan", "--devices", "8", "--set", *settings]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("plan for 8 x H100: 162,417,408 parameters; nothing is started\n")
    assert "data=8" in printed and "suggested: --set mesh." in printed and "all-reduce" in printed
    assert list(tmp_path.iterdir()) == []


def test_json_of_a_plan(capsys):
    arguments = ["--plan", "--devices", "64", "--device-kind", "h200", "--json", "--set", "global_batch_size=128"]
    assert main(["--config", "pretrain_moe", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"device", "parameters", "plan", "suggestion", "assumptions"}
    assert found["device"]["name"] == "H200" and found["parameters"]["active"] < found["parameters"]["total"]
    facts = found["plan"].keys()
    assert facts == {
        "devices",
        "mesh",
        "gradient_accumulation_steps",
        "remat",
        "rows_per_device",
        "bytes_per_device",
        "fits",
        "flops_per_step",
        "collectives",
        "seconds",
        "tokens_per_second",
        "mfu",
    }
    assert found["suggestion"].keys() == {*facts, "set"} and found["suggestion"]["devices"] == 64
    held = found["plan"]["bytes_per_device"]
    assert held.pop("total") == sum(held.values())
    assert found["plan"]["mesh"] == {"data": 64, "fsdp": 1, "expert": 1, "context": 1, "tensor": 1}


def last_error(capsys):
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    return printed.err


def test_a_run_that_does_not_fit_is_told_in_one_line(monkeypatch, capsys):
    assert main(["--config", PRETRAIN, "--plan", "--devices", "64", "--set", *LARGE]) == 1
    error = last_error(capsys)
    assert error.startswith("error: this run takes 1.07 TiB") and "--set mesh.data=2 mesh.fsdp=" in error
    found = {}

    def kept(planner, devices):
        found[devices] = search(planner, devices)
        return found[devices]

    monkeypatch.setattr(plan_search, "search", kept)
    assert main(["--config", PRETRAIN, "--plan", "--devices", "2", "--set", *LARGE]) == 1
    error = last_error(capsys)
    assert "no mesh, accumulation and remat of 2 x H100 fits: the least is" in error
    enough = int(re.search(r"--devices (\d+) would do", error)[1])
    assert found[enough].best is not None and found[enough // 2].best is None


def test_meshes_that_divide_nothing_are_told_in_one_line(capsys):
    assert main(["--config", PRETRAIN, "--plan", "--devices", "64"]) == 2
    error = last_error(capsys)
    assert "global_batch_size=32 does not divide by 64: set a multiple of 64; of 64 devices, --set mesh.data=" in error
    assert main(["--config", PRETRAIN, "--plan", "--devices", "5000"]) == 2
    assert "--devices 5000: a plan is for at most 4096" in last_error(capsys)
    planner = Planner(load(PRETRAIN), H100)
    told = advice(planner, 7, search(planner, 7))
    assert "no mesh of 7 devices divides global_batch_size=32" in told and "; of 7 devices, 4 with --set mesh." in told


@pytest.mark.parametrize(
    ("devices", "words", "used"),
    [(7, [], 4), (12, ["mesh.tensor=3"], 8), (1000, [], 512), (4093, [], 2048), (9, ["global_batch_size=3"], 8)],
)
def test_a_refusal_names_a_mesh_of_fewer_devices_that_would_do(devices, words, used, capsys):
    """The largest number of them; and what it names is accepted."""
    assert main(["--config", "quickstart", "--plan", "--devices", str(devices), "--set", "steps=200", *words]) == 2
    error = last_error(capsys)
    named = re.search(rf"; of {devices} devices, {used} with --set (.*) would do\n", error)
    assert named is not None, error
    again = [*words, *named[1].split()]
    assert main(["--config", "quickstart", "--plan", "--devices", str(devices), "--set", *again]) == 0
    assert capsys.readouterr().out.startswith(f"plan for {used} of {devices} x H100")
    planner = Planner(load("quickstart", words), H100)
    counts = range(max(used + 1, devices - 40), devices + 1)
    assert all(search(planner, count).best is None for count in counts), "no filter hides a larger one"


def test_a_refusal_names_more_devices_where_fewer_do_not_hold_the_run(capsys):
    assert main(["--config", PRETRAIN, "--plan", "--devices", "31", "--set", *LARGE]) == 2
    error = last_error(capsys)
    assert re.search(r"; --devices 32 with --set mesh\..* would do\n", error), error


def test_a_refusal_without_a_way_out_is_told_alone(capsys):
    assert main(["--config", PRETRAIN, "--plan", "--devices", "3", "--set", *LARGE]) == 2
    error = last_error(capsys)
    assert "would do" not in error and error.endswith("set a multiple of 3\n"), error


def test_devices_are_those_of_the_mesh_or_those_there(capsys):
    assert main(["--config", PRETRAIN, "--plan", "--set", "mesh.data=2", "mesh.fsdp=16"]) == 0
    assert capsys.readouterr().out.startswith("plan for 32 x H100")
    assert main(["--config", PRETRAIN, "--plan"]) == 0
    assert capsys.readouterr().out.startswith("plan for 8 x H100")


@pytest.mark.parametrize(("kind", "code"), [("NVIDIA A100-SXM4-80GB", 0), ("NVIDIA L40S", 2)])
def test_the_kind_is_the_one_that_is_there(kind, code, monkeypatch, capsys):
    monkeypatch.setattr(plan, "devices", lambda: [SimpleNamespace(platform="gpu", device_kind=kind)])
    assert main(["--config", PRETRAIN, "--plan"]) == code
    printed = capsys.readouterr()
    assert "plan for 1 x A100" in printed.out or "--device-kind NVIDIA L40S is not known" in printed.err


def test_more_than_jax_takes_by_itself_is_told(capsys):
    assert main(["--config", PRETRAIN, "--plan", "--devices", "1", "--set", "global_batch_size=160"]) == 0
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION=0.92" in capsys.readouterr().out
    assert main(["--config", PRETRAIN, "--plan", "--devices", "1"]) == 0
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" not in capsys.readouterr().out


@pytest.mark.parametrize("option", [["--devices", "8"], ["--device-kind", "H100"], ["--json"]])
def test_options_of_a_plan_belong_to_it(option, capsys):
    with pytest.raises(SystemExit):
        main(["--config", PRETRAIN, *option])
    assert f"{option[0]} belongs to --plan" in capsys.readouterr().err
