"""The decoder again, in numpy with float64 and loops: what every setting means, written without looking at the product.

One document, no cache, no dropout. ``params`` is the tree of weights, ``tokens`` a vector.
"""

import math

import jax
import numpy as np


def rms_norm(x, scale, eps, rule):
    mean = np.mean(x**2, axis=-1, keepdims=True)
    return x / np.sqrt(mean + eps if rule == "add" else np.maximum(mean, eps)) * scale


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x, exact):
    if exact:
        return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def frequencies(c):
    """Angle per position of each pair, and a factor of cosines."""
    H, s = c.head_size, c.rope_scaling
    plain = np.array([c.rope_theta ** (-2 * i / H) for i in range(H // 2)])
    if s.name == "none":
        return plain, 1.0
    if s.name == "linear":
        return plain / s.factor, 1.0
    original = s.original_max_position_embeddings or c.max_position_embeddings
    if s.name == "llama3":
        out = []
        for f in plain:
            wave = 2 * math.pi / f
            if wave < original / s.high_freq_factor:
                out.append(f)
            elif wave > original / s.low_freq_factor:
                out.append(f / s.factor)
            else:
                smooth = (original / wave - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
                out.append((1 - smooth) * f / s.factor + smooth * f)
        return np.array(out), 1.0
    assert s.name == "yarn"

    def pair_with(rotations):
        return H * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(c.rope_theta))

    low, high = max(math.floor(pair_with(s.beta_fast)), 0), min(math.ceil(pair_with(s.beta_slow)), H - 1)
    high = high + 0.001 if low == high else high
    ramp = np.clip((np.arange(H // 2) - low) / (high - low), 0, 1)
    return plain / s.factor * ramp + plain * (1 - ramp), s.attention_factor or 0.1 * math.log(s.factor) + 1


def rotate(c, x, position, exponents):
    """One head's vector at its position, each pair multiplied by exp(exponent)."""
    H = c.head_size
    angle, magnitude = frequencies(c)
    cos, sin = magnitude * np.cos(position * angle), magnitude * np.sin(position * angle)
    out = np.zeros(H)
    for i in range(H // 2):
        if c.position_embedding == "stellarbyte":
            scaled = x * np.exp(np.concatenate([exponents, exponents]))
            out[i] = scaled[i] * cos[i] - scaled[2 * i + 1] * sin[i]
            out[i + H // 2] = scaled[i + H // 2] * cos[i] + scaled[2 * i] * sin[i]
            continue
        a, b = (i, i + H // 2) if c.rope_pairing == "half" else (2 * i, 2 * i + 1)
        factor = math.exp(exponents[i])
        out[a] = factor * (x[a] * cos[i] - x[b] * sin[i])
        out[b] = factor * (x[b] * cos[i] + x[a] * sin[i])
    return out


def attention(c, w, x, window):
    T, N, K, H = len(x), c.num_attention_heads, c.kv_heads, c.head_size
    q = np.einsum("td,dnh->tnh", x, w["q"]) + w.get("q_bias", 0)
    k = np.einsum("td,dnh->tnh", x, w["k"]) + w.get("k_bias", 0)
    v = np.einsum("td,dnh->tnh", x, w["v"]) + w.get("v_bias", 0)
    if c.qk_norm:
        q = rms_norm(q, w["q_norm"]["scale"], c.rms_norm_eps, c.rms_norm_eps_rule)
        k = rms_norm(k, w["k_norm"]["scale"], c.rms_norm_eps, c.rms_norm_eps_rule)
    pair = np.arange(H // 2) / (H // 2)
    if c.position_embedding == "xpos":
        slope = w.get("xpos_rate", -np.log((pair + 0.4) / 1.4)) / c.xpos_scale_base
        origin = 3.7  # any: it cancels
    elif c.position_embedding == "stellarbyte":
        slope, origin = w.get("xpos_rate", -pair) / c.xpos_scale_base, c.max_position_embeddings // 2
    else:
        slope, origin = np.zeros(H // 2), 0
    out = np.zeros((T, N, H))
    for n in range(N):
        g = n // (N // K)
        rotated_q = [rotate(c, q[t, n], t, -slope * (t - origin)) for t in range(T)]
        rotated_k = [rotate(c, k[t, g], t, slope * (t - origin)) for t in range(T)]
        for t in range(T):
            seen = [s for s in range(t + 1) if window is None or t - s < window or s < c.sink_tokens]
            score = np.array([rotated_q[t] @ rotated_k[s] for s in seen]) / math.sqrt(H)
            if c.attention_logit_softcap:
                score = c.attention_logit_softcap * np.tanh(score / c.attention_logit_softcap)
            weight = np.exp(score - score.max())
            weight[weight < c.attention_prune_below] = 0
            weight /= weight.sum()
            out[t, n] = sum(p * v[s, g] for p, s in zip(weight, seen, strict=True))
    return np.einsum("tnh,nhd->td", out, w["o"]) + w.get("o_bias", 0)


def mlp(c, w, x):
    own = c.mlp_style == "stellarbyte"
    h = rms_norm(x, w["norm"]["scale"], 1e-6, c.rms_norm_eps_rule) if own else x
    both = np.einsum("td,dgf->tgf", h, w["gate_up"]) + w.get("gate_up_bias", 0)
    gate, up = both[:, 0], both[:, 1]
    if own:
        return silu(up) / (1 + np.exp(-gate)) @ w["down"] + x
    act = silu(gate) if c.hidden_act == "silu" else gelu(gate, c.hidden_act == "gelu")
    return (act * up) @ w["down"] + w.get("down_bias", 0)


def feed_forward(c, w, x, pool):
    """An MLP, or experts: every expert computes every token, and the chosen ones count."""
    return mlp(c, w["mlp"], x) if "mlp" in w else experts(c, w["moe"], x, pool)


def experts(c, w, x, pool):
    m, E = c.moe, c.moe.num_experts
    gated = pool or w["experts"]
    out = np.zeros_like(x)
    history = np.zeros(x.shape[1])
    for t, token in enumerate(x):
        logits = gate(c, w["router"], token, t, history)
        history = m.history_decay * history + (1 - m.history_decay) * token
        hidden = hidden_twins(w["router"]["tracked"], t)
        logits[hidden] = -np.inf
        score = scores(c, w["router"], logits)
        choice = score + w["router"]["tracked"]["bias"]
        choice[hidden] = -np.inf
        size = E // m.n_group
        best = [np.sort(choice[g * size : (g + 1) * size])[-2:].sum() for g in range(m.n_group)]
        groups = np.argsort(best)[::-1][: m.topk_group]
        order = sorted((e for e in range(E) if e // size in groups), key=lambda e: -choice[e])
        chosen, covered = [], 0.0
        for e in order[: m.num_experts_per_tok]:
            if m.dynamic_k is None or covered / score.sum() < m.dynamic_k:
                chosen.append(e)
            covered += score[e]
        total = sum(score[e] for e in chosen) if m.norm_topk_prob else 1.0
        for e in chosen:
            both = np.einsum("d,dgf->gf", token, gated["gate_up"][e])
            out[t] += m.routed_scaling_factor * score[e] / total * (silu(both[0]) * both[1]) @ gated["down"][e]
    return out + (mlp(c, w["shared"], x) if m.n_shared_experts else 0)


def hidden_twins(kept, position):
    """Experts that a token does not see: of two twins that exclude each other, even positions see the lower number."""
    hidden = []
    for e, steps in enumerate(kept.get("twin_steps", ())):
        other = round(kept["twin"][e])
        if steps > 0.5 and other != e and position % 2 != (0 if e < other else 1):
            hidden.append(e)
    return hidden


def gate(c, w, token, position, history):
    if c.moe.gate == "linear":
        return token @ w["kernel"]
    context = gelu(token @ w["context_in"], True) @ w["context_out"]
    parts = [token, context, w["position"][min(position, c.max_position_embeddings - 1)]]
    parts += [history] if c.moe.history_decay else []
    z = rms_norm(np.concatenate(parts), w["norm"]["scale"], c.rms_norm_eps, c.rms_norm_eps_rule)
    z = z + (silu(z @ w["mlp_gate"]) * (z @ w["mlp_up"])) @ w["mlp_down"]
    return z @ w["kernel"]


def scores(c, w, logits):
    m, kept = c.moe, w["tracked"]
    if m.expert_priority:
        logits = logits + np.log(kept["priority"])
    if m.cooling_steps:
        logits = logits + np.log(1 + kept["coldness"])
    temperature = m.temperature
    if m.adaptive_temperature:
        spread = kept["load"].std() / (kept["load"].mean() + 1e-6)
        temperature = max(abs(w["temperature"]) * (1 + spread), 0.3)
    logits = logits / temperature
    if m.scoring_func == "sigmoid":
        return 1 / (1 + np.exp(-logits))
    score = np.exp(logits - logits.max())
    return score / score.sum()


def decoder(c, params, tokens):
    """float64 logits [T, V]."""

    def deep(tree, i):
        return {k: deep(v, i) if isinstance(v, dict) else np.float64(v[i]) for k, v in tree.items()}

    def norm(x, w):
        return rms_norm(x, np.float64(w["scale"]), c.rms_norm_eps, c.rms_norm_eps_rule)

    L, params = c.num_hidden_layers, jax.device_get(params)
    pool = {name: np.float64(leaf) for name, leaf in params["layers"].get("pool", {}).items()}
    table = np.float64(params["embed"]["embedding"])
    x = table[np.asarray(tokens)]
    for i in range(L):
        stack, row = c.layer_places[i]
        w = deep(params["layers"][str(stack)], row)
        scale = 1 / math.sqrt(2 * L) if c.residual_scaling == "branch" else 1.0
        a, m = scale * w.get("attn_scale", 1.0), scale * w.get("mlp_scale", 1.0)
        if c.residual_scaling == "deepnorm":
            alpha = (2 * L) ** 0.25
            x = norm(alpha * x + a * attention(c, w["attn"], x, c.windows[i]), w["attn_norm"])
            x = norm(alpha * x + m * feed_forward(c, w, x, pool), w["mlp_norm"])
        elif c.parallel_residual:
            n = norm(x, w["attn_norm"])
            x = x + a * attention(c, w["attn"], n, c.windows[i]) + m * feed_forward(c, w, n, pool)
        else:
            x = x + a * attention(c, w["attn"], norm(x, w["attn_norm"]), c.windows[i])
            x = x + m * feed_forward(c, w, norm(x, w["mlp_norm"]), pool)
    if c.residual_scaling != "deepnorm":
        x = norm(x, params["final_norm"])
    head = table.T if c.tie_word_embeddings else np.float64(params["lm_head"]["kernel"])
    return (x @ head)[:, : c.vocab_size]
