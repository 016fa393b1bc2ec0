"""Parts of layers with experts in the modelling file, one by one."""

import json
from typing import Any

import numpy as np
import pytest
from helpers.hf_models import NEEDS_TORCH

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.config.moe import MoEConfig

torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
pytest.importorskip("transformers")

import stellarbyte_jax.hf.torch_model.modeling_stellarbyte as modelling  # noqa: E402 (it imports torch)

TOKENS = torch.from_numpy(np.random.default_rng(0).integers(1, 61, (2, 24)))


def fresh(**moe: Any) -> Any:
    torch.manual_seed(0)
    config = modelling.StellarByteConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, moe=moe
    )
    return modelling.StellarByteForCausalLM._from_config(config).eval()


@pytest.mark.parametrize("gate", ["linear", "context"])
def test_routers_compute_in_float32_whatever_is_asked_for(gate: str) -> None:
    peer = fresh(num_experts=6, gate=gate, adaptive_temperature=True, expert_priority=True, cooling_steps=2)
    router, x_BTD = peer.model.layers[0].mlp.router, torch.randn(2, 5, 32)
    call = modelling.Call(peer.config, torch.arange(5).expand(2, 5), torch.arange(5), None, None, None, False, None)
    _, expected = router(x_BTD, call)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(router(x_BTD, call)[1], expected)
        assert np.isfinite(peer(TOKENS).logits.float().detach().numpy()).all()
    exact = router.half().float()(x_BTD.half().float(), call)[1]
    found = router.half()(x_BTD.half(), call)[1]
    assert found.dtype == torch.float32 and torch.equal(found, exact)
    for dtype in (torch.float16, torch.bfloat16):
        assert peer.to(dtype)(TOKENS).logits.dtype == dtype


def test_of_equal_scores_the_first_experts_are_chosen() -> None:
    router = fresh(num_experts=40, num_experts_per_tok=5, n_group=10, topk_group=3).model.layers[0].mlp.router
    call = modelling.Call(router.config, torch.zeros(1, 9).long(), torch.arange(9), None, None, None, False, None)
    experts_RC, weights_RC = router(torch.zeros(1, 9, 32), call)
    assert experts_RC.tolist() == [[0, 1, 2, 3, 4]] * 9
    torch.testing.assert_close(weights_RC, torch.full((9, 5), 0.2))


def test_a_twin_that_a_token_does_not_see_is_not_chosen_whatever_its_bias() -> None:
    """Experts 1 and 3 are halves of one; for 0 and 2, which are too, the time is over."""
    router = fresh(num_experts=4, num_experts_per_tok=3, rebalance_interval=5).model.layers[0].mlp.router
    for name, values in {"twin": [2, 3, 0, 1], "twin_steps": [0, 1, 0, 1], "bias": [0, 9, 0, 9]}.items():
        getattr(router, name).copy_(torch.tensor(values))
    call = modelling.Call(router.config, torch.arange(2)[None], torch.arange(2), None, None, None, False, None)
    x_BTD = torch.randn(1, 2, 32)
    experts_RC, weights_RC = router(x_BTD, call)
    for position, (seen, hidden) in enumerate(((1, 3), (3, 1))):
        assert experts_RC[position, 0] == seen and sorted(experts_RC[position, 1:].tolist()) == [0, 2]
        logits = torch.nn.functional.linear(x_BTD[0, position], router.weight)
        logits[hidden] = -torch.inf
        torch.testing.assert_close(weights_RC[position], logits.softmax(-1)[experts_RC[position]])


def test_the_view_of_a_token_passes_the_exact_gelu() -> None:
    context = modelling.StellarByteContext(fresh(num_experts=4, gate="context", context_size=32).config)
    with torch.no_grad():
        context.context_in.copy_(torch.eye(32))
        context.context_out.copy_(torch.eye(32))
        context.position.fill_(2.0)
    x_BTD = torch.linspace(-3, 3, 32)[None, None]
    view = x_BTD * (1 + torch.erf(x_BTD / 2**0.5)) / 2
    features = torch.cat([x_BTD, view, torch.full((1, 1, 16), 2.0)], dim=-1)
    expected = features / (features.square().mean(-1, keepdim=True) + context.norm.eps).sqrt()
    torch.testing.assert_close(context(x_BTD, torch.zeros(1, 1).long()), expected, atol=1e-6, rtol=1e-6)


