"""The scripts that say what a setting is worth: every variant is a config that loads, and results become a table."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def ablation(monkeypatch):
    monkeypatch.chdir(ROOT)
    return script("ablation")


def test_every_variant_is_a_config_of_its_own(ablation):
    small = ablation.check()[: -len(ablation.names())]
    assert len({repr(c) for c in small}) == len(small) - 1, "the dense run is the baseline"
    recommended = small[-1].model
    assert recommended.position_embedding == "xpos" and recommended.hidden_size == 256


def test_the_table_shows_what_was_measured(ablation):
    kept = {
        "quality": {"results": {"XPos": {"bits_per_byte": 2.5, "lowest": 2.4, "highest": 2.6}}},
        "speed": {"results": {"baseline": {"tokens_per_second": 1234, "peak_memory_gib": 1.5}}},
    }
    kept["quality"]["results"]["GEGLU"] = kept["quality"]["results"]["XPos"] | {"seeds": 2}
    lines = ablation.table(kept).splitlines()
    assert lines.pop() == "| GEGLU | 2.500 (2.400 to 2.600, 2 of 3 seeds) | - | - |"
    assert lines[2:] == ["| baseline | - | 1,234 | 1.5 |", "| XPos | 2.500 (2.400 to 2.600) | - | - |"]


def test_what_is_measured_is_kept_as_it_comes(ablation, tmp_path, monkeypatch, capsys):
    """Means over seeds; an error is kept, told by the exit code, and loses nothing of what was there."""
    output = tmp_path / "ablation.json"
    output.write_text(json.dumps({"quality": {"results": {"GEGLU": {"bits_per_byte": 9.0}}}}))

    def trained(folder, overrides, jobs, config="configs/quickstart.py"):
        if "model.parallel_residual=true" in overrides:
            return {"error": "no room"}
        seed = next(int(o.partition("=")[2]) for o in overrides if o.startswith("seed="))
        return {"bits_per_byte": 2.0 + seed, "loss": 1.0, "on": "a machine"}

    monkeypatch.setattr(ablation, "_train", trained)
    for name, code in (("XPos", 0), ("parallel residual", 1)):
        monkeypatch.setattr(sys, "argv", ["ablation.py", "quality", "--only", name, "--output", str(output)])
        assert ablation.main() == code
    kept = json.loads(output.read_text())["quality"]["results"]
    assert kept == {
        "GEGLU": {"bits_per_byte": 9.0},
        "XPos": {"bits_per_byte": 3.0, "lowest": 2.0, "highest": 4.0, "seeds": 3, "on": "a machine"},
        "parallel residual": {"error": "no room"},
    }
    assert "| XPos | 3.000 (2.000 to 4.000) | - | - |" in capsys.readouterr().out


def test_a_small_run_is_read_back(ablation, tmp_path):
    """The real thing, once: two steps of a tiny model."""
    tiny = ["steps=2", "schedule.warmup_steps=1", "model.hidden_size=16", "model.num_attention_heads=2"]
    tiny += ["model.num_key_value_heads=2", "global_batch_size=2", "data.sequence_length=32", "evaluation.batches=1"]
    tiny += ["model.num_hidden_layers=2", "model.intermediate_size=32", "data.workers=0"]
    found = ablation._train(tmp_path / "run", ablation.small("XPos", tiny), ablation.Places(1))
    assert 2 < found["bits_per_byte"] < 9 and found["on"].startswith("jax ")
    wrong = ablation._train(tmp_path / "wrong", ["steps=0"], ablation.Places(1))
    assert "steps" in wrong["error"]


def test_of_experts_the_most_uneven_late_quarter_and_step_of_all_seeds_are_kept(ablation, tmp_path, monkeypatch):
    """The first quarter of the steps is left out, in which loads are uneven anyway."""

    def run(command, **options):
        settings = dict(word.partition("=")[::2] for word in command if "=" in word)
        seed, folder = int(settings["seed"]), Path(settings["output_dir"])
        found = {2: (9.0, 5, 0.5), 4: (3.0, 1, 0.02), 6: (4.0, 2, 0.01), 8: (3.5, 0, 0.03)}
        lines = [
            {"step": step, "router/max_load": load + seed / 10, "router/dead_experts": dead, "router/drop_rate": lost}
            for step, (load, dead, lost) in found.items()
        ]
        lines.append({"step": 8, "validation/bits_per_byte": 2.0 + seed, "validation/loss": 1.0})
        folder.mkdir()
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        loads = {2: [1.0, 0], 4: [0.75, 0.25], 6: [0.9 - seed / 10, 0.1 + seed / 10], 8: [0.5, 0.5]}
        kept = [{"step": step, "load": {"0": [0.5, 0.5], "1": load}} for step, load in loads.items()]
        (folder / "router_load.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
        (folder / "train.log").write_text("2026-01-01 00:00:00 a machine\n")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    results = dict(ablation.experts(["sigmoid"], 1, []))
    loads = {"max_load": 1.8, "step_load": 4.2, "dead": 2, "dropped": 0.03}
    spread = {"lowest": 2.0, "highest": 4.0, "seeds": 3}
    assert results == {"sigmoid": {"bits_per_byte": 3.0, **spread, **loads, "on": "a machine"}}
    lines = ablation.table({"experts": {"results": results | {"broken": {"error": "no room"}}}}).splitlines()
    assert lines[-3:] == [
        "|---|---|---:|---:|---:|",
        "| sigmoid | 3.000 (2.000 to 4.000) | 1.80 (4.20) | 2 | 3.0% |",
        "| broken | - | - | - | - |",
    ]


def test_cost_of_smaller_caches(tmp_path, monkeypatch, capsys):
    """On a tiny random Llama: perplexity near the vocabulary's size, and the bytes that each cache should take."""
    import jax

    from stellarbyte_jax.config import ByteConfig
    from stellarbyte_jax.hf.directory import save_pretrained
    from stellarbyte_jax.model.decoder import ByteTransformer, init_params

    config = ByteConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, max_position_embeddings=64
    )
    model = ByteTransformer(config)
    params = jax.jit(lambda: init_params(model, jax.random.key(0)))()
    save_pretrained(tmp_path / "hf", model, params, tokenizer=ROOT / "tokenizer")
    quality = script("cache_quality")
    monkeypatch.setattr(
        quality, "VARIANTS", {n: quality.VARIANTS[n] for n in ("everything kept", "int8", "an eighth: recent alone")}
    )
    output, text = tmp_path / "out.json", ROOT / "data" / "tiny_bilingual_valid.jsonl"
    command = ["cache_quality.py", "--model", str(tmp_path / "hf"), "--text", str(text), "--length", "16"]
    monkeypatch.setattr(sys, "argv", [*command, "--texts", "2", "--output", str(output)])
    assert quality.main() == 0
    results = json.loads(output.read_text())["results"]
    assert all(20_000 < r["perplexity"] < 50_000 for r in results.values())
    full = 2 * 2 * 16 * 32 * 4 / 2**20  # keys and values, texts, tokens, channels, bytes
    assert results["everything kept"]["cache_mib"] == pytest.approx(full, abs=0.006)
    assert results["an eighth: recent alone"]["cache_mib"] == pytest.approx(full / 8, abs=0.006)
    assert quality.resolved({"cache": {"recent": 1 / 8, "dtype": "int8"}, "sink_tokens": 4}, 64) == {
        "cache": {"recent": 8, "dtype": "int8"},
        "sink_tokens": 4,
    }
    monkeypatch.setattr(sys, "argv", [*command, "--texts", "100000"])
    assert quality.main() == 2

    # The lines are those of the training data, and so are their faults.
    def read(*content):
        text = tmp_path / "a.jsonl"
        text.write_bytes(b"".join(content))
        more = ["--text", str(text), "--texts", "3", "--cache-dir", str(tmp_path / "cache"), "--output", str(output)]
        monkeypatch.setattr(sys, "argv", [*command, *more])
        return quality.main()

    monkeypatch.setattr(quality, "VARIANTS", {"everything kept": {}})
    line = json.dumps({"text": "spring wind " * 40}).encode()
    assert read(b"\xef\xbb\xbf", line, b"\r\n \r\n\n", line) == 0
    assert json.loads(output.read_text())["texts"] == 3 and list((tmp_path / "cache").iterdir())
    capsys.readouterr()
    for bad, message in (
        (b'{"text": 3}', "field 'text' must be a string"),
        (b'{"text": "\xff"}', "not valid UTF-8"),
        (b"[", "not valid JSON"),
    ):
        assert read(line[:20], b'"}\n\n', bad) == 1
        error = capsys.readouterr().err
        assert re.search(rf"^error: .*a\.jsonl:3(:\d+)?: {message}.*mend the line$", error) and error.count("\n") == 1
    monkeypatch.setattr(sys, "argv", [*command, "--text", str(tmp_path)])
    assert quality.main() == 1
    assert "unknown kind of data file" in capsys.readouterr().err


def test_runs_at_the_same_time_are_spread_over_the_gpus(ablation, tmp_path, monkeypatch):
    """Two GPUs and three runs: two share one, and each is given its part of the memory; a fourth waits."""
    lister = tmp_path / "nvidia-smi"
    lister.write_text("#!/bin/sh\nprintf '0\\n1\\n'\n")
    lister.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    places = ablation.Places(3)
    with places.taken() as a, places.taken() as b:
        with places.taken() as c:
            assert [x["CUDA_VISIBLE_DEVICES"] for x in (a, b, c)] == ["0", "1", "0"]
            assert a["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.450"
        with places.taken() as d:
            assert d["CUDA_VISIBLE_DEVICES"] == "0", "the place that was given back"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    assert ablation.gpus() == ["5"], "what the user allows"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with ablation.Places(2).taken() as alone:
        assert alone["CUDA_VISIBLE_DEVICES"] == "" and alone["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.450"
