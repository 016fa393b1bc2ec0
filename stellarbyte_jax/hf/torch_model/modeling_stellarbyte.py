"""StellarByte language models for transformers, 4.5x and 5.

Loaded by ``AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)``; it needs torch and transformers
alone. The fields of :class:`StellarByteConfig` are those of stellarbyte_jax, which wrote this directory.

B batch, T new tokens, S keys (T of them new, others from the cache), N query heads, K key/value heads, H head size,
P = H/2 rotated pairs, D model, F feed-forward, L length of the attention mask, R = B T tokens of the call, E experts,
C choices of a token, Q features that a router reads.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import logging

logger = logging.get_logger(__name__)

_CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
_DYNAMIC_TAKES_CONFIG = "config" in inspect.signature(DynamicCache.__init__).parameters
_TIED = {"lm_head.weight": "model.embed_tokens.weight"}
_CHOICES = {
    "position_embedding": ("rope", "xpos", "stellarbyte"),
    "rope_pairing": ("half", "interleaved"),
    "mlp_style": ("gated", "stellarbyte"),
    "residual_scaling": ("none", "branch", "deepnorm"),
    "rms_norm_eps_rule": ("add", "clamp"),
}
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": None,
    "head_dim": None,
    "intermediate_size": None,
    "hidden_act": "silu",
    "mlp_style": "gated",
    "max_position_embeddings": 2048,
    "position_embedding": "rope",
    "rope_parameters": None,
    "rope_pairing": "half",
    "xpos_scale_base": 512.0,
    "xpos_learnable": False,
    "rms_norm_eps": 1e-5,
    "rms_norm_eps_rule": "add",
    "attention_bias": False,
    "attention_output_bias": False,
    "mlp_bias": False,
    "qk_norm": False,
    "attention_windows": None,
    "sink_tokens": 0,
    "attention_logit_softcap": None,
    "parallel_residual": False,
    "residual_scaling": "none",
    "layer_scale_init": None,
    "drop_path": 0.0,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "residual_dropout": 0.0,
    "initialization": None,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "use_cache": True,
    "moe": None,
}
_EXPERT_DEFAULTS: dict[str, Any] = {  # settings in "moe" that are read here; what they mean says config/moe.py
    "num_experts": 0,
    "num_experts_per_tok": 2,
    "intermediate_size": None,
    "n_shared_experts": 0,
    "first_k_dense_replace": 0,
    "decoder_sparse_step": 1,
    "mlp_only_layers": (),
    "shared_pool": False,
    "gate": "linear",
    "context_size": 64,
    "gate_intermediate_size": None,
    "history_decay": 0.0,
    "scoring_func": "softmax",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "dynamic_k": None,
    "noise": "none",
    "temperature": 1.0,
    "adaptive_temperature": False,
    "expert_priority": False,
    "cooling_steps": 0,
    "rebalance_interval": None,
}
_EXPERT_CHOICES = {"gate": ("linear", "context"), "scoring_func": ("softmax", "sigmoid")}
_LEAST_SUM = 1e-18  # of scores that something is divided by
_FEW_TOKENS = 64  # that many in every expert are hardly more work than reading its weights
_GROUPED = "enable_gqa" in (F.scaled_dot_product_attention.__doc__ or "")  # torch 2.5
_LARGEST_EXPONENT = 80.0  # of a factor that float32 and bfloat16 can hold
_XPOS_GAMMA = 0.4  # of the XPos paper
_FASTEST_XPOS = -math.log(_XPOS_GAMMA / (1 + _XPOS_GAMMA))


class StellarByteConfig(PretrainedConfig):
    """Settings of the network, under the names of stellarbyte_jax.

    ``attention_windows`` has the window of each layer, null where it sees every earlier token. ``layer_types`` and
    ``sliding_window`` say the same to the caches of transformers, which drop what is out of a window; with
    ``sink_tokens`` nothing may be dropped, and they name no window. ``moe`` has the settings of layers with experts,
    null where there are none.
    """

    model_type = "stellarbyte"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # the Trainer adds a list to it

    def __init__(self, **settings: Any):
        """Keeps the settings, :data:`_DEFAULTS` for absent ones; raises ValueError for what does not exist."""
        values = {name: settings.pop(name, default) for name, default in _DEFAULTS.items()}
        for name, choices in _CHOICES.items():
            if values[name] not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {values[name]!r}")
        layers = values["num_hidden_layers"]
        values["num_key_value_heads"] = values["num_key_value_heads"] or values["num_attention_heads"]
        values["head_dim"] = values["head_dim"] or values["hidden_size"] // values["num_attention_heads"]
        values["intermediate_size"] = values["intermediate_size"] or 4 * values["hidden_size"]
        values["attention_windows"] = list(values["attention_windows"] or [None] * layers)
        values["rope_parameters"] = values["rope_parameters"] or {"rope_type": "default", "rope_theta": 10000.0}
        if len(values["attention_windows"]) != layers:
            raise ValueError(f"attention_windows names {len(values['attention_windows'])} of {layers} layers")
        droppable = [None if values["sink_tokens"] else window for window in values["attention_windows"]]
        values["layer_types"] = ["full_attention" if w is None else "sliding_attention" for w in droppable]
        values["sliding_window"] = next((w for w in droppable if w is not None), None)
        if values["moe"]:
            values["moe"] = moe = {**_EXPERT_DEFAULTS, **values["moe"]}
            for name, choices in _EXPERT_CHOICES.items():
                if moe[name] not in choices:
                    raise ValueError(f"moe.{name} must be one of {', '.join(choices)}, got {moe[name]!r}")
            if moe["history_decay"]:
                raise ValueError("moe.history_decay must be 0: no cache here keeps the mean of earlier tokens")
        for name, value in values.items():
            setattr(self, name, value)
        super().__init__(**{**settings, **values})

    def has_experts(self, layer: int) -> bool:
        """Whether this layer, from 0, has experts and not one MLP."""
        return bool(
            self.moe
            and layer >= self.moe["first_k_dense_replace"]
            and (layer + 1) % self.moe["decoder_sparse_step"] == 0
            and layer not in self.moe["mlp_only_layers"]
        )


class StellarByteNorm(nn.Module):
    """RMSNorm (Zhang and Sennrich 2019) with float32 statistics."""

    def __init__(self, size: int, config: StellarByteConfig, eps: float | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps or config.rms_norm_eps
        self.clamp = config.rms_norm_eps_rule == "clamp"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., size] to the same."""
        x32 = x.float()
        square = x32.square().mean(-1, keepdim=True)
        square = square.clamp(min=self.eps) if self.clamp else square + self.eps
        return (x32 * square.rsqrt() * self.weight.float()).to(x.dtype)


