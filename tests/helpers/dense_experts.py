"""A decoder with experts again, in plain jax: a loop over layers, in each of which all experts compute every token.

What it has can be differentiated, so that whole gradients have something to be compared with. It knows linear gates,
softmax or sigmoid scores and a bias; no groups, no noise, no capacity.
"""

import jax
import jax.numpy as jnp


def layer_weights(c, weights):
    """The tree of each layer's weights, in order."""
    layers = weights["layers"]
    trees = [jax.tree.map(lambda x, r=row: x[r], layers[str(stack)]) for stack, row in c.layer_places]
    for tree in trees:
        if "moe" in tree and "pool" in layers:
            tree["moe"]["experts"] = layers["pool"]
    return trees


def gated(x, gate_up, down):
    return (jax.nn.silu(x @ gate_up[:, 0]) * (x @ gate_up[:, 1])) @ down


def route(c, w, x, mask):
    """Logits, scores and choices (0 or 1) [N, E], and the weights of experts [N, E]."""
    m = c.moe
    logits = x @ w["kernel"]
    heat = m.temperature
    if m.adaptive_temperature:
        load = w["tracked"]["load"]
        heat = jnp.maximum(jnp.abs(w["temperature"]) * (1 + jnp.std(load) / (jnp.mean(load) + 1e-6)), 0.3)
    scores = jax.nn.sigmoid(logits / heat) if m.scoring_func == "sigmoid" else jax.nn.softmax(logits / heat)
    place = jnp.argsort(jnp.argsort(-(scores + w["tracked"]["bias"]), axis=1), axis=1)
    chosen = jnp.where(mask[:, None], place < m.num_experts_per_tok, False).astype(x.dtype)
    weights = scores * chosen
    if m.norm_topk_prob:
        weights = weights / jnp.where(mask[:, None], weights.sum(1, keepdims=True), 1)
    return logits, scores, chosen, m.routed_scaling_factor * weights


def moe(c, w, x, mask):
    """Output [N, D] of a layer with experts, and what its losses are of."""
    logits, scores, chosen, weights = route(c, w["router"], x, mask)
    each = jax.vmap(gated, (None, 0, 0))(x, w["experts"]["gate_up"], w["experts"]["down"])
    out = jnp.einsum("ne,end->nd", weights, each)
    if "shared" in w:
        out = out + gated(x, w["shared"]["gate_up"], w["shared"]["down"])
    return out, (logits, scores, chosen)


def balance(routed, mask, rows, before):
    """Losses of a layer by name; ``before`` counts choices of earlier parts of the batch."""
    logits, scores, chosen = routed
    E, tokens = scores.shape[1], mask.sum()
    share = jnp.where(mask[:, None], scores / scores.sum(1, keepdims=True), 0)

    def even(counts):
        return counts / counts.sum(-1, keepdims=True)

    mean, load = share.sum(0) / tokens, even(chosen.sum(0))
    entropy = jax.lax.stop_gradient(-(share * jnp.log(share + 1e-9)).sum(1))
    by_row = (x.reshape(rows, -1, E).sum(1) for x in (chosen, share))
    row_load, row_share = (even(x) for x in by_row)  # the shares of a row are its mean scores
    frozen = jax.lax.stop_gradient(mean)
    return {
        "router_load": E * (load * mean).sum(),
        "router_global": E * (even(before + chosen.sum(0)) * mean).sum(),
        "router_sequence": E * (row_load * row_share).sum(1).mean(),
        "router_entropy": E * (load * (entropy[:, None] * share).sum(0) / entropy.sum()).sum(),
        "router_kl": (mean * jnp.log(E * mean)).sum(),
        "router_mse": E * ((load + mean - frozen - 1 / E) ** 2).sum(),
        "router_variance": ((E * mean - 1) ** 2).mean(),
        "router_z": jnp.where(mask, jax.nn.logsumexp(logits, axis=1), 0).__pow__(2).sum() / tokens,
    }


def norm(c, x, w):
    return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + c.rms_norm_eps) * w["scale"]


def attention(c, w, x, seen, positions):
    H = c.head_size
    angles = positions[..., None] * c.rope_theta ** (-2 * jnp.arange(H // 2) / H)

    def rotated(x):
        a, b, (cos, sin) = x[..., : H // 2], x[..., H // 2 :], (f(angles)[:, :, None] for f in (jnp.cos, jnp.sin))
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    q, k, v = (jnp.einsum("btd,dnh->btnh", x, w[name]) for name in "qkv")
    repeats = c.num_attention_heads // c.kv_heads
    k, v = (jnp.repeat(x, repeats, axis=2) for x in (rotated(k), v))
    scores = jnp.einsum("btnh,bsnh->bnts", rotated(q), k) / H**0.5
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -1e30), axis=-1)
    return jnp.einsum("bnts,bsnh,nhd->btd", weights, v, w["o"])


@jax.numpy_rank_promotion("allow")
@jax.numpy_dtype_promotion("standard")
def decoder(c, weights, batch, before):
    """Logits [B, T, V], the losses of each layer with experts, and its counts of choices.

    ``before`` has for each of these layers the counts of earlier parts of the batch.
    """
    ids, positions = batch["segment_ids"], batch["positions"]
    (B, T), mask = ids.shape, ids.reshape(-1) > 0
    same = (ids[:, :, None] == ids[:, None]) & jnp.tril(jnp.ones((T, T), bool))
    x, told, counts = weights["embed"]["embedding"][batch["tokens"]], [], []
    for w, window in zip(layer_weights(c, weights), c.windows, strict=True):
        seen = same if window is None else same & jnp.triu(jnp.ones((T, T), bool), 1 - window)
        x = x + attention(c, w["attn"], norm(c, x, w["attn_norm"]), seen, positions)
        h = norm(c, x, w["mlp_norm"])
        if "mlp" in w:
            x = x + gated(h, w["mlp"]["gate_up"], w["mlp"]["down"])
        else:
            out, routed = moe(c, w["moe"], h.reshape(B * T, -1), mask)
            x = x + out.reshape(x.shape)
            told.append(balance(routed, mask, B, before[len(told)]))
            counts.append(routed[2].sum(0))
    return norm(c, x, weights["final_norm"]) @ weights["lm_head"]["kernel"], told, jnp.stack(counts)


@jax.numpy_rank_promotion("allow")
@jax.numpy_dtype_promotion("standard")
def total_loss(config, weights, batch, parts):
    """What a step of training minimises, and the balance losses by name: means over layers and parts."""
    c = config.model

    def one(carry, of_part):
        before, nll, targets = carry
        logits, told, counts = decoder(c, weights, of_part, before)
        ids = of_part["segment_ids"]
        wanted = of_part["loss_mask"][:, 1:] & (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] > 0)
        log_p = jax.nn.log_softmax(logits[:, :-1])
        picked = jnp.take_along_axis(log_p, of_part["tokens"][:, 1:, None], axis=-1)[..., 0]
        values = {name: sum(x[name] for x in told) / len(told) for name in told[0]}
        return (before + counts, nll - jnp.where(wanted, picked, 0).sum(), targets + wanted.sum()), values

    cut = {name: jnp.stack([x[part::parts] for part in range(parts)]) for name, x in batch.items()}
    before = jnp.zeros((len(c.moe_layers), c.moe.num_experts))
    (before, nll, targets), told = jax.lax.scan(one, (before, jnp.zeros(()), jnp.zeros((), jnp.int32)), cut)
    values = {name: x.mean() for name, x in told.items()}
    balance = sum(getattr(config.loss, name) * value for name, value in values.items())
    return nll / targets + balance, (values, before)
