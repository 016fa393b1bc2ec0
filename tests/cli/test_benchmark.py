"""The command benchmark: what is measured where, and that a failure replaces no figures."""

import dataclasses
import json
import subprocess
import types
from pathlib import Path

import huggingface_hub
import jax
import pytest
from helpers.tiny_documents import save_byte_tokenizer
from helpers.training import MODEL, settings

import stellarbyte_jax
from stellarbyte_jax.checkpoint import store
from stellarbyte_jax.cli import benchmark, generation_speed, measurements, moe_speed, program
from stellarbyte_jax.cli import machine as facts
from stellarbyte_jax.cli.benchmark import WORKERS
from stellarbyte_jax.cli.benchmark_parser import parse
from stellarbyte_jax.command import MendableError
from stellarbyte_jax.config import DataConfig, MoEConfig, load
from stellarbyte_jax.data import loader
from stellarbyte_jax.inspect.costs import flops_per_token, parameter_counts
from stellarbyte_jax.model.decoder import ByteTransformer
from stellarbyte_jax.training import metrics, state, step


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with or without a GPU, whose measurements are made up; returns what was measured."""
    monkeypatch.chdir(tmp_path)
    measured = []

    def make(platform, fails=()):
        def run(name, options):
            if name == "device":
                return {"platform": platform, "devices": 1}
            measured.append((name, options.config))
            return {"error": "exit code 1"} if name in fails else {"tokens_per_second": 5}

        monkeypatch.setattr(benchmark, "_run_worker", run)
        return measured

    return make


TRAIN = ["synthetic", "real", "huggingface", "huggingface_bfloat16", "huggingface_liger"]


@pytest.fixture
def torch(monkeypatch):
    def make(installed):
        monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: object() if installed else None)

    make(True)
    return make


@pytest.mark.parametrize(
    ("platform", "config", "written", "generation"),
    [
        (
            "gpu",
            "pretrain",
            "train.json",
            [
                *("batch_1", "batch_8", "batch_32", "batch_128", "apart_batch_1", "apart_batch_32"),
                *("kernel_batch_1", "kernel_batch_32", "experts_batch_1", "experts_batch_32"),
            ],
        ),
        ("cpu", "quickstart", "train-cpu.json", ["small_batch_1", "small_batch_8", "small_experts"]),
    ],
)
def test_a_machine_gets_the_size_that_fits(platform, config, written, generation, machine, torch, tmp_path, capsys):
    measured = machine(platform)
    assert benchmark.main(["train"]) == 0
    assert measured == [(name, config) for name in (TRAIN if platform == "gpu" else TRAIN[:-1])]
    report = json.loads((tmp_path / "benchmarks" / written).read_text())
    assert report["results"]["real"] == {"tokens_per_second": 5} and report["config"]["file"] == config
    assert ("no GPU" in capsys.readouterr().out) == (platform == "cpu")
    measured.clear()
    assert benchmark.main(["generate", "--output", "out/x.json"]) == 0
    assert [name for name, _ in measured] == generation and (tmp_path / "out" / "x.json").is_file()
    measured.clear()
    assert benchmark.main(["train", "--config", "stellarbyte", "--only", "real"]) == 0
    assert measured == [("real", "stellarbyte")]
    measured.clear()
    assert benchmark.main(["generate", "--only", "batch_8"]) == 0
    assert measured == [("batch_8", config)]


def test_data_needs_no_device(machine, torch, tmp_path, capsys):
    measured = machine("cpu")
    assert benchmark.main(["data"]) == 0
    assert measured == [("jsonl", "pretrain"), ("shards", "pretrain")]
    assert (tmp_path / "benchmarks" / "data.json").is_file() and "no GPU" not in capsys.readouterr().out


@pytest.fixture
def figures(tmp_path):
    """The file of figures that is there already."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "train.json").write_text("figures")
    return tmp_path / "benchmarks" / "train.json"


def in_part(figures):
    report = json.loads(figures.with_name("train.json.part").read_text())
    assert report["incomplete"] is True
    return report["results"]


