"""The original StellarByte's two networks in numpy with float64 and loops, written from their description alone.

``state`` is a state dict of the original, ``c`` its settings by its own names, ``tokens`` a vector; logits are [T, V].
"""

import math

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def attend(q, k, v):
    """q [T, H, d], k and v [T, G, d] -> [T, H * d], each token to those before it and itself."""
    T, H, d = q.shape
    shared = H // k.shape[1]
    out = np.zeros((T, H, d))
    for t in range(T):
        for h in range(H):
            weights = softmax(np.array([q[t, h] @ k[s, h // shared] for s in range(t + 1)]) / math.sqrt(d))
            out[t, h] = sum(w * v[s, h // shared] for s, w in enumerate(weights))
    return out.reshape(T, H * d)


def seed_norm(x, weight, eps):
    return x / np.sqrt(np.maximum(np.mean(x * x, axis=-1, keepdims=True), eps)) * weight


def seed_rotate(x, position, slopes, sign, c):
    """One head at a position: scaled, then turned with angles in halves and partners that are neighbours."""
    d = len(x)
    grown = np.exp(sign * slopes * (position - c["max_seq_len"] // 2) / c["xpos_scale_base"])
    x = x * np.concatenate([grown, grown])
    out = np.zeros(d)
    for j in range(d // 2):
        angle = position * c["xpos_rope_theta"] ** (-2 * j / d)
        out[j] = x[j] * math.cos(angle) - x[2 * j + 1] * math.sin(angle)
        out[d // 2 + j] = x[d // 2 + j] * math.cos(angle) + x[2 * j] * math.sin(angle)
    return out


def seed_attention(state, layer, x, c):
    T, D = x.shape
    d = D // c["num_attention_heads"]
    q, k, v = ((x @ state[f"{layer}.self_attn.W_{n}.weight"].T).reshape(T, -1, d) for n in "qkv")
    slopes = state[f"{layer}.self_attn.rotary.log_scale_weight"]
    q = np.array([[seed_rotate(head, t, slopes, 1, c) for head in q[t]] for t in range(T)])
    k = np.array([[seed_rotate(head, t, slopes, -1, c) for head in k[t]] for t in range(T)])
    return attend(q, k, v) @ state[f"{layer}.self_attn.W_o.weight"].T


def seed_mlp(state, layer, u):
    n = seed_norm(u, state[f"{layer}.mlp.norm.weight"], 1e-6)
    w13 = state[f"{layer}.mlp.w13.weight"]
    width = len(w13) // 2
    gate, value = n @ w13[:width].T, n @ w13[width:].T
    return (value * sigmoid(value) * sigmoid(gate)) @ state[f"{layer}.mlp.w2.weight"].T + u


def seed_logits(state, c, tokens):
    state = {name: np.float64(tensor) for name, tensor in state.items()}
    x, L, eps = state["embed_tokens.weight"][tokens], c["num_layers"], c["layer_norm_eps"]
    r = 1 / math.sqrt(2 * L) if c.get("use_deepnorm", True) else 1.0
    for i in range(L):
        layer = f"layers.{i}"
        attn, mlp = r * state[f"{layer}.ls_attn"], r * state[f"{layer}.ls_mlp"]
        n = seed_norm(x, state[f"{layer}.norm_attn.weight"], eps)
        if c.get("parallel_residual", False):
            x = x + attn * seed_attention(state, layer, n, c) + mlp * seed_mlp(state, layer, n)
            continue
        x = x + attn * seed_attention(state, layer, n, c)
        x = x + mlp * seed_mlp(state, layer, seed_norm(x, state[f"{layer}.norm_ffn.weight"], eps))
    return seed_norm(x, state["norm.weight"], eps) @ state["lm_head.weight"].T


def december_norm(x, weight, eps):
    return weight * (x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps))


def december_rotate(x, position, theta):
    d = len(x)
    angle = np.array([position * theta ** (-2 * j / d) for j in range(d // 2)])
    cos, sin = np.tile(np.cos(angle), 2), np.tile(np.sin(angle), 2)
    return x * cos + np.concatenate([-x[d // 2 :], x[: d // 2]]) * sin


def december_logits(state, c, tokens):
    state = {name: np.float64(tensor) for name, tensor in state.items()}
    x, eps = state["model.embed_tokens.weight"][tokens], c["rms_norm_eps"]
    T, D = x.shape
    d = D // c["num_attention_heads"]
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        n = december_norm(x, state[f"{layer}.input_layernorm.weight"], eps)
        q, k, v = ((n @ state[f"{layer}.self_attn.{p}_proj.weight"].T).reshape(T, -1, d) for p in "qkv")
        q, k = (np.array([[december_rotate(h, t, c["rope_theta"]) for h in a[t]] for t in range(T)]) for a in (q, k))
        x = x + attend(q, k, v) @ state[f"{layer}.self_attn.o_proj.weight"].T
        n = december_norm(x, state[f"{layer}.post_attention_layernorm.weight"], eps)
        gate, up, down = (state[f"{layer}.mlp.{p}_proj.weight"] for p in ("gate", "up", "down"))
        x = x + (n @ gate.T * sigmoid(n @ gate.T) * (n @ up.T)) @ down.T
    return december_norm(x, state["model.norm.weight"], eps) @ state["lm_head.weight"].T
