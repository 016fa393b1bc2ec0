"""The peers of ``benchmark train``: which are measured, which one counts, and that they train the same network."""

import dataclasses
import json
import math
import sys
import types

import pytest
from helpers.training import MODEL, settings

from stellarbyte_jax.cli import benchmark, torch_peers

NEEDS_TORCH = "the peers are transformers on torch: pip install -e '.[torch]'"
PEERS = ("huggingface", "huggingface_bfloat16", "huggingface_liger")


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine whose measurements are made up: (platform, modules that are missing) -> what was measured."""
    monkeypatch.chdir(tmp_path)

    def make(platform="gpu", missing=(), results=None):
        measured = []

        def run(name, options):
            if name == "device":
                return {"platform": platform, "devices": 1}
            measured.append(name)
            return {"tokens_per_second": 5, **(results or {}).get(name, {})}

        monkeypatch.setattr(benchmark, "_run_worker", run)
        monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: None if name in missing else object())
        return measured

    return make


def rates(**tokens_per_second):
    return {name: {"tokens_per_second": rate} for name, rate in tokens_per_second.items()}


@pytest.mark.parametrize("config", ["pretrain", "quickstart"])
@pytest.mark.parametrize("best", PEERS)
def test_the_fastest_peer_is_named_with_our_ratio_to_it(best, config, machine, capsys):
    given = rates(synthetic=90, real=84, **{**dict.fromkeys(PEERS, 40), best: 60})
    given[best]["others"] = [{"tokens_per_second": 59}]
    machine(results=given)
    assert benchmark.main(["train", "--config", config, "--output", "out.json"]) == 0
    with open("out.json", encoding="utf-8") as file:
        report = json.load(file)
    assert report["compared"] == {
        "synthetic": {"peer": best, "times_the_peer": 1.5},
        "real": {"peer": best, "times_the_peer": 1.4},
    }
    assert report["results"][best]["others"] == [{"tokens_per_second": 59}]
    printed = capsys.readouterr().out.splitlines()
    assert f"synthetic      peer {best}  times_the_peer 1.5" in printed
    assert f"{best:14} tokens_per_second 60" in printed, "one figure a peer, the slower ones in the file"


def test_experts_are_compared_with_the_faster_mode_of_the_peer(machine):
    machine(results=rates(dropless=90, capacity=84, huggingface_moe=30, huggingface_moe_bfloat16=60))
    assert benchmark.main(["moe", "--output", "out.json"]) == 0
    with open("out.json", encoding="utf-8") as file:
        assert json.load(file)["compared"] == {
            "dropless": {"peer": "huggingface_moe_bfloat16", "times_the_peer": 1.5},
            "capacity": {"peer": "huggingface_moe_bfloat16", "times_the_peer": 1.4},
        }


@pytest.mark.parametrize(
    ("platform", "missing", "left_out", "lines"),
    [
        ("gpu", {"liger_kernel"}, {"huggingface_liger"}, ["liger-kernel is not installed (pip install liger-kernel)"]),
        ("gpu", {"torch"}, set(PEERS), ["torch is not installed (pip install torch)"]),
        ("cpu", {"liger_kernel"}, {"huggingface_liger"}, ["huggingface_liger needs a GPU"]),
    ],
)
def test_a_peer_that_cannot_be_measured_is_one_line(platform, missing, left_out, lines, machine, capsys):
    measured = machine(platform, missing)
    assert benchmark.main(["train"]) == 0
    assert set(measured) == {"synthetic", "real", *PEERS} - left_out
    assert [line for line in capsys.readouterr().out.splitlines() if "no peer" in line] == [
        f"no peer: {line}" for line in lines
    ]


@pytest.mark.parametrize(
    ("platform", "missing", "name", "told"),
    [
        ("gpu", "liger_kernel", "huggingface_liger", "needs liger-kernel: pip install liger-kernel"),
        ("gpu", "torch", "huggingface_bfloat16", "needs torch: pip install torch"),
        ("cpu", "", "huggingface_liger", "needs a GPU, and JAX finds none"),
    ],
)
def test_one_that_is_asked_for_is_refused(platform, missing, name, told, machine, capsys):
    measured = machine(platform, {missing})
    assert benchmark.main(["train", "--only", "synthetic", "--only", name]) == 1
    assert f"--only {name} {told}" in capsys.readouterr().err and not measured


def test_a_network_with_experts_is_not_compared_with_one_without(machine, capsys):
    measured = machine()
    assert benchmark.main(["train", "--config", "pretrain_moe"]) == 0
    assert measured == ["synthetic", "real"] and "benchmark moe measures a peer" in capsys.readouterr().out


@pytest.fixture
def torch(monkeypatch):
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    pytest.importorskip("transformers", reason=NEEDS_TORCH)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    # Those of a launcher are of no interest to a peer on one device.
    for variable in ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny products: several would wait for each other
    yield torch
    torch.set_num_threads(threads)
    assert not torch.distributed.is_initialized()


@pytest.fixture
def liger(monkeypatch, torch):
    """A stand-in for liger-kernel whose loss is the formula; returns what was asked of it."""
    asked = []

    class Loss:
        ignore_index = -100

        def __call__(self, weight_VD, hidden_ND, targets_N):
            asked.append((weight_VD.dtype, hidden_ND.dtype))
            logits_NV = (hidden_ND @ weight_VD.T).float()
            return torch.nn.functional.cross_entropy(logits_NV, targets_N, ignore_index=self.ignore_index)

    module = types.ModuleType("liger_kernel.transformers")
    module.LigerFusedLinearCrossEntropyLoss = Loss
    module.apply_liger_kernel_to_llama = lambda **options: asked.append(options)
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", module)
    monkeypatch.setattr(torch_peers, "metadata", types.SimpleNamespace(version={"liger-kernel": "1.2.3"}.get))
    return asked


def timed(speeds=()):
    """In place of ``timed``: one step, and rates that are given in turn."""
    left = list(speeds)

    def once(run, tokens, steps):
        run(1)
        return {"tokens_per_second": left.pop(0) if left else 5, "of": (tokens, steps)}

    return once


OF_TORCH = ("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
KERNELS_ALL = {"cross_entropy": False, "fused_linear_cross_entropy": False}


@pytest.mark.filterwarnings(*OF_TORCH)
@pytest.mark.parametrize("remat", ["none", "full"])
def test_peers_train_the_same_network(remat, torch, liger, monkeypatch):
    """In float32 their losses are equal after twelve steps: weights, batches, loss and optimizer are the same."""
    monkeypatch.setattr(torch_peers, "timed", timed())
    config = settings(model=dataclasses.replace(MODEL, remat=remat))
    found = {name: torch_peers.WORKERS[name](config, 3) for name in PEERS}
    losses = [result["loss"] for result in found.values()]
    assert all(type(loss) is float and 0 < loss < 10 for loss in losses)
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-4)
    assert all(result["of"] == (4 * 16, 3) and "devices" not in result for result in found.values())
    assert found["huggingface_bfloat16"]["weights"] == "float32, copies in float32"
    assert found["huggingface_liger"]["liger"] == "1.2.3" and liger


@pytest.mark.filterwarnings(*OF_TORCH)
@pytest.mark.parametrize(
    ("name", "compiled"),
    [
        ("huggingface_bfloat16", ["ForCausalLMLoss", *2 * ["LlamaDecoderLayer"]]),
        ("huggingface_liger", 4 * ["LlamaDecoderLayer"]),
    ],
)
def test_products_are_of_bfloat16_copies_and_float32_weights_are_trained(name, compiled, torch, liger, monkeypatch):
    seen, made = set(), []
    monkeypatch.setattr(
        torch, "compile", lambda part, disable: made.append(getattr(part, "__name__", type(part).__name__)) or part
    )
    linear = torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda x, weight, *bias: seen.add(weight.dtype) or linear(x, weight, *bias)
    )

    def trained(config, steps, model, device, half):
        tokens = torch.zeros(2, 8, dtype=torch.int64)
        model(input_ids=tokens, labels=tokens).loss.backward()
        weights = list(model.parameters())
        assert {weight.dtype for weight in weights} == {weight.grad.dtype for weight in weights} == {torch.float32}
        return {"tokens_per_second": 5, "half": half}

    monkeypatch.setattr(torch_peers, "measure_peer", trained)
    config = settings(model=dataclasses.replace(MODEL, compute_dtype="bfloat16"))
    result = torch_peers.WORKERS[name](config, 3)
    assert seen == {torch.bfloat16} and not result["half"], "no autocast beside it"
    assert made == compiled
    assert result["weights"] == "float32, copies in bfloat16"
    of_head = [asked for asked in liger if asked != KERNELS_ALL]
    assert of_head == 2 * (name == "huggingface_liger") * [(torch.bfloat16, torch.bfloat16)], "with what it is given"


@pytest.mark.filterwarnings(*OF_TORCH)
@pytest.mark.parametrize(("speeds", "kernels"), [([9, 7], "loss"), ([7, 9], "all")])
def test_all_kernels_of_liger_are_tried_too_and_the_faster_way_counts(speeds, kernels, torch, liger, monkeypatch):
    monkeypatch.setattr(torch_peers, "timed", timed(speeds))
    monkeypatch.setattr(torch.compiler, "reset", lambda: liger.append("reset"))
    result = torch_peers.WORKERS["huggingface_liger"](settings(), 3)
    assert (result["tokens_per_second"], result["kernels"]) == (9, kernels)
    (other,) = result["others"]
    assert other["tokens_per_second"] == 7 and other["kernels"] != kernels
    half = len(liger) // 2
    assert liger[half - 1 : half + 1] == ["reset", KERNELS_ALL] and liger.count(KERNELS_ALL) == 1, "between the models"


@pytest.mark.filterwarnings(*OF_TORCH)
def test_kernels_that_do_not_compile_are_told_beside_the_loss_alone(torch, liger, monkeypatch, capsys):
    def missing(**options):
        raise TypeError("no such module in transformers")

    monkeypatch.setattr(sys.modules["liger_kernel.transformers"], "apply_liger_kernel_to_llama", missing)
    monkeypatch.setattr(torch_peers, "timed", timed())
    result = torch_peers.WORKERS["huggingface_liger"](settings(), 3)
    told = "TypeError: no such module in transformers"
    assert result["kernels"] == "loss" and result["others"] == [{"error": told, "kernels": "all"}]
    assert told in capsys.readouterr().err and not benchmark.has_failed(result)


@pytest.mark.parametrize("last", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_a_failure(last, torch, monkeypatch):
    class Model(torch.nn.Linear):
        def forward(self, input_ids, labels):
            return types.SimpleNamespace(loss=super().forward(torch.ones(1, 1)).sum() * 0 + last)

    monkeypatch.setattr(torch_peers, "timed", timed())
    result = torch_peers.measure_peer(settings(), 1, Model(1, 1), torch.device("cpu"), False)
    assert result == {"error": f"the loss is {last}"}