def test_experts_without_tokens_compute_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = fresh(num_experts=6, dynamic_k=0.0)
    experts, rows, linear = peer.model.layers[0].mlp.experts, [], torch.nn.functional.linear

    def note(x: Any, weight: Any) -> Any:
        rows.append(len(x))
        return linear(x, weight)

    chosen, weights = torch.tensor([[1, 4], [4, 6], [6, 6]]), torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.0, 0.0]])
    x_RD = torch.randn(3, 32)
    with monkeypatch.context() as patch:
        patch.setattr(modelling.F, "linear", note)
        found = experts(x_RD, chosen, weights)
    assert rows == [1, 1, 2, 2] and not found[2].any()  # two products for each of two experts
    torch.testing.assert_close(experts._all(x_RD, chosen, weights), found)
    assert np.isfinite(peer(TOKENS).logits.detach().numpy()).all()  # tokens that need no share of their scores


def test_experts_are_not_split_between_devices() -> None:
    accelerate = pytest.importorskip("accelerate", reason="device_map needs it")
    peer = fresh(num_experts=4, shared_pool=True)
    sizes = accelerate.utils.compute_module_sizes(peer)
    pool = sizes["model.experts"]
    room = {0: sizes["model.embed_tokens"] + sizes["model.layers"] + 9 * pool // 10, 1: 10 * pool}
    places = accelerate.infer_auto_device_map(peer, max_memory=room, no_split_module_classes=peer._no_split_modules)
    assert places["model.embed_tokens"] == 0 and places["model.experts"] == 1


def test_fresh_weights_are_those_of_the_settings() -> None:
    peer = fresh(num_experts=8, gate="context", noise="noisy_topk", adaptive_temperature=True, temperature=0.7)
    router, experts = peer.model.layers[1].mlp.router, peer.model.layers[1].mlp.experts
    for weight in (experts.gate_up_proj, experts.down_proj, router.weight, router.context.mlp_up):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    expected = {"load": 1 / 8, "utilization": 0.5, "priority": 1, "bias": 0, "coldness": 0, "noise": 0, "steps": 0}
    assert {name: buffer.unique().item() for name, buffer in router.named_buffers()} == expected
    assert router.temperature.item() == pytest.approx(0.7) and (router.context.norm.weight == 1).all()
    half = modelling.StellarByteForCausalLM._from_config(peer.config, dtype=torch.bfloat16)
    dtypes = {tensor.dtype for router in half.model.layers for tensor in router.mlp.router.state_dict().values()}
    assert half.dtype == torch.bfloat16 and dtypes == {torch.float32}
    assert half._keep_in_fp32_modules_strict == {"router"}  # what releases of 4 go by when they read weights


def test_dropout_of_the_layer_is_of_its_sum() -> None:
    peer = fresh(num_experts=4, n_shared_experts=1)
    peer.config.hidden_dropout = 0.5
    layer = modelling.StellarByteMoE(peer.config).eval()
    layer.load_state_dict(peer.model.layers[0].mlp.state_dict())
    call = modelling.Call(peer.config, torch.arange(24).expand(2, 24), torch.arange(24), None, None, None, False, None)
    x_BTD = torch.randn(2, 24, 32)
    quiet, noisy = layer(x_BTD, call), layer.train()(x_BTD, call)
    kept = noisy != 0
    assert kept.float().mean().item() == pytest.approx(0.5, abs=0.05)
    torch.testing.assert_close(noisy[kept], 2 * quiet[kept])


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        ({"gate": "hash"}, r"moe\.gate must be one of linear, context, got 'hash'"),
        ({"scoring_func": "relu"}, r"moe\.scoring_func must be one of softmax, sigmoid, got 'relu'"),
        ({"history_decay": 0.5}, r"moe\.history_decay must be 0: no cache here keeps the mean of earlier tokens"),
    ],
)
def test_a_setting_of_another_value_is_refused(moe: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        modelling.StellarByteConfig(moe={"num_experts": 4} | moe)


def test_defaults_here_and_there_are_equal() -> None:
    ours = json.loads(json.dumps(MoEConfig().to_dict()))
    assert {name: ours[name] for name in modelling._EXPERT_DEFAULTS} == json.loads(
        json.dumps(modelling._EXPERT_DEFAULTS)
    )
    of_training = {"noise_scale", "router_warmup_steps", "bias_update_rate", "state_decay", "dispatch", "overflow"}
    of_training |= {"capacity_factor", "min_capacity", "max_capacity", "dynamic_capacity"}
    of_training |= {"split_above", "merge_below", "twin_steps", "implementation"}
    assert set(ours) - set(modelling._EXPERT_DEFAULTS) == of_training


@pytest.mark.parametrize(
    "moe", [{}, {"first_k_dense_replace": 2}, {"decoder_sparse_step": 2}, {"mlp_only_layers": [0, 3]}], ids=str
)
def test_the_same_layers_have_experts(moe: dict[str, Any]) -> None:
    ours = ByteConfig(num_hidden_layers=5, moe={"num_experts": 4} | moe)
    theirs = modelling.StellarByteConfig(num_hidden_layers=5, moe={"num_experts": 4} | moe)
    assert [i for i in range(5) if theirs.has_experts(i)] == list(ours.moe_layers)
    assert not any(modelling.StellarByteConfig(num_hidden_layers=5).has_experts(i) for i in range(5))


@pytest.mark.parametrize("cast", [lambda peer: peer.to(torch.bfloat16), lambda peer: peer.half()])
def test_routers_stay_float32_where_a_model_is_cast(cast: Any) -> None:
    """As trainers do after loading: no computation in float32 brings back what was rounded."""
    peer = fresh(num_experts=5, gate="context", noise="noisy_topk", adaptive_temperature=True, rebalance_interval=9)
    for x in peer.state_dict().values():
        x.uniform_(0.1, 0.2)
    before = {name: x.clone() for name, x in peer.state_dict().items() if ".router." in name}
    peer = cast(peer)
    after = peer.state_dict()
    assert (
        {x.dtype for name, x in after.items() if name not in before} == {peer.lm_head.weight.dtype} != {torch.float32}
    )
    assert len(before) > 20 and all(torch.equal(after[name], x) for name, x in before.items())
    assert {after[name].dtype for name in before} == {torch.float32}
    peer(TOKENS, labels=TOKENS).loss.backward()
    assert peer.model.layers[1].mlp.router.weight.grad.dtype == torch.float32
    assert {x.device.type for x in peer.to("meta").state_dict().values()} == {"meta"}
    assert {x.dtype for x in fresh(num_experts=5).double().state_dict().values()} == {torch.float64}


def test_router_logits_are_refused() -> None:
    """Other programs ask for them to add a loss of balance, which would be left out without a word."""
    peer = fresh(num_experts=5)
    assert peer(TOKENS, output_router_logits=False).logits.shape == (2, 24, 61)
    message = (
        "output_router_logits: this model gives no logits of routers and no loss of their balance: train it with "
        "stellarbyte_jax, or leave output_router_logits out"
    )
    for said, options in ((False, {"output_router_logits": True}), (True, {})):
        peer.config.output_router_logits = said
        with pytest.raises(ValueError) as caught:
            peer(TOKENS, **options)
        assert str(caught.value) == message


@pytest.mark.parametrize("way", ["_all", "_chosen"])
def test_an_expert_that_overflows_for_tokens_of_others_does_no_harm(way: str) -> None:
    """Forward and backward: an expert's numbers may be huge for tokens that it was never trained on."""
    experts = fresh(num_experts=4).model.layers[0].mlp.experts
    with torch.no_grad():
        experts.gate_up_proj[2] *= 1e30
    x_RD, weights_RC = torch.randn(5, 32, requires_grad=True), torch.full((5, 2), 0.5)
    experts_RC = torch.tensor([[0, 1], [1, 3], [3, 0], [0, 4], [1, 0]])  # 4: none
    out_RD = getattr(experts, way)(x_RD, experts_RC, weights_RC)
    expected = torch.zeros(5, 32)
    for token, chosen in enumerate(experts_RC.tolist()):
        for number in set(chosen) - {4}:
            gate, up = (experts.gate_up_proj[number] @ x_RD[token]).chunk(2)
            expected[token] += 0.5 * experts.down_proj[number] @ (torch.nn.functional.silu(gate) * up)
    torch.testing.assert_close(out_RD, expected)
    out_RD.square().sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in (x_RD, experts.gate_up_proj, experts.down_proj))
    assert not experts.down_proj.grad[2].any() and experts.down_proj.grad[3].any()