def test_a_failure_replaces_no_figures(machine, torch, figures, capsys):
    machine("gpu", fails=["real"])
    assert benchmark.main(["train"]) == 1
    printed = capsys.readouterr()
    assert figures.read_text() == "figures" and "train.json is as it was: a measurement failed" in printed.err
    assert "synthetic" in printed.out and "exit code 1" in printed.out
    fast = {"tokens_per_second": 5}
    assert in_part(figures) == {**dict.fromkeys(TRAIN, fast), "real": {"error": "exit code 1"}}


def test_what_was_measured_is_kept_as_it_comes(machine, torch, figures, monkeypatch):
    machine("gpu")
    run, seen = benchmark._run_worker, []

    def killed_in_the_end(name, options):
        seen.append(sorted(in_part(figures)) if figures.with_name("train.json.part").exists() else None)
        if name == "huggingface":
            raise KeyboardInterrupt
        return run(name, options)

    monkeypatch.setattr(benchmark, "_run_worker", killed_in_the_end)
    assert benchmark.main(["train"]) == 130
    assert seen == [None, None, ["synthetic"], ["real", "synthetic"]], "before the device is asked, and before each"
    assert sorted(in_part(figures)) == ["real", "synthetic"] and figures.read_text() == "figures"
    monkeypatch.setattr(benchmark, "_run_worker", run)
    assert benchmark.main(["train"]) == 0
    report = json.loads(figures.read_text())
    assert list(report["results"]) == TRAIN and "incomplete" not in report
    assert [path.name for path in figures.parent.iterdir()] == ["train.json"]


def test_some_figures_do_not_replace_all_of_them(machine, torch, figures, capsys):
    measured = machine("gpu")
    assert benchmark.main(["train", "--only", "real", "--only", "synthetic", "--only", "real"]) == 0
    assert measured == [("real", "pretrain"), ("synthetic", "pretrain")]
    assert figures.read_text() == "figures" and sorted(in_part(figures)) == ["real", "synthetic"]
    assert "--output FILE writes them" in capsys.readouterr().err
    assert benchmark.main(["train", "--only", "real", "--output", "some.json"]) == 0
    assert list(json.loads(Path("some.json").read_text())["results"]) == ["real"]


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("train --only batch_8", "--only batch_8: benchmark train measures synthetic, real, huggingface"),
        ("mesh --only real", "benchmark mesh measures fsdp, data, tensor, expert, context, large"),
        ("generate --profile x", "--profile is of training"),
        ("mesh --config quickstart", "a model for each row: leave --config out"),
        ("mesh --set mesh.tensor=2", "--set mesh.tensor=2: each row"),
        ("mesh --set global_batch_size=2", "--set global_batch_size=2: each row"),
    ],
)
def test_options_that_do_not_go_together_are_refused(typed, message, machine, capsys):
    measured = machine("gpu")
    assert benchmark.main(typed.split()) == 2
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 1 and message in printed[0] and not measured


def test_what_measures_steps_of_training_and_how_many():
    for what in ("train", "moe", "mesh", "lora"):
        options = parse([what, "--profile", "x"])
        steps = None if what == "mesh" else 20  # rows of mesh have their own
        assert (str(options.profile), options.steps) == ("x", steps)
    assert parse(["grouped_matmul"]).steps is None and parse(["moe_layer", "--steps", "3"]).steps == 3


def test_a_report_names_the_machine(machine, torch, monkeypatch, tmp_path):
    machine("gpu")
    asked = []

    def played(words, **_):
        asked.append(words[0])
        return subprocess.CompletedProcess(words, 0, "NVIDIA H100 80GB HBM3, 570.1\nNVIDIA H100 80GB HBM3, 570.1\n")

    monkeypatch.setattr(facts.subprocess, "run", played)
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    assert benchmark.main(["train"]) == 0
    report = json.loads((tmp_path / "benchmarks" / "train.json").read_text())
    assert asked == ["nvidia-smi"] and report["gpus"] == 2 * ["NVIDIA H100 80GB HBM3"] and report["driver"] == "570.1"
    assert report["environment"]["NCCL_ALGO"] == "Ring" and report["versions"]["jax"] == jax.__version__
    assert "6 L T D" in report["flops"]


