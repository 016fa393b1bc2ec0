"""The names of tensor dimensions. Every axis of a weight carries one of them."""

LOGICAL_AXES = {
    "layers": "stacked layers of one kind",
    "vocab": "vocabulary",
    "embed": "model width",
    "heads": "query heads",
    "kv_heads": "key and value heads",
    "head_dim": "channels of one head",
    "rotary_pairs": "pairs of channels that turn together",
    "gate": "gate and up projection, fused",
    "mlp": "feed-forward width",
}
