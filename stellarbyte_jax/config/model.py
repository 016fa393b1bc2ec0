"""The network's settings."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from stellarbyte_jax.config.foreign import listed
from stellarbyte_jax.config.layers import LayerGroup, LayerSpec, group_layers
from stellarbyte_jax.config.lora import LoRAConfig
from stellarbyte_jax.config.model_parts import CacheConfig, MemoryConfig, RopeScaling
from stellarbyte_jax.config.moe import MoEConfig
from stellarbyte_jax.config.section import (
    Fraction,
    PositiveFloat,
    PositiveInt,
    Rule,
    Section,
    Size,
    SizeOrZero,
    require,
)

# Everything that is said of layers is said of each, so their number is time and memory before any weight is made.
LayerCount = Annotated[int, Rule("positive, at most 4096", lambda v: 0 < v <= 4096)]
AttentionImplementation = Literal["auto", "reference", "xla", "cudnn", "pallas"]

# The original StellarByte's names for the same settings, accepted by ByteConfig.from_dict.
_ALIASES: Mapping[str, str] = {
    "model_dim": "hidden_size",
    "dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "n_kv_heads": "num_key_value_heads",
    "hidden_dim": "intermediate_size",
    "max_seq_len": "max_position_embeddings",
    "layer_norm_eps": "rms_norm_eps",
    "xpos_rope_theta": "rope_theta",
    "hidden_dropout_prob": "hidden_dropout",
    "attention_dropout_prob": "attention_dropout",
    "residual_dropout_prob": "residual_dropout",
    "drop_path_prob": "drop_path",
    "layerscale_init": "layer_scale_init",
}


@dataclass(frozen=True, kw_only=True)
class ByteConfig(Section):
    """The network. Field names are Hugging Face's where one exists.

    ``None`` means "derived": see the properties ``kv_heads``, ``head_size`` and ``mlp_size``.

    Attributes:
      vocab_size: number of tokens: the largest id of the tokenizer + 1
      vocab_size_multiple: embedding and head get rows up to a multiple of this, which no token ever uses
      hidden_size: channels of the residual stream
      num_hidden_layers: number of layers
      num_attention_heads: query heads of a layer
      num_key_value_heads: key/value heads; fewer than query heads: grouped-query attention with a smaller
        cache; none: as many
      head_dim: channels of a head; none: hidden_size / num_attention_heads
      intermediate_size: channels inside the MLP; none: 4 x hidden_size
      hidden_act: activation of the MLP's gate: silu is SwiGLU, gelu is GEGLU
      mlp_style: gated: down(act(gate) * up); stellarbyte: the original's own, silu(up) * sigmoid(gate) between
        an inner norm and an inner residual
      max_position_embeddings: longest text that the model is trained for, in tokens
      tie_word_embeddings: the head uses the embedding's weights
      position_embedding: xpos: attention decays with distance; stellarbyte: the original's mixed pairing, for
        its checkpoints only
      rope_theta: base of the rotary frequencies; larger: slower waves, for longer texts
      rope_pairing: half: channel i is rotated with i + head_dim/2, as in Hugging Face; interleaved: with i + 1
      rope_scaling: rotary frequencies for longer texts than in training
      xpos_scale_base: distance scale of XPos, in tokens; smaller: attention decays faster
      xpos_learnable: each layer learns its rates of decay, from the paper's on
      rms_norm_eps: added to the mean square in RMSNorm
      rms_norm_eps_rule: add: eps is added to the mean square; clamp: it is its least value, as in the original
      attention_bias: biases of q, k and v
      attention_output_bias: bias of the attention's output
      mlp_bias: biases of the MLP
      qk_norm: RMSNorm over each head of q and k: tames growing attention logits
      sliding_window: tokens that a windowed layer sees, itself included; none: all
      layer_types: "full_attention" or "sliding_attention" for each layer; none: sliding_window is of every
        layer
      sink_tokens: first tokens of a document, which a window never hides; refuses cudnn
      attention_logit_softcap: attention logits become cap tanh(logits / cap); refuses the fused kernels
      attention_prune_below: attention weights below this fraction of the largest are masked; refuses the fused
        kernels
      memory: segment memory
      moe: layers with experts
      parallel_residual: attention and MLP read the same norm and are added together
      residual_scaling: branch: each branch is divided by sqrt(2 layers); deepnorm: norm(alpha x + branch), as
        in the paper
      layer_scale_init: first value of a learned factor for each channel of a branch; none: no such factor
      drop_path: rate at which the last layer's branches are left out in training; it grows with depth from 0 in
        the first layer
      initialization: depth: outputs of branches smaller by sqrt(2 layers); stellarbyte: all matrices; deepnorm:
        the paper's; none: deepnorm where residual_scaling is, else depth
      initializer_range: standard deviation of weights at the start
      attention_dropout: share of attention weights set to 0 in training; refuses the fused kernels
      hidden_dropout: share of the outputs of embedding and MLP set to 0 in training
      residual_dropout: share of the attention's output set to 0 in training
      compute_dtype: type of activations and matrix products; weights, norms, softmax and loss stay float32
      matmul_dtype: type of what is multiplied with weights of attention and MLPs in training; float8: 8 bits, with a
        factor for each array; routers, experts, embedding and head keep compute, the compute_dtype
      attention_implementation: auto takes the fastest that supports the settings and says which; pallas, kernels for
        Hopper GPUs, is taken by name alone; a named one is
        taken or refused
      remat: what the backward pass makes again; weights: those that devices gather; dots: also what is no product of
        rows with weights; full: all, least memory, about a third more time
      scan_unroll: layers in one step of the loop over layers; none: all; faster steps on small models, longer
        compilation
      cache: key/value cache of generation
      lora: low-rank adapters; with them the other weights are frozen
    """

    _aliases = _ALIASES
    _example = "hidden_size"

    vocab_size: Size = 32000
    vocab_size_multiple: Size = 1
    hidden_size: Size = 768
    num_hidden_layers: LayerCount = 12
    num_attention_heads: Size = 12
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    intermediate_size: Size | None = None
    hidden_act: Literal["silu", "gelu", "gelu_pytorch_tanh"] = "silu"
    mlp_style: Literal["gated", "stellarbyte"] = "gated"
    max_position_embeddings: Size = 2048
    tie_word_embeddings: bool = False

    position_embedding: Literal["rope", "xpos", "stellarbyte"] = "rope"
    rope_theta: PositiveFloat = 10000.0
    rope_pairing: Literal["half", "interleaved"] = "half"
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    xpos_scale_base: PositiveFloat = 512.0
    xpos_learnable: bool = False

    rms_norm_eps: PositiveFloat = 1e-5
    rms_norm_eps_rule: Literal["add", "clamp"] = "add"
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: Size | None = None
    layer_types: tuple[str, ...] | None = None
    sink_tokens: SizeOrZero = 0
    attention_logit_softcap: PositiveFloat | None = None
    attention_prune_below: Fraction = 0.0
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)

    parallel_residual: bool = False
    residual_scaling: Literal["none", "branch", "deepnorm"] = "none"
    layer_scale_init: PositiveFloat | None = None
    drop_path: Fraction = 0.0
    initialization: Literal["normal", "depth", "stellarbyte", "deepnorm"] | None = None
    initializer_range: PositiveFloat = 0.02

    attention_dropout: Fraction = 0.0
    hidden_dropout: Fraction = 0.0
    residual_dropout: Fraction = 0.0

    compute_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    matmul_dtype: Literal["compute", "float8"] = "compute"
    attention_implementation: AttentionImplementation = "auto"
    remat: Literal["none", "weights", "dots", "full"] = "none"
    scan_unroll: PositiveInt | None = 1
    cache: CacheConfig = field(default_factory=CacheConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)

    def _check(self) -> None:
        require(
            self.head_dim is not None or self.hidden_size % self.num_attention_heads == 0,
            f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}: "
            "change one of them, or give head_dim",
        )
        require(
            self.num_attention_heads % self.kv_heads == 0,
            f"num_attention_heads {self.num_attention_heads} is not divisible by num_key_value_heads {self.kv_heads}",
        )
        require(self.head_size % 2 == 0, f"the head size must be even for rotary embeddings, got {self.head_size}")
        self._check_positions()
        self._check_residual()
        self._check_experts()
        self._check_layers()
        if set(self.given()) != {"lora"}:  # else it may stand for the model of ``init_from``
            self.check_adapters()

    def check_adapters(self) -> None:
        """Raises ConfigError where ``lora`` names what the network does not have."""
        dense = len(self.moe_layers) < self.num_hidden_layers
        self.lora.check_network(self.moe, self.num_hidden_layers, dense=dense, tied=self.tie_word_embeddings)

    def _check_positions(self) -> None:
        require(
            not self.xpos_learnable or self.position_embedding != "rope",
            "xpos_learnable needs position_embedding xpos or stellarbyte: plain RoPE has no rates to learn",
        )
        require(
            "xpos_scale_base" not in self.given() or self.position_embedding != "rope",
            "xpos_scale_base needs position_embedding xpos or stellarbyte: plain RoPE does not decay",
        )
        require(
            self.position_embedding != "stellarbyte" or (self.rope_pairing, self.rope_scaling.name) == ("half", "none"),
            "position_embedding stellarbyte has a pairing of its own: leave out rope_pairing and rope_scaling",
        )

    def _check_residual(self) -> None:
        require(
            not (self.parallel_residual and self.residual_scaling == "deepnorm"),
            "residual_scaling deepnorm is defined for one branch after the other: set parallel_residual=false, "
            "or residual_scaling=branch",
        )
        require(
            self.residual_scaling != "deepnorm" or self.init_scheme == "deepnorm",
            "residual_scaling deepnorm needs its own initialisation: leave initialization out",
        )
        require(
            self.mlp_style == "gated" or (self.hidden_act == "silu" and not self.mlp_bias),
            "mlp_style stellarbyte has a gate of its own: leave out hidden_act and mlp_bias",
        )

    def _check_experts(self) -> None:
        if not self.moe.num_experts:
            return
        layers = range(self.num_hidden_layers)
        named = [layer for layer in self.moe.mlp_only_layers if layer not in layers]
        require(
            not named, f"moe.mlp_only_layers names {listed(named)}, there are {self.num_hidden_layers} layers from 0"
        )
        require(
            any(self.moe.has_experts(layer) for layer in layers),
            f"no layer has experts: moe.first_k_dense_replace {self.moe.first_k_dense_replace}, decoder_sparse_step "
            f"{self.moe.decoder_sparse_step} and mlp_only_layers leave none of {self.num_hidden_layers}",
        )
        require(
            self.mlp_style == "gated" and not self.mlp_bias,
            "experts are gated MLPs without biases: leave out mlp_style and mlp_bias, or moe",
        )
        require(
            not (self.has_memory and self.moe.history_decay),
            "moe.history_decay is of whole documents, and memory cuts them into segments: leave one of them out",
        )

    def _check_layers(self) -> None:
        if self.layer_types is not None:
            known = ("full_attention", "sliding_attention")
            unknown = sorted(set(self.layer_types) - set(known))
            require(not unknown, f"layer_types may hold {', '.join(known)}, got {listed(unknown)}")
            require(
                len(self.layer_types) == self.num_hidden_layers,
                f"layer_types names {len(self.layer_types)} layers, num_hidden_layers is {self.num_hidden_layers}",
            )
            require(
                self.sliding_window is not None or "sliding_attention" not in self.layer_types,
                "layer_types asks for sliding_attention: give sliding_window",
            )
            require(
                self.sliding_window is None or "sliding_attention" in self.layer_types,
                "sliding_window is of layers with sliding_attention, and layer_types names none: leave it out",
            )
        require(
            self.sink_tokens == 0 or any(spec.window is not None for spec in self.layer_specs),
            "sink_tokens are tokens that a window does not hide: give sliding_window, or leave sink_tokens out",
        )
        if self.has_memory:
            length, layers = self.memory.length, self.num_hidden_layers
            named = layers if isinstance(length, int) else len(length)
            require(named == layers, f"memory.length names {named} layers, num_hidden_layers is {layers}")
            require(
                self.sliding_window is None and self.layer_types is None,
                "memory.length is the window of the layers that remember: leave out sliding_window and layer_types",
            )
            require(
                self.sink_tokens == 0,
                "sink_tokens and memory do not go together: a memory begins in the middle of a document",
            )
            require(
                self.rope_scaling.name != "dynamic" and self.position_embedding != "stellarbyte",
                "memory needs rotations that depend on distances alone: rope_scaling dynamic and "
                "position_embedding stellarbyte do not",
            )
            require(
                all(spec.recent > 0 for spec in self.layer_specs if spec.compressed),
                f"memory.recent_share {self.memory.recent_share} leaves no slot for the newest states",
            )
            require(
                "compression_weight" not in self.memory.given() or any(spec.compressed for spec in self.layer_specs),
                "memory.compression_weight is of compressed slots: set memory.recent_share below 1",
            )
            require(self.cache.recent is None, "cache.heavy_hitters cannot be used with memory: leave one of them out")
        else:
            require(
                not set(self.memory.given()) - {"length"},
                f"memory.length is 0, but {', '.join(self.memory.given())} is given: set memory.length",
            )

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """Channels of one head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def mlp_size(self) -> int:
        """Width of the feed-forward layer; 4 x hidden_size where none is given."""
        return self.intermediate_size or 4 * self.hidden_size

    @property
    def padded_vocab_size(self) -> int:
        """Rows of embedding and head."""
        return -(-self.vocab_size // self.vocab_size_multiple) * self.vocab_size_multiple

    @property
    def init_scheme(self) -> str:
        """The initialisation in use."""
        return self.initialization or ("deepnorm" if self.residual_scaling == "deepnorm" else "depth")

    @property
    def has_memory(self) -> bool:
        """Whether any layer remembers."""
        length = self.memory.length
        return any(length) if isinstance(length, tuple) else length > 0

    @property
    def layer_specs(self) -> tuple[LayerSpec, ...]:
        """Window and memory of each layer."""
        layers = range(self.num_hidden_layers)
        if self.has_memory:
            length = self.memory.length
            lengths = length if isinstance(length, tuple) else (length,) * self.num_hidden_layers
            recent = [round(self.memory.recent_share * n) for n in lengths]
            specs = [
                LayerSpec(r + 1, r, n - r) if n else LayerSpec(None) for r, n in zip(recent, lengths, strict=False)
            ]
        elif self.layer_types is None:
            specs = [LayerSpec(self.sliding_window) for _ in layers]
        else:
            specs = [LayerSpec(self.sliding_window if t == "sliding_attention" else None) for t in self.layer_types]
        return tuple(spec._replace(moe=self.moe.has_experts(layer)) for layer, spec in enumerate(specs))

    @property
    def layer_groups(self) -> tuple[LayerGroup, ...]:
        """The layers in order, in groups of one scan."""
        return group_layers(self.layer_specs)

    @property
    def layer_places(self) -> tuple[tuple[int, int], ...]:
        """For each layer the stack of weights that it belongs to, and its row there."""
        return tuple(place for group in self.layer_groups for place in group.places)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Numbers of the layers with experts."""
        return tuple(layer for layer, spec in enumerate(self.layer_specs) if spec.moe)

    @property
    def expert_size(self) -> int:
        """Channels inside an expert."""
        return self.moe.intermediate_size or self.mlp_size

    def active_parameters(self, total: int) -> int:
        """How many of so many weights one token uses: of each layer's experts no more than its own.

        Experts that layers share are stored once, and count for each layer that uses them.
        """
        layers, m = len(self.moe_layers), self.moe
        stored = m.num_experts * (1 if m.shared_pool else layers)
        width, inside = self.hidden_size, self.expert_size
        size = 3 * width * inside
        if "experts" in self.lora.targets:
            size += 3 * self.lora.r * (width + inside) + (2 * inside + width if self.lora.dora else 0)
        return total + (m.num_experts_per_tok * layers - stored) * size

    @property
    def without_adapters(self) -> "ByteConfig":
        """The same network without adapters."""
        return replace(self, lora=LoRAConfig()) if self.lora.r else self

    @property
    def is_random(self) -> bool:
        """Whether training draws random numbers inside the network."""
        rates = (self.attention_dropout, self.hidden_dropout, self.residual_dropout, self.drop_path, self.lora.dropout)
        return max(rates) > 0 or self.moe.is_random

    @property
    def memory_slots(self) -> int:
        """Memory slots of the layer that has most."""
        return max(spec.memory_slots for spec in self.layer_specs)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Window of each layer, None where attention is full."""
        return tuple(spec.window for spec in self.layer_specs)