def test_a_machine_without_its_tool_has_no_gpus(monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(facts.subprocess, "run", missing)
    assert not {"gpus", "driver"} & facts.facts({}).keys()
    assert facts.facts({"NCCL_ALGO": "Tree"})["environment"]["NCCL_ALGO"] == "Tree"


def test_a_device_that_is_too_small_is_a_result(monkeypatch, capsys):
    def full(config, steps):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 99 bytes")

    monkeypatch.setitem(benchmark.WORKERS, "synthetic", full)
    assert benchmark.main(["train", "--worker", "synthetic", "--config", "quickstart"]) == 0
    printed = capsys.readouterr()
    assert printed.out == 'RESULT {"error": "out of memory"}\n' and "allocate 99 bytes" in printed.err


def test_without_torch_there_is_no_peer_and_a_line(machine, torch, capsys):
    measured = machine("gpu")
    torch(False)
    assert benchmark.main(["train"]) == 0
    assert [name for name, _ in measured] == ["synthetic", "real"]
    assert "no peer: torch is not installed" in capsys.readouterr().out
    assert benchmark.main(["train", "--no-peer"]) == 0 and "torch" not in capsys.readouterr().out
    torch(True)
    measured.clear()
    assert benchmark.main(["train", "--no-peer"]) == 0
    assert [name for name, _ in measured] == ["synthetic", "real"]


def test_evaluation_has_a_peer_too(machine, torch, tmp_path):
    measured = machine("cpu")
    assert benchmark.main(["eval"]) == 0 and (tmp_path / "benchmarks" / "eval-cpu.json").is_file()
    assert measured == [("eval", "quickstart"), ("eval_huggingface", "quickstart")]
    measured.clear()
    assert benchmark.main(["eval", "--no-peer"]) == 0
    assert measured == [("eval", "quickstart")]


def with_experts(**moe):
    moe = {"num_experts": 5, "num_experts_per_tok": 3, "intermediate_size": 24, "norm_topk_prob": False, **moe}
    return settings(model=dataclasses.replace(MODEL, num_hidden_layers=3, hidden_act="gelu", moe=moe))


def test_experts_are_measured_with_each_dispatch(monkeypatch):
    monkeypatch.setattr(moe_speed, "synthetic", lambda config, steps, profile: (config.model.moe, steps))
    moe = with_experts().model.moe
    for name in ("dropless", "capacity"):
        assert moe_speed.WORKERS[name](with_experts(), 7) == (dataclasses.replace(moe, dispatch=name), 7)
    for measure in moe_speed.WORKERS.values():
        with pytest.raises(MendableError, match="needs a config with experts: --config pretrain_moe"):
            measure(settings(), 7)


def test_the_peer_of_experts_has_their_shape(monkeypatch):
    """As many weights, dense layers among them, but for the norms of queries and keys, which every Qwen3 has."""
    torch = pytest.importorskip("torch", reason="the peer is one of transformers")
    pytest.importorskip("transformers")
    monkeypatch.setattr(moe_speed, "train_peer", lambda config, steps, model: {"model": model})
    config = with_experts(first_k_dense_replace=1)
    found = moe_speed.WORKERS["huggingface_moe_bfloat16"](config, 7)
    peer, counts = found.pop("model"), parameter_counts(ByteTransformer(config.model))
    assert found == {"experts": "eager", "weights": "bfloat16"} and peer.dtype == torch.bfloat16
    assert sum(weight.numel() for weight in peer.parameters()) == counts.total + 3 * 2 * config.model.head_size
    assert (peer.config.num_experts_per_tok, peer.config.norm_topk_prob, peer.config.hidden_act) == (3, False, "gelu")


def test_what_is_being_done_is_told_apart_from_the_results(machine, torch, tmp_path, capsys):
    measured = machine("cpu", fails=["real"])
    run = benchmark._run_worker

    def told(name, options):
        shown.append((name, capsys.readouterr()))
        return run(name, options)

    benchmark._run_worker, shown = told, []  # undone with the machine's own
    assert benchmark.main(["train"]) == 1 and len(measured) == 4
    assert [name for name, _ in shown] == ["device", *TRAIN[:-1]]
    assert [printed.err for _, printed in shown] == [
        "looking for a GPU\n",
        "measuring synthetic (1 of 4)\n",
        "measuring real (2 of 4)\n",
        "measuring huggingface (3 of 4)\n",
        "measuring huggingface_bfloat16 (4 of 4)\n",
    ], "before it begins"
    assert [printed.out.split()[:1] for _, printed in shown[2:]] == [[name] for name in TRAIN[:3]], "each as it is done"


def test_a_machine_on_which_jax_does_not_start_is_one_line(machine, monkeypatch, capsys):
    machine("gpu")
    asked = []
    failed = {"error": "exit code 1"}
    monkeypatch.setattr(benchmark, "_run_worker", lambda name, options: asked.append((name, options.set)) or failed)
    assert benchmark.main(["train", "--set", "steps=x"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: JAX could not start (exit code 1): its own message stands above"
    )
    assert asked == [("device", [])], "whatever the settings are"


def test_a_wrong_setting_is_told_before_any_measurement(machine, torch, capsys):
    measured = machine("gpu")
    assert benchmark.main(["train", "--set", "model.hiden_size=3"]) == 2
    assert not measured and "did you mean" in capsys.readouterr().err


def test_a_worker_is_a_process_of_its_own(monkeypatch, tmp_path):
    """The parent holds no device; a failure of the child is a result."""
    options = benchmark._parse(["train", "--config", "quickstart"])
    assert benchmark._run_worker("device", options) == {"platform": "cpu", "devices": 1}
    options.set = ["steps=nonsense"]
    assert benchmark._run_worker("device", options) == {"error": "exit code 2"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch
@pytest.mark.parametrize("name", ["synthetic", "huggingface"])
def test_a_step_is_measured(name, monkeypatch, capsys):
    if name == "huggingface":
        torch = pytest.importorskip("torch", reason="the peer is transformers on torch: pip install -e '.[torch]'")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = WORKERS[name](settings(), 1)
    assert result["repeats"] == 5 and 0 < result["lowest"] <= result["tokens_per_second"] <= result["highest"]
    assert "cpu" in result["on"].lower() and 0 < result["loss"] < 10
    printed = capsys.readouterr()
    first, warm, *repeats = printed.err.splitlines()
    assert printed.out == "" and "first step" in first and "to warm up" in warm
    assert [line.split(":")[0].strip() for line in repeats] == [f"repeat {n} of 5" for n in range(1, 6)]
    assert {f"{result[key]:,} tokens/s" for key in ("lowest", "highest")} <= {line.split(": ")[1] for line in repeats}


def test_the_steps_that_were_asked_for_are_measured(monkeypatch, capsys):
    typed = []

    def run(words, **options):
        typed.append(words)
        assert options == {"processes": 1, "limit": 9, "environment": {}}
        return {"a": 1}

    monkeypatch.setattr(benchmark, "run_worker", run)
    options = benchmark._parse(["train", "--steps", "3", "--limit", "9", "--config", "quickstart"])
    assert benchmark._run_worker("real", options) == {"a": 1}
    monkeypatch.setitem(benchmark.WORKERS, "real", lambda config, steps: {"steps": steps})
    assert benchmark.main(typed[0]) == 0
    assert capsys.readouterr().out == 'RESULT {"steps": 3}\n'


def test_a_rate_is_tokens_of_all_steps_over_their_time(monkeypatch):
    now = 0.0

    def run(steps):
        nonlocal now
        now += 2.0 * steps

    monkeypatch.setattr(measurements.time, "perf_counter", lambda: now)
    result = measurements.timed(run, 10, 3)
    assert (result["tokens_per_second"], result["lowest"], result["highest"]) == (5, 5, 5)
    monkeypatch.undo()
    counted = []
    monkeypatch.setattr(
        measurements, "timed", lambda run, tokens, steps: counted.append((tokens, steps)) or {"tokens_per_second": 1}
    )
    monkeypatch.setattr(metrics, "peak_flops", lambda: 1e6)
    monkeypatch.setattr(state, "create_state", lambda *_: {})
    monkeypatch.setattr(
        step, "make_train_step", lambda *_: lambda state, batch: (state, {"loss": batch["tokens"][0, 0]})
    )
    config = with_experts()
    result = WORKERS["synthetic"](config, 2)
    assert counted == [(4 * 16, 2)]  # rows and positions of a batch
    active = parameter_counts(ByteTransformer(config.model)).active
    assert result["mfu"] == round(flops_per_token(config.model, active, 16).causal / 1e6, 4)


def test_generation_is_measured_by_batch_size_and_by_the_dtype_of_the_cache(monkeypatch):
    monkeypatch.setattr(generation_speed, "_decode", lambda *sizes: sizes)
    large, small = generation_speed.GENERATE, generation_speed.CACHE
    assert WORKERS["batch_32"](settings(), 1) == (large, 32, 128, 256)
    assert WORKERS["small_batch_8"](settings(), 1) == (small, 8, 128, 64)
    for name, of, sizes in (
        ("experts_batch_32", "pretrain_moe", (32, 128, 256)),
        ("small_experts", "quickstart_moe", (2, 128, 64)),
    ):
        assert WORKERS[name](settings(), 1) == (dataclasses.replace(load(of, []).model, scan_unroll=1), *sizes)
    for dtype in ("float32", "int8"):
        model, *sizes = WORKERS[dtype](settings(), 1)
        assert sizes == [4, 512, 64] and model.cache.dtype == dtype
        assert dataclasses.replace(model, cache=small.cache) == small


@pytest.mark.parametrize(("name", "verify"), [("verified", True), ("unverified", False)])
def test_checkpoints_are_measured_with_and_without_their_checksums(name, verify, monkeypatch):
    class OpenedError(Exception):
        pass

    def opened(directory, settings):
        raise OpenedError(settings.verify)

    monkeypatch.setattr(store, "Checkpointer", opened)
    with pytest.raises(OpenedError) as found:
        WORKERS[name](settings(), 1)
    assert found.value.args == (verify,)


def test_reading_takes_as_long_as_is_told(monkeypatch, capsys):
    monkeypatch.setattr(loader, "measure_loader", lambda *_, seconds, **__: {"seconds": float(seconds)})
    assert f"reading batches for {WORKERS['jsonl'](settings(), 1)['seconds']:.0f} s\n" in capsys.readouterr().err


def test_shards_are_measured_as_such(monkeypatch, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "abc"}\n')
    data = DataConfig(
        train=(str(tmp_path / "a.jsonl"),),
        tokenizer=save_byte_tokenizer(tmp_path / "bytes"),
        sequence_length=16,
        workers=0,
        cache_dir=str(tmp_path / "cache"),
    )
    read = []

    def measure(data, **_):
        read.extend((Path(path) / "meta.json").is_file() for path in data.train)
        return {"tokens_per_second": 1234.5678, "padding": 0.123456}

    monkeypatch.setattr(loader, "measure_loader", measure)
    assert WORKERS["shards"](settings(data=data), 1) == {"tokens_per_second": 1235, "padding": 0.1235}
    assert read == [True]


def test_what_a_config_takes_over_is_measured(machine, torch, monkeypatch):
    """In the process that measures, and in the one that checks the settings first."""
    asked = []
    monkeypatch.setattr(program, "inherit", lambda source, output: asked.append(source) or {"model": {}})
    monkeypatch.setitem(benchmark.WORKERS, "synthetic", lambda config, steps: {"loss": 1.0})
    machine("gpu")
    for more in ([], ["--worker", "synthetic"]):
        assert benchmark.main(["train", "--config", "quickstart", "--set", "init_from=x", *more]) in (0, 2)
    assert asked == ["x", "x"]


def test_the_tokenizer_is_found_as_in_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: f"cache/{name}")
    used: list[str] = []
    monkeypatch.setitem(benchmark.WORKERS, "jsonl", lambda config, steps: used.append(config.data.tokenizer))
    typed = ["data", "--worker", "jsonl", "--config", "quickstart", "--set", "data.tokenizer=org/name"]
    assert benchmark.main(typed) == 0
    copy = Path(save_byte_tokenizer(tmp_path / "run" / "tokenizer"))
    recorded = settings(data=DataConfig(sequence_length=16, tokenizer="gone"))
    (tmp_path / "run" / "train_config.json").write_text(recorded.to_json())
    assert benchmark.main(["data", "--worker", "jsonl", "--config", "run/train_config.json"]) == 0
    assert used == ["cache/org/name", str(copy.relative_to(tmp_path))]


TINY = dataclasses.replace(
    generation_speed.CACHE,
    vocab_size=32,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=1,
    intermediate_size=8,
)


def test_compilation_is_no_part_of_what_generation_takes(monkeypatch):
    seconds = iter([100.0, *[2.0] * 5])

    def played(*_, **__):
        return types.SimpleNamespace(decode_seconds=next(seconds), prefill_seconds=1.0)

    asked = []
    monkeypatch.setattr(stellarbyte_jax, "generate", played)
    monkeypatch.setattr(generation_speed, "decode_floor", lambda *told: asked.append(told) or 7.4)
    result = generation_speed._decode(TINY, 2, 4, 3)
    assert (result["lowest"], result["highest"], result["with_prefill"]) == (3.0, 3.0, 2.0)
    assert result["floor"] == 7 and asked == [(TINY, 2, 4 + 1, "cpu")], "of the mean of what rows see"


def test_the_floor_of_decoding_by_hand():
    """What a step reads of a tiny network in bfloat16: weights, but of experts those chosen, keys and values."""
    D, V, F, E, K, rows, keys = 64, 100, 64, 4, 1, 2, 10
    dense = dataclasses.replace(TINY, hidden_size=D, vocab_size=V, intermediate_size=F, compute_dtype="bfloat16")
    config = dataclasses.replace(dense, moe=MoEConfig(num_experts=E, num_experts_per_tok=K, intermediate_size=F))
    weights = V * D + 3 * D + 4 * D * D + D * E + (1 - (3 / 4) ** 2) * E * 3 * D * F
    read = 2 * (weights + rows * keys * 2 * D)
    found = generation_speed.decode_floor(config, rows, keys, "NVIDIA H100 80GB HBM3")
    assert found == pytest.approx(rows * 3.35e12 / read, rel=1e-6)
    dense_read = 2 * (V * D + 3 * D + 4 * D * D + 3 * D * F + rows * keys * 2 * D)
    found = generation_speed.decode_floor(dense, rows, keys, "NVIDIA H200")
    assert found == pytest.approx(rows * 4.8e12 / dense_read, rel=1e-6)
    untied = dataclasses.replace(dense, tie_word_embeddings=False)  # rows of the table are looked up
    assert generation_speed.decode_floor(untied, rows, keys, "NVIDIA H200") == pytest.approx(found, rel=1e-6)
    # A dense layer and two with experts, and fewer heads of keys.
    several = dataclasses.replace(
        config,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=1,
        moe=dataclasses.replace(config.moe, first_k_dense_replace=1),
    )
    each = 2 * D + 2 * D * D + 2 * D * D // 4
    chosen = D * E + (1 - (3 / 4) ** 2) * E * 3 * D * F
    read = 2 * (V * D + D + 3 * each + 3 * D * F + 2 * chosen + 3 * rows * keys * 2 * D // 4)
    found = generation_speed.decode_floor(several, rows, keys, "NVIDIA H200")
    assert found == pytest.approx(rows * 4.8e12 / read, rel=1e-6)
    for unknown in ("cpu", "NVIDIA H100 PCIe", "NVIDIA H100 NVL"):  # the last two have other memory than an H100 (SXM)
        assert generation_speed.decode_floor(dense, rows, keys, unknown) is None


def test_generation_tells_each_repeat(capsys):
    result = generation_speed._decode(TINY, 2, 4, 3)
    printed = capsys.readouterr()
    compiling, *repeats = printed.err.splitlines()
    assert printed.out == "" and compiling == "  compiling for 2 x 4 tokens, to which 3 are added"
    assert [line.split(":")[0] for line in repeats] == [f"  repeat {n} of 5" for n in range(1, 6)]
    assert result["repeats"] == 5 and 0 < result["lowest"] <= result["tokens_per_second"] <= result["highest"]


def test_a_checkpoint_tells_each_repeat(capsys):
    WORKERS["verified"](settings(), 1)
    printed = capsys.readouterr()
    told = [line for line in printed.err.splitlines() if line.startswith("  ")]
    assert told == ["  compiling, and saving once", *(f"  repeat {n} of 5" for n in range(1, 6))]
