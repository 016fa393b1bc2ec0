"""Parameters and floating-point operations of a model, from the shapes of its weights alone; no weight is needed."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.model.decoder import ByteTransformer, param_shapes, param_uses, trained, weights_alone
from stellarbyte_jax.model.layers import POOL
from stellarbyte_jax.model.params import WeightUse
from stellarbyte_jax.model.trees import IsTrainable, Params, all_trainable, partition

PARTS = ("embedding", "attention", "mlp", "router", "experts", "shared_experts", "norms", "head", "other")
_OF_MODULE = {"embed": "embedding", "lm_head": "head", "attn": "attention", "mlp": "mlp"}
_OF_EXPERTS = {"router": "router", "experts": "experts", "shared": "shared_experts"}


class Piece(NamedTuple):
    """A weight, or what one layer has of a stacked one.

    Attributes:
      part: one of :data:`PARTS`.
      layer: its number, None for what is outside of the layers, experts that all of them share included.
      leaf: the whole array, or its shape.
      at: of this piece in the leaf; None for all of it.
    """

    part: str
    layer: int | None
    leaf: Any
    at: int | None

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.leaf.shape if self.at is None else self.leaf.shape[1:])


def pieces(config: ByteConfig, params: Params) -> Iterator[Piece]:
    """Every weight of a tree of arrays or shapes, stacks layer by layer; what routers keep is no weight."""
    layers = {(str(stack), row): layer for layer, (stack, row) in enumerate(config.layer_places)}
    is_weight = weights_alone(ByteTransformer(config))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = tuple(key.key for key in path)
        if not is_weight(names):
            continue
        if names[0] == "layers" and names[1] != POOL:
            for index in range(leaf.shape[0]):
                yield Piece(part_of(names[2:]), layers[names[1], index], leaf, index)
        else:
            yield Piece("experts" if POOL in names else part_of(names), None, leaf, None)


def part_of(names: Sequence[str]) -> str:
    """Which of :data:`PARTS` a weight belongs to, by the names of its path behind the number of the group.

    Norms are those of a layer, of a head, of the MLP, of a router's gate and the last one. ``other`` is LayerScale. A
    tied head has no weights of its own, its table counts as the embedding.
    """
    if any(name.endswith("norm") for name in names[:-1]):
        return "norms"
    if names[0] == "moe":
        return _OF_EXPERTS[names[1]]
    return _OF_MODULE.get(names[0], "other")


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of weights by part.

    Attributes:
      outside: of embedding, last norm, head, and experts that all layers share.
      layers: of each layer.
      trainable: of those that are trained, in all.
      active: of those that one token uses, see ``ByteConfig.active_parameters``; more than there are where layers share
        few experts.
    """

    outside: Mapping[str, int]
    layers: tuple[Mapping[str, int], ...]
    trainable: int
    active: int

    @property
    def parts(self) -> dict[str, int]:
        """The sums over the model, in the order of :data:`PARTS`, without parts that have no weight."""
        sums = sum((Counter(layer) for layer in self.layers), Counter(self.outside))
        return {part: sums[part] for part in PARTS if sums[part]}

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.parts.values())


def parameter_counts(model: ByteTransformer, is_trainable: IsTrainable = all_trainable) -> ParameterCounts:
    """Counts the weights of a model by part and layer; rows that pad the vocabulary are weights too."""
    shapes = param_shapes(model)
    outside: Counter[str] = Counter()
    layers: list[Counter[str]] = [Counter() for _ in model.config.layer_specs]
    for piece in pieces(model.config, shapes):
        (outside if piece.layer is None else layers[piece.layer])[piece.part] += piece.size
    trainable, _ = partition(shapes, trained(model, is_trainable))
    total = count_parameters(partition(shapes, weights_alone(model))[0])
    return ParameterCounts(outside, tuple(layers), count_parameters(trainable), model.config.active_parameters(total))


def count_parameters(params: Any) -> int:
    """Number of numbers in a tree; those of a model's weights are :func:`parameter_counts`'s."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(params))


@dataclass(frozen=True)
class FlopsPerToken:
    """Floating-point operations of a training step by token, forward and backward: two for a multiply-add.

    The backward pass counts as two forward ones, so the forward pass is a third; what rematerialisation computes again
    is not counted.

    Attributes:
      causal: ``6 (parameters - tables) + 6 L T N H``, of the parameters that a token uses and without tables that are
        looked up, the embedding above all: causal attention counted by the half that is computed, and where there is
        a memory of M tokens, ``12 L M N H``; reading the memory's keys is not counted.
      full: the same with attention counted as if it were not causal, as in the PaLM paper (2022,
        https://arxiv.org/abs/2204.02311, appendix B).
      spared: what these leave out: gradients of weights that are frozen beside adapters.
    """

    causal: float
    full: float
    spared: float = 0.0

    @property
    def forward(self) -> "FlopsPerToken":
        """Those of the forward pass alone."""
        return FlopsPerToken((self.causal + self.spared) / 3, (self.full + self.spared) / 3)


def flops_per_token(config: ByteConfig, parameters: int, sequence_length: int) -> FlopsPerToken:
    """Counts the operations of a model of which a token uses so many parameters; a tied table counts once, as the head.

    The head is computed for the padding of the vocabulary too. Rows that fill up blocks of experts are not counted.
    """
    matrices = parameters - _looked_up(config)
    width = config.num_attention_heads * config.head_size
    attention = 0.0
    for spec in config.layer_specs:
        keys = sequence_length if spec.window is None else min(2 * spec.window, sequence_length)
        if spec.recent:  # the same number of keys for every token of a segment
            keys = 2 * spec.memory_slots
        attention += 6.0 * keys * width
    spared = 2.0 * _frozen_matrices(config)
    products = 6.0 * matrices - spared
    return FlopsPerToken(products + attention, products + 2 * attention, spared)


def _frozen_matrices(config: ByteConfig) -> int:
    """Weights of a base with adapters that a token uses, multiplied by activations and not trained."""
    if not config.lora.r:
        return 0
    model, base = ByteTransformer(config), config.without_adapters
    _, frozen = partition(param_shapes(model), trained(model))
    frozen, _ = partition(frozen, weights_alone(model))
    saved = _looked_up(base) if "embed" not in config.lora.modules_to_save else 0
    return base.active_parameters(count_parameters(frozen)) - saved


def _looked_up(config: ByteConfig) -> int:
    """Weights of tables that multiply nothing."""
    model = ByteTransformer(config)
    uses = jax.tree.leaves(param_uses(model), is_leaf=lambda x: isinstance(x, WeightUse))
    tables = [leaf.shape for leaf, use in zip(jax.tree.leaves(param_shapes(model)), uses, strict=True) if use.lookup]
    head = config.padded_vocab_size * config.hidden_size if config.tie_word_embeddings else 0
    return sum(map(math.prod, tables)) - head
