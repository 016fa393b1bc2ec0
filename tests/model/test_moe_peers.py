"""The layer with experts beside that of DeepSeek-V3 in transformers: groups, negative biases, a shared expert."""

import dataclasses
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.hf_models import NEEDS_TORCH
from helpers.variants import BASE

from stellarbyte_jax.model.context import LayerContext
from stellarbyte_jax.model.io import LayerState
from stellarbyte_jax.model.moe import MoE

torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
theirs = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
if '"-inf"' not in inspect.getsource(theirs) or not hasattr(theirs, "DeepseekV3Experts"):
    pytest.skip("this release chooses experts of other groups where scores are below zero", allow_module_level=True)

D, E, F, ROWS, LENGTH = 16, 8, 4, 3, 9
SETTINGS: list[dict[str, Any]] = [
    {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
    {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": False},
    {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.5},
]


def peer_of(settings: dict[str, Any], weights: dict[str, Any]) -> Any:
    """Their layer with our weights."""
    config = theirs.DeepseekV3Config(
        hidden_size=D,
        moe_intermediate_size=F,
        n_routed_experts=E,
        num_experts_per_tok=3,
        n_shared_experts=1,
        **{"norm_topk_prob": True, **settings},
    )
    config._experts_implementation = "eager"
    peer = theirs.DeepseekV3MoE(config)
    w = jax.tree.map(np.asarray, weights)
    gate, up = (np.swapaxes(w["experts"]["gate_up"][:, :, i], 1, 2) for i in (0, 1))
    held = {
        "gate.weight": w["router"]["kernel"].T,
        "gate.e_score_correction_bias": w["router"]["tracked"]["bias"],
        "experts.gate_up_proj": np.concatenate([gate, up], axis=1),
        "experts.down_proj": np.swapaxes(w["experts"]["down"], 1, 2),
        "shared_experts.gate_proj.weight": w["shared"]["gate_up"][:, 0].T,
        "shared_experts.up_proj.weight": w["shared"]["gate_up"][:, 1].T,
        "shared_experts.down_proj.weight": w["shared"]["down"].T,
    }
    peer.load_state_dict({name: torch.from_numpy(np.array(x)) for name, x in held.items()})
    return peer


@pytest.mark.parametrize(("seed", "settings"), [*enumerate(SETTINGS)])
def test_outputs_and_slopes_are_those_of_transformers(seed: int, settings: dict[str, Any]) -> None:
    """All biased scores are below zero: what stands for experts of other groups must be lower than any."""
    moe = {"num_experts": E, "num_experts_per_tok": 3, "intermediate_size": F, "n_shared_experts": 1}
    config = dataclasses.replace(BASE, hidden_size=D, moe=moe | {"scoring_func": "sigmoid"} | settings)
    positions = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), (ROWS, LENGTH))
    ctx = LayerContext(positions, positions[:1], None, None)  # type: ignore[arg-type]
    random = np.random.default_rng(seed)

    def normal(*shape: int) -> jax.Array:
        return jax.device_put(np.asarray(random.standard_normal(shape), np.float32))

    x, slope = normal(ROWS, LENGTH, D), normal(ROWS, LENGTH, D)
    made = jax.eval_shape(lambda: MoE(config).init(jax.random.key(0), x, ctx, LayerState())["params"])
    weights = jax.tree.map(lambda box: normal(*box.value.shape), made, is_leaf=lambda box: hasattr(box, "use"))
    weights["router"]["tracked"]["bias"] = 0.3 * normal(E) - 2
    peer, x_there = peer_of(settings, weights), torch.from_numpy(np.array(x)).requires_grad_()

    def ours(weights: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = jax.device_put(MoE(config).apply({"params": weights}, x, ctx, LayerState())[0])
        return jnp.sum(out * slope), out

    (_, out), (of_weights, of_x) = jax.jit(jax.value_and_grad(ours, (0, 1), has_aux=True))(weights, x)
    expected = peer(x_there)
    np.testing.assert_allclose(out, expected.detach().numpy(), atol=1e-4)
    (expected * torch.from_numpy(np.array(slope))).sum().backward()
    assert x_there.grad is not None
    for found, peers in (
        (of_x, x_there.grad),
        (of_weights["router"]["kernel"].T, peer.gate.weight.grad),
        (of_weights["experts"]["down"].swapaxes(1, 2), peer.experts.down_proj.grad),
        (of_weights["shared"]["down"].T, peer.shared_experts.down_proj.weight.grad),
    ):
        np.testing.assert_allclose(found, peers.numpy(), atol=2e-3, rtol=1e-3)
        assert np.abs(found).max() > 0.1