class Call:
    """What the layers of a call share: where its tokens stand, what they see, and how they are rotated."""

    def __init__(
        self,
        config: StellarByteConfig,
        positions_BT: torch.Tensor,
        slots_T: torch.Tensor,
        mask_BL: torch.Tensor | None,
        segments_BT: torch.Tensor | None,
        cache: Any,
        weights: bool,
        pool: "StellarByteExperts | None",
    ):
        self.config = config
        self.positions_BT = positions_BT  # of each new token in its text
        self.slots_T = slots_T  # index of each new token in its row, padding counted
        self.mask_BL = mask_BL  # 1 for tokens, 0 for padding; None where there is none
        self.segments_BT = segments_BT  # text of each token, where rows hold several; None where they do not
        self.cache = cache
        self.weights = weights  # whether attention weights are asked for
        self.pool = pool  # experts that all layers share; None where each has its own
        self._made: dict[Any, Any] = {}  # on each device: layers may lie on several

    def keys(self, S: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Slots [S] and positions [B or 1, S] of the keys that a layer has, those of the call included."""
        if ("keys", S, device) not in self._made:
            found = self.slots_T.to(device), self.positions_BT.to(device)
            if self.cache is not None:  # one that keeps the end of a text gives fewer keys, one of fixed size more
                slots_S = torch.arange(S, device=device) + (found[0][-1] + 1 - S).clamp(min=0)
                found = slots_S, slots_S[None]
                if self.mask_BL is not None:
                    positions_BL = token_positions(self.mask_BL.to(device))
                    found = slots_S, positions_BL[:, slots_S.clamp(max=positions_BL.shape[1] - 1)]
            self._made["keys", S, device] = found
        return self._made["keys", S, device]

    def visible(self, S: int, window: int | None, device: torch.device) -> torch.Tensor | None:
        """Which keys each query sees, bool [B or 1, 1, T, S]; None where it is every key that is not later."""
        T = self.slots_T.shape[0]
        window = None if window is None or window >= S else window
        if window is None and self.mask_BL is None and self.segments_BT is None and T in (1, S):
            if not getattr(self.cache, "is_compileable", False):  # those have slots that hold nothing yet
                return None
        if (S, window, device) not in self._made:
            slots_T, (slots_S, positions_BS) = self.slots_T.to(device), self.keys(S, device)
            seen_BTS = (slots_S[None, :] <= slots_T[:, None])[None]
            if window is not None:
                near_BTS = self.positions_BT.to(device)[:, :, None] - positions_BS[:, None, :] < window
                seen_BTS = seen_BTS & (near_BTS | (positions_BS < self.config.sink_tokens)[:, None, :])
            if self.segments_BT is not None:
                segments_BT = self.segments_BT.to(device)
                seen_BTS = seen_BTS & (segments_BT[:, :, None] == segments_BT[:, None, :])
            if self.mask_BL is not None:
                mask_BL = self.mask_BL.to(device).bool()
                real_BS = mask_BL[:, slots_S.clamp(max=mask_BL.shape[1] - 1)] & (slots_S < mask_BL.shape[1])
                itself_TS = slots_S[None, :] == slots_T[:, None]  # so that padding has something to attend to
                seen_BTS = (seen_BTS & real_BS[:, None, :]) | itself_TS[None]
            self._made[S, window, device] = seen_BTS[:, None]
        return self._made[S, window, device]

    def frequencies(self, device: torch.device) -> tuple[torch.Tensor, float]:
        """Angle of each pair from a position to the next, [P] or [B, 1 or T, P], and a factor of cosines and sines."""
        if ("frequencies", device) not in self._made:
            lengths_BT = None
            if self.config.rope_parameters["rope_type"] == "dynamic":
                positions_BT = self.positions_BT.to(device)
                lengths_BT = positions_BT.amax(1, keepdim=True) + 1
                if self.segments_BT is not None:
                    segments_BT = self.segments_BT.to(device)
                    longest = torch.zeros_like(positions_BT).scatter_reduce(1, segments_BT, positions_BT, "amax")
                    lengths_BT = longest.gather(1, segments_BT) + 1
            self._made["frequencies", device] = rotary_frequencies(self.config, lengths_BT, device)
        return self._made["frequencies", device]

    def rotation(self, S: int | None, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of the angles of the call's tokens, or of ``S`` keys, float32 [B or 1, 1, T or S, P]."""
        if ("rotation", S, device) not in self._made:
            frequencies, magnitude = self.frequencies(device)
            positions = self.positions_BT.to(device) if S is None else self.keys(S, device)[1]
            angles = (positions[..., None].float() * frequencies)[:, None]
            self._made["rotation", S, device] = angles.cos() * magnitude, angles.sin() * magnitude
        return self._made["rotation", S, device]

    def distances(self, S: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Distances of the tokens from an origin, and of it from ``S`` keys, over the base, [B or 1, 1, T or S, 1]."""
        if ("distances", S, device) not in self._made:
            positions_BT, positions_BS = self.positions_BT.to(device), self.keys(S, device)[1]
            if self.config.position_embedding == "stellarbyte":
                origin = self.config.max_position_embeddings // 2
            else:  # it cancels, and floats hold the factors of a row best with the origin in its middle
                origin = (positions_BT.amin(1, keepdim=True) + positions_BT.amax(1, keepdim=True)) // 2
            base = self.config.xpos_scale_base
            both = ((x[:, None, :, None].float() / base) for x in (positions_BT - origin, origin - positions_BS))
            self._made["distances", S, device] = tuple(both)
        return self._made["distances", S, device]


def _is_packed(positions_BT: torch.Tensor | None) -> bool:
    """Whether rows hold several texts: positions begin anew."""
    if positions_BT is None or torch.compiler.is_compiling():
        return False
    return bool((positions_BT.diff(dim=-1) != 1).any())


def _unrounded(tensors: Callable[[], list[torch.Tensor]], apply: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What ``Module._apply`` gives, with these tensors moved along but not to 16 bits, as ``model.half()`` asks for."""
    before = [x.detach() for x in tensors()]
    result = apply(*args, **options)
    for held, x in zip(before, tensors(), strict=True):
        if x.is_floating_point() and x.element_size() < 4:
            x.data = held.to(x.device)
    return result


def token_positions(mask_BL: torch.Tensor) -> torch.Tensor:
    """Position of each token in its text, int64 [B, L], where padding (0) may stand anywhere."""
    return (mask_BL.long().cumsum(-1) - 1).clamp(min=0)


def rotary_frequencies(
    config: StellarByteConfig, lengths_BT: torch.Tensor | None, device: torch.device
) -> tuple[torch.Tensor, float]:
    """Frequencies of RoPE (Su et al. 2021) with the scaling of the settings, float32, and a factor of the rotation."""
    rope, H = config.rope_parameters, config.head_dim
    kind, factor, trained = rope["rope_type"], rope.get("factor", 1.0), config.max_position_embeddings
    theta, original = rope["rope_theta"], rope.get("original_max_position_embeddings") or trained
    channel_P = torch.arange(0, H, 2, dtype=torch.float32, device=device)
    plain_P = theta ** -(channel_P / H)
    if kind == "default":
        return plain_P, 1.0
    if kind == "linear":
        return plain_P / factor, 1.0
    if kind == "dynamic":
        growth_BT1 = (1 + factor * (lengths_BT - trained).clamp(min=0).float() / trained)[..., None]
        return plain_P * growth_BT1 ** -(channel_P / max(H - 2, 1)), 1.0
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept_P = ((plain_P * (original / (2 * math.pi)) - low) / (high - low)).clamp(0, 1)
        return plain_P / factor * (1 - kept_P) + plain_P * kept_P, 1.0
    if kind == "yarn":

        def pair_with(rotations: float) -> float:
            return H * math.log(original / (2 * math.pi * rotations)) / (2 * math.log(theta))

        first = max(math.floor(pair_with(rope.get("beta_fast") or 32.0)), 0)
        last = min(math.ceil(pair_with(rope.get("beta_slow") or 1.0)), H - 1)
        stretched_P = ((channel_P / 2 - first) / (last - first or 1)).clamp(0, 1)
        magnitude = rope.get("attention_factor") or 0.1 * math.log(factor) + 1.0
        return plain_P / factor * stretched_P + plain_P * (1 - stretched_P), magnitude
    raise ValueError(f"rope_type must be default, linear, dynamic, llama3 or yarn, got {kind!r}")


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, pairing: str) -> torch.Tensor:
    """[B, heads, S, H] with each pair of channels rotated, in float32; ``cos`` and ``sin`` are [B or 1, 1, S, P]."""
    x32 = x.float()
    first, second = x32.chunk(2, -1)
    if pairing == "half":
        rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    elif pairing == "interleaved":
        even, odd = x32[..., 0::2], x32[..., 1::2]
        rotated = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)
    else:  # mixed: the original StellarByte's, no rotation, for weights that were trained with it
        even, odd = x32[..., 0::2], x32[..., 1::2]
        rotated = torch.cat([first * cos - odd * sin, second * cos + even * sin], -1)
    return rotated.to(x.dtype)


