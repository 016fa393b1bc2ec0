"""``benchmark lora``: what is measured, of which peers, and that both sides have the same work."""

import dataclasses
import json

import numpy as np
import pytest
from helpers.tiny_documents import save_byte_tokenizer
from helpers.training import MODEL, settings

from stellarbyte_jax.cli import benchmark, lora_speed, measurements, peft_peers, torch_attention, torch_peers
from stellarbyte_jax.cli.measurements import compared
from stellarbyte_jax.cli.program import load_settings
from stellarbyte_jax.command import MendableError
from stellarbyte_jax.config import DataConfig, LoRAConfig
from stellarbyte_jax.inspect.costs import parameter_counts
from stellarbyte_jax.model.decoder import ByteTransformer

NEEDS_TORCH = "the peers are PEFT and transformers on torch: pip install -e '.[torch]' peft accelerate"
PEERS = ("lora_peft", "lora_peft_bfloat16", "lora_chats_peft", "lora_chats_peft_bfloat16", "sft_chats_trainer")
OURS = ("lora", "lora_chats", "sft_chats")


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine whose measurements are made up: (platform, packages that are missing) -> what was measured."""
    monkeypatch.chdir(tmp_path)

    def make(platform, missing=(), rates=None):
        measured = []

        def run(name, options):
            if name == "device":
                return {"platform": platform, "devices": 1}
            measured.append((name, options.set))
            return {"tokens_per_second": (rates or {}).get(name, 5)}

        monkeypatch.setattr(benchmark, "_run_worker", run)
        monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: None if name in missing else object())
        return measured

    return make


@pytest.mark.parametrize(("platform", "written"), [("gpu", "lora.json"), ("cpu", "lora-cpu.json")])
def test_each_side_is_measured_and_the_fastest_peer_counts(platform, written, machine, tmp_path, capsys):
    rates = {"lora": 90, "lora_peft": 40, "lora_peft_bfloat16": 60, "sft_chats": 30, "sft_chats_trainer": 20}
    measured = machine(platform, rates=rates)
    assert benchmark.main(["lora", "--set", "model.lora.r=8"]) == 0
    assert {name for name, _ in measured} == {*OURS, *PEERS}
    assert all(typed[-1] == "model.lora.r=8" for _, typed in measured), "what is typed goes before our own"
    report = json.loads((tmp_path / "benchmarks" / written).read_text())
    assert report["compared"]["lora"] == {"peer": "lora_peft_bfloat16", "times_the_peer": 1.5}
    assert report["compared"]["sft_chats"] == {"peer": "sft_chats_trainer", "times_the_peer": 1.5}
    assert "its gradient is not computed" in report["flops"]
    assert ("no GPU" in capsys.readouterr().out) == (platform == "cpu")


def test_what_was_not_measured_is_not_compared():
    measured = {"tokens_per_second": 3}
    assert compared({"lora": measured, "lora_peft": {"error": "out of memory"}}, lora_speed.PEERS) == {}
    assert compared({"lora": {"error": "exit code 1"}, "lora_peft": measured}, lora_speed.PEERS) == {}
    assert compared({"lora": {**measured, "devices": 2}, "lora_peft": measured}, lora_speed.PEERS) == {}


@pytest.mark.parametrize(
    ("missing", "left_out"),
    [
        ("torch", set(PEERS)),
        ("peft", {name for name in PEERS if "peft" in name}),
        ("accelerate", {"sft_chats_trainer"}),
    ],
)
def test_a_missing_package_is_one_line(missing, left_out, machine, capsys):
    measured = machine("gpu", missing={missing})
    assert benchmark.main(["lora"]) == 0
    assert {name for name, _ in measured} == {*OURS, *PEERS} - left_out
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("no peer")]
    assert lines == [f"no peer: {missing} is not installed (pip install {missing})"]
    measured.clear()
    assert benchmark.main(["lora", "--only", "lora", "--only", "sft_chats_trainer"]) == (missing != "peft")
    if missing != "peft":
        assert f"--only sft_chats_trainer needs {missing}: pip install {missing}" in capsys.readouterr().err
        assert not measured


def test_the_model_is_the_one_of_1_10_billion_with_adapters_on_all_projections():
    config = load_settings("pretrain", lora_speed.settings(small=False))
    counts = parameter_counts(ByteTransformer(dataclasses.replace(config.model, lora=LoRAConfig())))
    assert round(counts.total / 1e9, 2) == 1.1
    assert (config.data.sequence_length, config.global_batch_size) == (2048, 8)
    lora = config.model.lora
    assert (lora.r, lora.base_dtype, lora.targets) == (16, "bfloat16", {"q", "k", "v", "o", "gate_up", "down"})
    batches, tokens = lora_speed.chats(config)
    assert len(batches) == 4 and 0.99 < tokens / (8 * 2048) < 1, "rows are full"
    assert lora_speed.padding(config, tokens)["padding"] < 0.01
    small = load_settings("quickstart", lora_speed.settings(small=True))
    assert small.model.hidden_size == 128 and small.data.format == "chat" and small.model.lora.r == 16


CHAT = {"messages": [{"role": "user", "content": "ab?"}, {"role": "assistant", "content": "cde"}]}
TEMPLATE = "{% for m in messages %}{{ m['role'][0] + m['content'] }}{% endfor %}"


@pytest.fixture
def config(tmp_path):
    """A tiny network with adapters, and conversations of several lengths."""
    tokenizer = save_byte_tokenizer(tmp_path / "bytes")
    (tmp_path / "template").write_text(TEMPLATE)
    lines = []
    for number in range(40):
        turns = [{**turn, "content": turn["content"] * (1 + number % 3)} for turn in CHAT["messages"]]
        lines.append(json.dumps({"messages": turns}))
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    data = DataConfig(
        train=(str(tmp_path / "chats.jsonl"),),
        format="chat",
        tokenizer=tokenizer,
        sequence_length=32,
        workers=0,
        cache_dir=str(tmp_path / "cache"),
        chat={"template": str(tmp_path / "template")},
    )
    model = dataclasses.replace(MODEL, vocab_size=300, lora=LoRAConfig(r=4, base_dtype="bfloat16"))
    return settings(model=model, data=data)


@pytest.fixture
def torch(monkeypatch):
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    for package in ("transformers", "peft", "accelerate"):
        pytest.importorskip(package, reason=NEEDS_TORCH)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(peft_peers, "gpus", list)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny products: several would wait for each other
    yield torch
    torch.set_num_threads(threads)


def once(counted):
    """In place of ``timed``: one step, and what a rate would be of."""

    def timed(run, tokens, steps):
        run(1)
        counted.append((tokens, steps))
        return {"tokens_per_second": 5}

    return timed


def test_ours_counts_tokens_of_conversations_alone(config, monkeypatch):
    counted = []
    monkeypatch.setattr(measurements, "timed", once(counted))
    _, tokens = lora_speed.chats(config)
    padding = round(1 - tokens / (4 * 32), 4)
    assert 0 < padding < 0.5
    result = lora_speed.WORKERS["lora_chats"](config, 3)
    assert result["padding"] == padding and 0 < result["loss"] < 10 and counted == [(tokens, 3)]
    monkeypatch.setattr(lora_speed, "train_ours", lambda config, steps, batches, *more: {"lora": config.model.lora.r})
    assert lora_speed.WORKERS["sft_chats"](config, 3) == {"lora": 0, "padding": padding}
    assert lora_speed.WORKERS["lora_chats"](config, 3)["lora"] == 4


def test_all_weights_are_trained_where_adapters_are_left_out(config):
    plain = lora_speed.without_adapters(config)
    counts = parameter_counts(ByteTransformer(plain.model))
    assert counts.trainable == counts.total > parameter_counts(ByteTransformer(config.model)).trainable


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of torch, and what PEFT asks for
@pytest.mark.parametrize(
    ("name", "adapters"),
    [("lora_peft", "float32, autocast"), ("lora_chats_peft_bfloat16", "bfloat16")],
)
def test_peft_trains_as_many_weights_as_we_do(name, adapters, config, torch, monkeypatch):
    counted = []
    monkeypatch.setattr(torch_peers, "timed", once(counted))
    result = peft_peers.WORKERS[name](config, 3)
    assert result["trained"] == parameter_counts(ByteTransformer(config.model)).trainable
    assert result["adapters"] == adapters and 0 < result["loss"] < 10 and not result["gradient_checkpointing"]
    on_chats = "chats" in name
    assert counted == [(lora_speed.chats(config)[1] if on_chats else 4 * 32, 3)]
    assert ("padding" in result) == on_chats and "sdpa" in result["attention"]


def test_rows_end_to_end_are_rows_with_a_mask(config, torch):
    """Conversations do not see each other either way, and the loss is of the same targets."""
    batches, _ = lora_speed.chats(config)
    documents, device = config.data.max_documents_per_sequence, torch.device("cpu")
    laid = [torch_attention.end_to_end(batch, documents, device) for batch in batches]
    assert len({tuple(each["cu_seq_lens_q"].shape) for each in laid}) == 1, "one shape, so one program"
    torch_attention.register(torch_attention.reference, config.data.sequence_length)
    of_mask, of_places = (
        peft_peers._network(config, device, "float32", name) for name in ("sdpa", torch_attention.VARLEN)
    )
    rows = torch_attention.masked(batches[0], device)
    losses = [of_mask(**rows).loss.item(), of_places(**laid[0]).loss.item()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    seen = of_mask(**{**rows, "attention_mask": torch.ones_like(rows["attention_mask"]).tril()}).loss.item()
    assert abs(seen - losses[0]) > 1e-4 * losses[0], "the mask matters"
    weights = (batches[0]["loss_mask"] * batches[0]["segment_ids"] > 0).sum()
    assert (rows["labels"] >= 0).sum() == weights


def test_a_kernel_that_gives_other_results_is_not_used(torch, capsys):
    device = torch.device("cpu")
    assert torch_attention._problem(torch_attention.reference, device) is None

    def blind(q_WNH, k_WKH, v_WKH, places, longest):
        return torch_attention.reference(q_WNH, k_WKH, v_WKH, torch.tensor([0, 8, 8, 8]), longest)

    assert torch_attention._problem(blind, device) == "other results than those of the formula"

    def missing(*_):
        raise NotImplementedError("no such kernel")

    assert torch_attention._problem(missing, device) == "NotImplementedError: no such kernel"


MEMORY, KERNEL = "CUDA out of memory. Tried to allocate 9 GiB", "no such kernel"


@pytest.mark.parametrize(
    ("problems", "result"),
    [
        ([], ("first", False)),
        ([MEMORY], ("first", True)),
        ([MEMORY, MEMORY], None),
        ([KERNEL], ("second", False)),
        ([KERNEL, MEMORY], ("second", True)),
    ],
)
def test_a_peer_is_measured_in_the_way_that_works(problems, result, torch, capsys):
    """Layers are made anew where memory is short, and another kernel stands for one that fails."""
    left = list(problems)

    def measure(work, checkpointing):
        if not left:
            return {"of": work.name}
        problem = left.pop(0)
        raise torch.OutOfMemoryError(problem) if problem == MEMORY else RuntimeError(problem)

    works = [peft_peers._Work(None, None, "sdpa", name) for name in ("first", "second")]
    found = peft_peers._measured(torch.device("cpu"), works, measure)
    if result is None:
        assert found == {"error": "out of memory"}
    else:
        name, checkpointing = result
        assert found == {"of": name, "attention": name, "gradient_checkpointing": checkpointing}
    told = capsys.readouterr().err
    assert ("CUDA out of memory\n" in told, "first: RuntimeError: no such kernel\n" in told) == (
        MEMORY in problems,
        KERNEL in problems,
    )


def test_what_fails_in_every_way_is_an_error(torch):
    def measure(work, checkpointing):
        raise RuntimeError(f"{KERNEL} {work.name}")

    works = [peft_peers._Work(None, None, "sdpa", name) for name in ("first", "second")]
    with pytest.raises(RuntimeError, match="no such kernel second"):
        peft_peers._measured(torch.device("cpu"), works, measure)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_the_trainer_is_timed_between_its_steps(config, torch, monkeypatch):
    clock = iter(np.cumsum([0.0, 7.0, *[2.0] * 6]).tolist())
    monkeypatch.setattr(peft_peers.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(peft_peers, "_WARM", 2)
    result = peft_peers.WORKERS["sft_chats_trainer"](config, 1)
    tokens = lora_speed.chats(config)[1]
    assert result["tokens_per_second"] == result["lowest"] == result["highest"] == round(tokens / 2)
    assert (result["first_step_seconds"], result["repeats"], result["weights"]) == (7.0, 5, "float32")
    assert 0 < result["mean_loss"] < 10


def test_a_peer_does_not_run_beside_a_gpu_that_torch_does_not_find(torch, monkeypatch):
    monkeypatch.setattr(peft_peers, "gpus", lambda: [["NVIDIA H100", "570"]])
    with pytest.raises(MendableError, match="finds no GPU, and there is one: install torch with CUDA"):
        peft_peers._device()


@pytest.mark.parametrize(
    "setting", [{"layers": (0,)}, {"activation": "relu"}, {"modules_to_save": ("norms",)}, {"regularization": 0.1}]
)
def test_settings_that_would_change_our_side_alone_are_refused(setting):
    (name,) = setting
    with pytest.raises(MendableError, match=f"the peer does without model.lora.{name}: leave it out"):
        peft_peers._modules(LoRAConfig(r=2, **setting))


def test_targets_that_the_peer_has_not_are_refused():
    assert peft_peers._modules(LoRAConfig(r=2, target_modules=("gate_up", "o"))) == ["gate_proj", "up_proj", "o_proj"]
    with pytest.raises(MendableError, match="the peer has no embed"):
        peft_peers._modules(LoRAConfig(r=2, target_modules=("q", "embed")))