def decayed(x: torch.Tensor, factors: torch.Tensor, pairing: str) -> torch.Tensor:
    """[B, heads, S, H] with the channels of each pair times the factor of the pair, [B or 1, 1, S, P]."""
    if pairing == "interleaved":
        return (x.unflatten(-1, (-1, 2)) * factors[..., None]).flatten(-2).to(x.dtype)
    return (x.unflatten(-1, (2, -1)) * factors[..., None, :]).flatten(-2).to(x.dtype)


class StellarByteAttention(nn.Module):
    """Grouped-query attention with the rotation, window and cache of its layer."""

    def __init__(self, config: StellarByteConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        D, N, K, H = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = nn.Linear(D, N * H, bias=config.attention_bias)
        self.k_proj = nn.Linear(D, K * H, bias=config.attention_bias)
        self.v_proj = nn.Linear(D, K * H, bias=config.attention_bias)
        self.o_proj = nn.Linear(N * H, D, bias=config.attention_output_bias)
        if config.qk_norm:
            self.q_norm, self.k_norm = StellarByteNorm(H, config), StellarByteNorm(H, config)
        if config.xpos_learnable:
            self.xpos_rate = nn.Parameter(self._first_rates(torch.device("cpu")))
        self.pairing = "mixed" if config.position_embedding == "stellarbyte" else config.rope_pairing
        kind = config.rope_parameters["rope_type"]
        self.caches_rotated = kind != "dynamic" and config.position_embedding != "stellarbyte"

    def _apply(self, *args: Any, **options: Any) -> Any:
        learned = self.config.xpos_learnable
        return _unrounded(lambda: [self.xpos_rate] if learned else [], super()._apply, *args, **options)

    def _first_rates(self, device: torch.device) -> torch.Tensor:
        share_P = torch.arange(0, self.config.head_dim, 2, dtype=torch.float32, device=device) / self.config.head_dim
        if self.config.position_embedding == "stellarbyte":
            return -share_P  # the original's, which grow scores with distance
        return -torch.log((share_P + _XPOS_GAMMA) / (1 + _XPOS_GAMMA))

    def forward(self, x_BTD: torch.Tensor, call: Call) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[B, T, D] to the same, and attention weights [B, N, T, S] where they are asked for."""
        c, (B, T, _), device = self.config, x_BTD.shape, x_BTD.device
        q, k, v = (w(x_BTD).view(B, T, -1, c.head_dim) for w in (self.q_proj, self.k_proj, self.v_proj))
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        cos_sin = call.rotation(None, device)
        if self.caches_rotated:
            k = rotate(k, *cos_sin, self.pairing)
        window = c.attention_windows[self.layer_idx]
        if call.cache is not None:
            about = {"cache_position": call.slots_T.to(device), "sliding_window": window}
            k, v = call.cache.update(k, v, self.layer_idx, about)
        S = k.shape[2]
        if c.position_embedding != "rope":
            q_factors, k_factors = self._factors(call, S, device)
            k = decayed(k, k_factors, self.pairing)
            if self.pairing == "mixed":  # whose rotation takes channels of several pairs together
                q = decayed(q, q_factors, self.pairing)
            else:
                cos_sin = tuple(x * q_factors for x in cos_sin)
        q = rotate(q, *cos_sin, self.pairing)
        if not self.caches_rotated:
            k = rotate(k, *call.rotation(S, device), self.pairing)
        out_BNTH, weights = self._attend(q, k, v, call.visible(S, window, device), call.weights)
        out_BTD = self.o_proj(out_BNTH.transpose(1, 2).reshape(B, T, -1))
        return F.dropout(out_BTD, c.residual_dropout, self.training), weights

    def _factors(self, call: Call, S: int, device: torch.device) -> list[torch.Tensor]:
        """What queries and keys are multiplied with, so that scores change with the distance; growth is clipped."""
        c = self.config
        rates_P = self.xpos_rate.float() if c.xpos_learnable else self._first_rates(device)
        if c.xpos_learnable and c.position_embedding == "xpos":
            rates_P = rates_P.clamp(max=2 * _FASTEST_XPOS)
        return [(-rates_P * each).clamp(max=_LARGEST_EXPONENT).exp() for each in call.distances(S, device)]

    def _attend(self, q, k, v, seen: torch.Tensor | None, weights_too: bool):
        c, (B, N, T, H), S = self.config, q.shape, k.shape[2]
        dropout = c.attention_dropout if self.training else 0.0
        fused = c._attn_implementation != "eager" and c.attention_logit_softcap is None and not weights_too
        causal = seen is None and T > 1
        if fused and seen is None and _GROUPED:  # with a mask, the quick kernels take no groups
            grouped = {"dropout_p": dropout, "is_causal": causal, "enable_gqa": True}
            return F.scaled_dot_product_attention(q, k, v, **grouped), None
        k, v = (x[:, :, None].expand(B, x.shape[1], N // x.shape[1], S, H).reshape(B, N, S, H) for x in (k, v))
        if fused:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=dropout, is_causal=causal), None
        scores = (q @ k.transpose(-1, -2)).float() * H**-0.5
        if c.attention_logit_softcap is not None:
            scores = c.attention_logit_softcap * torch.tanh(scores / c.attention_logit_softcap)
        if seen is None and T > 1:
            seen = torch.ones(T, S, dtype=torch.bool, device=q.device).tril()
        if seen is not None:
            scores = scores.masked_fill(~seen, torch.finfo(torch.float32).min)
        weights = scores.softmax(-1)
        return F.dropout(weights, dropout, self.training).to(v.dtype) @ v, weights.to(v.dtype)


class StellarByteMLP(nn.Module):
    """The feed-forward layer: gated (Shazeer 2020), or the original StellarByte's."""

    def __init__(self, config: StellarByteConfig, size: int | None = None):
        super().__init__()
        self.config = config
        D, F_ = config.hidden_size, size or config.intermediate_size
        self.dropout = 0.0 if size else config.hidden_dropout  # of shared experts it is that of the layer
        self.gate_proj = nn.Linear(D, F_, bias=config.mlp_bias)
        self.up_proj = nn.Linear(D, F_, bias=config.mlp_bias)
        self.down_proj = nn.Linear(F_, D, bias=config.mlp_bias)
        if config.mlp_style == "stellarbyte":
            self.norm = StellarByteNorm(D, config, eps=1e-6)

    def forward(self, x_BTD: torch.Tensor, call: Call | None = None) -> torch.Tensor:
        """[B, T, D] to the same, whatever the call."""
        if self.config.mlp_style == "stellarbyte":
            n_BTD = self.norm(x_BTD)
            out_BTD = self.down_proj(F.silu(self.up_proj(n_BTD)) * torch.sigmoid(self.gate_proj(n_BTD))) + x_BTD
        else:
            out_BTD = self.down_proj(ACT2FN[self.config.hidden_act](self.gate_proj(x_BTD)) * self.up_proj(x_BTD))
        return F.dropout(out_BTD, self.dropout, self.training)


class StellarByteContext(nn.Module):
    """Features of a token for the original's gate, float32: itself, a small network's view of it, and its position."""

    def __init__(self, config: StellarByteConfig):
        super().__init__()
        D, size, last = config.hidden_size, config.moe["context_size"], max(1, config.moe["context_size"] // 2)
        inside, self.size = config.moe["gate_intermediate_size"] or size, D + size + last
        self.context_in = nn.Parameter(torch.zeros(inside, D))
        self.context_out = nn.Parameter(torch.zeros(size, inside))
        self.position = nn.Parameter(torch.zeros(config.max_position_embeddings, last))
        self.mlp_gate = nn.Parameter(torch.zeros(inside, self.size))
        self.mlp_up = nn.Parameter(torch.zeros(inside, self.size))
        self.mlp_down = nn.Parameter(torch.zeros(self.size, inside))
        self.norm = StellarByteNorm(self.size, config)

    def forward(self, x_BTD: torch.Tensor, positions_BT: torch.Tensor) -> torch.Tensor:
        """[B, T, D] to [B, T, Q]."""
        view = F.linear(F.gelu(F.linear(x_BTD, self.context_in.float())), self.context_out.float())
        place = self.position.float()[positions_BT.clamp(max=self.position.shape[0] - 1)]
        z_BTQ = self.norm(torch.cat([x_BTD, view, place], -1))
        h_BTI = F.silu(F.linear(z_BTQ, self.mlp_gate.float())) * F.linear(z_BTQ, self.mlp_up.float())
        return z_BTQ + F.linear(h_BTI, self.mlp_down.float())


class StellarByteRouter(nn.Module):
    """Which experts tokens go to, in float32 whatever the dtype of the model.

    What stellarbyte_jax renews in each step of its training are buffers. They count here, and nothing here renews them;
    noise of the scores, its warm-up and capacities of experts are of that training alone, too.
    """

    def __init__(self, config: StellarByteConfig):
        super().__init__()
        self.config, D, E = config, config.hidden_size, config.moe["num_experts"]
        self.context = StellarByteContext(config) if config.moe["gate"] == "context" else None
        self.weight = nn.Parameter(torch.zeros(E, D if self.context is None else self.context.size))
        if config.moe["adaptive_temperature"]:
            self.temperature = nn.Parameter(torch.ones(1))
        if config.moe["noise"] == "noisy_topk":
            self.register_buffer("noise", torch.zeros(E, D))
        for name in ("load", "utilization", "priority", "bias", "coldness"):
            self.register_buffer(name, torch.zeros(E))
        self.register_buffer("steps", torch.zeros(1))
        if config.moe["rebalance_interval"] is not None:
            self.register_buffer("twin", torch.zeros(E))
            self.register_buffer("twin_steps", torch.zeros(E))
        self.float()  # also in a model that is made in 16 bits

    def _apply(self, *args: Any, **options: Any) -> Any:
        return _unrounded(lambda: [*self.parameters(), *self.buffers()], super()._apply, *args, **options)

    def reset(self) -> None:
        """First values of what is no matrix."""
        first = {"load": 1 / self.weight.shape[0], "utilization": 0.5, "priority": 1.0}
        first |= {"temperature": self.config.moe["temperature"]} if self.config.moe["adaptive_temperature"] else {}
        for name in (*self._buffers, *first):
            nn.init.constant_(getattr(self, name), first.get(name, 0.0))
        if "twin" in self._buffers:
            self.twin.copy_(torch.arange(self.twin.shape[0]))

    def forward(self, x_BTD: torch.Tensor, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
        """Experts [R, C] of tokens [B, T, D], E for none, and what their outputs are multiplied with, float32."""
        kind = x_BTD.device.type
        with torch.autocast("cpu" if kind in ("meta", "mps") else kind, enabled=False):
            scores_RE = self._scores(x_BTD.float(), call.positions_BT.to(x_BTD.device)).flatten(0, 1)
        m, E = self.config.moe, scores_RE.shape[1]
        ranked_RE = scores_RE + self.bias.float()  # for the choice alone
        if m["rebalance_interval"] is not None:
            ranked_RE = ranked_RE.masked_fill(
                self._hidden(call.positions_BT.to(x_BTD.device)).flatten(0, 1), -torch.inf
            )
        if m["topk_group"] < m["n_group"]:
            ranked_RGE = ranked_RE.unflatten(1, (m["n_group"], -1))
            best_RG = ranked_RGE.topk(min(2, ranked_RGE.shape[2]), -1).values.sum(-1)
            lost_RG = torch.ones_like(best_RG, dtype=torch.bool).scatter(1, _best(best_RG, m["topk_group"]), False)
            ranked_RE = ranked_RGE.masked_fill(lost_RG[..., None], -torch.inf).flatten(1)
        experts_RC = _best(ranked_RE, m["num_experts_per_tok"])
        weights_RC = scores_RE.gather(1, experts_RC)
        if m["dynamic_k"] is not None:
            shares_RC = weights_RC / scores_RE.sum(1, keepdim=True).clamp(min=_LEAST_SUM)
            needed_RC = shares_RC.cumsum(1) - shares_RC < m["dynamic_k"]
            experts_RC, weights_RC = experts_RC.where(needed_RC, E), weights_RC.where(needed_RC, 0.0)
        if m["norm_topk_prob"]:
            weights_RC = weights_RC / weights_RC.sum(1, keepdim=True).clamp(min=_LEAST_SUM)
        return experts_RC, weights_RC * m["routed_scaling_factor"]

    def _scores(self, x_BTD: torch.Tensor, positions_BT: torch.Tensor) -> torch.Tensor:
        m = self.config.moe
        x_BTQ = x_BTD if self.context is None else self.context(x_BTD, positions_BT)
        logits_BTE = F.linear(x_BTQ, self.weight.float())
        if m["expert_priority"]:
            logits_BTE = logits_BTE + self.priority.float().log()
        if m["cooling_steps"]:
            logits_BTE = logits_BTE + self.coldness.float().log1p()
        temperature = m["temperature"]
        if m["adaptive_temperature"]:
            load_E = self.load.float()
            uneven = load_E.std(correction=0) / (load_E.mean() + 1e-6)
            temperature = (self.temperature.float().abs() * (1 + uneven)).clamp(min=0.3)
        logits_BTE = logits_BTE / temperature
        if m["rebalance_interval"] is not None:
            logits_BTE = logits_BTE.masked_fill(self._hidden(positions_BT), -torch.inf)
        return logits_BTE.softmax(-1) if m["scoring_func"] == "softmax" else logits_BTE.sigmoid()

    def _hidden(self, positions_BT: torch.Tensor) -> torch.Tensor:
        """Experts [B, T, E] that a token does not see: of one that was split lately, the half of other positions."""
        own_E = torch.arange(self.twin.shape[0], device=positions_BT.device)
        twin_E = torch.where(self.twin_steps > 0.5, self.twin.round(), own_E.float())
        return torch.where(positions_BT[..., None] % 2 == 1, own_E < twin_E, own_E > twin_E)


def _best(values: torch.Tensor, k: int) -> torch.Tensor:
    """Indices of the k largest of the last axis, of equals the first ones, which ``topk`` does not promise."""
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :k]


class StellarByteExperts(nn.Module):
    """Gated MLPs, each for its tokens, under the names of transformers 5."""

    def __init__(self, config: StellarByteConfig):
        super().__init__()
        D, E = config.hidden_size, config.moe["num_experts"]
        F_ = config.moe["intermediate_size"] or config.intermediate_size
        self.act = ACT2FN[config.hidden_act]
        self.gate_up_proj = nn.Parameter(torch.zeros(E, 2 * F_, D))
        self.down_proj = nn.Parameter(torch.zeros(E, D, F_))

    def forward(self, x_RD: torch.Tensor, experts_RC: torch.Tensor, weights_RC: torch.Tensor) -> torch.Tensor:
        """Weighted sums of what the experts of each token give, float32 [R, D]."""
        if torch.compiler.is_compiling() and x_RD.shape[0] <= _FEW_TOKENS:
            return self._all(x_RD, experts_RC, weights_RC)
        return self._chosen(x_RD, experts_RC, weights_RC)

    def _all(self, x_RD: torch.Tensor, experts_RC: torch.Tensor, weights_RC: torch.Tensor) -> torch.Tensor:
        """By every expert for every token, a program whose shapes do not depend on the choices."""
        E = self.down_proj.shape[0]
        weights_RE = weights_RC.new_zeros(len(x_RD), E + 1).scatter(1, experts_RC, weights_RC)[:, :E]
        # Zeros where it is not chosen: an expert may overflow for tokens that are not its own, and 0 times inf is NaN.
        x_ERD = torch.where((weights_RE.T != 0)[..., None], x_RD, 0.0)
        gate_ERF, up_ERF = (x_ERD @ self.gate_up_proj.transpose(1, 2)).chunk(2, -1)
        y_ERD = (self.act(gate_ERF) * up_ERF) @ self.down_proj.transpose(1, 2)
        return (weights_RE.T[..., None] * y_ERD.float()).sum(0)

    @torch.compiler.disable  # which would make a program for each distribution of tokens
    def _chosen(self, x_RD: torch.Tensor, experts_RC: torch.Tensor, weights_RC: torch.Tensor) -> torch.Tensor:
        """By the experts that have tokens, one after another."""
        E, chosen = self.down_proj.shape[0], experts_RC.flatten()
        pairs = chosen.argsort(stable=True).split(chosen.bincount(minlength=E + 1).tolist())
        out_RD = torch.zeros_like(x_RD, dtype=torch.float32)
        # Apart by unbind, whose gradient is one stack; that of an index would be as large as all experts for each.
        for own, gate_up, down in zip(pairs[:E], self.gate_up_proj.unbind(), self.down_proj.unbind(), strict=True):
            if len(own):
                tokens = own // experts_RC.shape[1]
                gate, up = F.linear(x_RD[tokens], gate_up).chunk(2, -1)
                y = F.linear(self.act(gate) * up, down).float() * weights_RC.flatten()[own, None]
                out_RD.index_add_(0, tokens, y)
        return out_RD


class StellarByteMoE(nn.Module):
    """Mixture of experts (Shazeer et al. 2017), and shared experts, which every token passes."""

    def __init__(self, config: StellarByteConfig):
        super().__init__()
        self.config, m = config, config.moe
        self.router = StellarByteRouter(config)
        self.experts = None if m["shared_pool"] else StellarByteExperts(config)
        shared = m["n_shared_experts"] * (m["intermediate_size"] or config.intermediate_size)
        self.shared_experts = StellarByteMLP(config, shared) if shared else None

    def forward(self, x_BTD: torch.Tensor, call: Call) -> torch.Tensor:
        """[B, T, D] to the same."""
        experts = call.pool if self.experts is None else self.experts
        out_RD = experts(x_BTD.flatten(0, 1), *self.router(x_BTD, call))
        out_BTD = out_RD.to(x_BTD).view_as(x_BTD)  # a pool may lie on another device
        if self.shared_experts is not None:
            out_BTD = out_BTD + self.shared_experts(x_BTD)
        return F.dropout(out_BTD, self.config.hidden_dropout, self.training)


class StellarByteLayer(nn.Module):
    """Attention and feed-forward layer in the residual style of the settings."""

    def __init__(self, config: StellarByteConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.self_attn = StellarByteAttention(config, layer_idx)
        self.mlp = StellarByteMoE(config) if config.has_experts(layer_idx) else StellarByteMLP(config)
        self.input_layernorm = StellarByteNorm(config.hidden_size, config)
        if not config.parallel_residual:
            self.post_attention_layernorm = StellarByteNorm(config.hidden_size, config)
        self.attn_scale = self.mlp_scale = None
        if config.layer_scale_init is not None:  # Touvron et al. 2021
            self.attn_scale = nn.Parameter(torch.full((config.hidden_size,), config.layer_scale_init))
            self.mlp_scale = nn.Parameter(torch.full((config.hidden_size,), config.layer_scale_init))
        self.branch_factor = (2 * config.num_hidden_layers) ** -0.5 if config.residual_scaling == "branch" else None
        self.drop_path = config.drop_path * layer_idx / max(1, config.num_hidden_layers - 1)

    def _scale(self, h_BTD: torch.Tensor, scale_D: torch.Tensor | None) -> torch.Tensor:
        h_BTD = h_BTD if scale_D is None else h_BTD * scale_D.to(h_BTD.dtype)
        return h_BTD if self.branch_factor is None else h_BTD * self.branch_factor

    def _drop(self, h_BTD: torch.Tensor) -> torch.Tensor:
        if self.drop_path == 0 or not self.training:  # Huang et al. 2016
            return h_BTD
        keep_B11 = torch.rand(h_BTD.shape[0], 1, 1, device=h_BTD.device) >= self.drop_path
        return torch.where(keep_B11, h_BTD / (1 - self.drop_path), torch.zeros_like(h_BTD))

    def forward(self, x_BTD: torch.Tensor, call: Call) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[B, T, D] to the same, and attention weights where they are asked for."""
        if self.config.residual_scaling == "deepnorm":  # Wang et al. 2022
            alpha = (2 * self.config.num_hidden_layers) ** 0.25
            h_BTD, weights = self.self_attn(x_BTD, call)
            x_BTD = self.input_layernorm(alpha * x_BTD + self._drop(self._scale(h_BTD, self.attn_scale)))
            h_BTD = self.mlp(x_BTD, call)
            return self.post_attention_layernorm(
                alpha * x_BTD + self._drop(self._scale(h_BTD, self.mlp_scale))
            ), weights
        n_BTD = self.input_layernorm(x_BTD)
        h_BTD, weights = self.self_attn(n_BTD, call)
        h_BTD = self._scale(h_BTD, self.attn_scale)
        if self.config.parallel_residual:
            return x_BTD + self._drop(h_BTD + self._scale(self.mlp(n_BTD, call), self.mlp_scale)), weights
        x_BTD = x_BTD + self._drop(h_BTD)
        h_BTD = self.mlp(self.post_attention_layernorm(x_BTD), call)
        return x_BTD + self._drop(self._scale(h_BTD, self.mlp_scale)), weights


class StellarBytePreTrainedModel(PreTrainedModel):
    """What both models have in common."""

    config_class = StellarByteConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["StellarByteLayer", "StellarByteExperts"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_cache_class = True
    _supports_static_cache = True
    _can_compile_fullgraph = True

    def __init__(self, config: StellarByteConfig):
        super().__init__(config)
        # 16 bits would change what a distant key counts, and which experts a token has.
        exact = {"xpos_rate": config.xpos_learnable, "router": config.moe}
        if any(exact.values()):  # names that are absent are refused
            self._keep_in_fp32_modules_strict = {name for name, present in exact.items() if present}

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.base_model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the embedding."""
        self.base_model.embed_tokens = value

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, StellarByteNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, StellarByteLayer) and module.attn_scale is not None:
            nn.init.constant_(module.attn_scale, self.config.layer_scale_init)
            nn.init.constant_(module.mlp_scale, self.config.layer_scale_init)
        elif isinstance(module, StellarByteAttention) and self.config.xpos_learnable:
            with torch.no_grad():
                module.xpos_rate.copy_(module._first_rates(module.xpos_rate.device))
        elif isinstance(module, StellarByteExperts | StellarByteContext | StellarByteRouter):
            for weight in module.parameters(recurse=False):
                nn.init.normal_(weight, std=self.config.initializer_range)
            if isinstance(module, StellarByteRouter):
                module.reset()


class StellarByteModel(StellarBytePreTrainedModel):
    """The network without its head."""

    def __init__(self, config: StellarByteConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(StellarByteLayer(config, i) for i in range(config.num_hidden_layers))
        self.experts = StellarByteExperts(config) if config.moe and config.moe["shared_pool"] else None
        # After a post-norm the stream is normalised already.
        deepnorm = config.residual_scaling == "deepnorm"
        self.norm = nn.Identity() if deepnorm else StellarByteNorm(config.hidden_size, config)
        self.gradient_checkpointing = False
        if config.attention_logit_softcap is not None and config._attn_implementation != "eager":
            logger.info("attention: computed as with eager, since %s has no soft cap", config._attn_implementation)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Hidden states [B, T, D] of tokens [B, T].

        ``attention_mask`` is 1 for tokens and 0 for padding, [B, tokens of the cache + T]. Without one and without a
        cache, positions that begin anew begin another text, and no cache is made. ``cache`` is the newer name of
        ``past_key_values``.
        """
        c = self.config
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, and not both")
        if kwargs.get("output_router_logits", getattr(c, "output_router_logits", False)):
            raise ValueError(
                "output_router_logits: this model gives no logits of routers and no loss of their balance: train it "
                "with stellarbyte_jax, or leave output_router_logits out"
            )
        x_BTD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        recomputes = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        use_cache = (c.use_cache if use_cache is None else use_cache) and not recomputes
        if not use_cache:
            cache = None
        elif cache is None and not (attention_mask is None and _is_packed(position_ids)):
            cache = DynamicCache(config=c) if _DYNAMIC_TAKES_CONFIG else DynamicCache()
        weights_too = c.output_attentions if output_attentions is None else output_attentions
        call = self._call(x_BTD, attention_mask, position_ids, cache, bool(weights_too))
        x_BTD = F.dropout(x_BTD, c.hidden_dropout, self.training)
        states, weights = [x_BTD], []
        for layer in self.layers:
            if recomputes:
                x_BTD, w = self._gradient_checkpointing_func(layer.__call__, x_BTD, call)
            else:
                x_BTD, w = layer(x_BTD, call)
            states.append(x_BTD)
            weights.append(w)
        x_BTD = self.norm(x_BTD)
        hidden = c.output_hidden_states if output_hidden_states is None else output_hidden_states
        output = BaseModelOutputWithPast(
            last_hidden_state=x_BTD,
            hidden_states=(*states[:-1], x_BTD) if hidden else None,
            attentions=tuple(weights) if weights_too else None,
            **{_CACHE: cache},
        )
        return output.to_tuple() if return_dict is False else output

    def _call(self, x_BTD, mask_BL, positions_BT, cache, weights_too: bool) -> Call:
        (B, T), device = x_BTD.shape[:2], x_BTD.device
        past = 0 if cache is None else cache.get_seq_length()
        slots_T = torch.arange(T, device=device) + past
        compiling = torch.compiler.is_compiling()
        if mask_BL is not None and mask_BL.dim() != 2:
            raise ValueError(f"attention_mask must be [batch, tokens], got {list(mask_BL.shape)}")
        if mask_BL is not None and not compiling and mask_BL.shape[1] < past + T:
            raise ValueError(
                f"attention_mask has {mask_BL.shape[1]} tokens of {int(past) + T}, those of the cache counted"
            )
        if mask_BL is not None and not compiling and mask_BL.all():
            mask_BL = None
        segments_BT = None
        if positions_BT is None:
            if mask_BL is None:
                positions_BT = slots_T.expand(B, T)
            else:
                at_T = slots_T.clamp(max=mask_BL.shape[1] - 1)
                positions_BT = token_positions(mask_BL)[:, at_T]
        else:
            positions_BT = positions_BT.expand(B, T)
            if mask_BL is None and cache is None:
                begins_BT = F.pad(positions_BT.diff(dim=1) != 1, (1, 0))
                if compiling or begins_BT.any():
                    segments_BT = begins_BT.long().cumsum(1)
        longest = 2 * _LARGEST_EXPONENT * self.config.xpos_scale_base / _FASTEST_XPOS
        longest = int(longest / 2 if self.config.xpos_learnable else longest)
        if self.config.position_embedding == "xpos" and T > longest:
            raise ValueError(f"{T} tokens are more than the {longest} that XPos can rotate at once: use a cache")
        return Call(self.config, positions_BT, slots_T, mask_BL, segments_BT, cache, weights_too, self.experts)


class StellarByteForCausalLM(StellarBytePreTrainedModel, GenerationMixin):
    """The language model."""

    _tied_weights_keys = _TIED if int(transformers.__version__.split(".")[0]) >= 5 else list(_TIED)

    def __init__(self, config: StellarByteConfig):
        super().__init__(config)
        self.model = StellarByteModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replaces the head."""
        self.lm_head = value

    def get_decoder(self) -> nn.Module:
        """The network without its head."""
        return self.model

    @staticmethod
    def create_masks_for_generate(attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
        """The mask [B, tokens] as it is, padded to a cache's fixed size so that compiled steps have one shape."""
        cache = kwargs.get("cache") or kwargs.get("past_key_values")
        layers = getattr(cache, "layers", None)
        if attention_mask is None or not layers:
            return attention_mask
        size = max(layer.max_cache_len for layer in layers)
        return F.pad(attention_mask, (0, max(0, size - attention_mask.shape[1])))

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """Logits [B, T, vocabulary], or of the last ``logits_to_keep`` tokens alone, and the loss of labels."""
        found = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            **{name: x for name, x in kwargs.items() if name == "output_router_logits"},
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(found.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=found.hidden_states,
            attentions=found.attentions,
            **{_CACHE: getattr(found, _CACHE)},
        )
        return output.to_tuple() if return_dict is False else output
