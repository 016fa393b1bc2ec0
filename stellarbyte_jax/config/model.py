"""The network's settings."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from stellarbyte_jax.config.foreign import shown
from stellarbyte_jax.config.layers import LayerGroup, LayerSpec
from stellarbyte_jax.config.section import (
    Fraction,
    PositiveFloat,
    PositiveInt,
    Rule,
    Section,
    Share,
    Size,
    SizeOrZero,
    require,
)

# Everything that is said of layers is said of each, so their number is time and memory before any weight is made.
LayerCount = Annotated[int, Rule("positive, at most 4096", lambda v: 0 < v <= 4096)]
AttentionImplementation = Literal["auto", "reference", "xla", "cudnn"]

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


# Settings of rotary scaling that only these kinds read.
_SCALING_SETTINGS: Mapping[tuple[str, ...], tuple[str, ...]] = {
    ("yarn", "llama3"): ("original_max_position_embeddings",),
    ("llama3",): ("low_freq_factor", "high_freq_factor"),
    ("yarn",): ("beta_fast", "beta_slow", "attention_factor"),
}


@dataclass(frozen=True, kw_only=True)
class RopeScaling(Section):
    """Rotary frequencies for more positions than the model was trained with."""

    # dynamic: by the length of each text so far. Tokens read before it grew past the trained length were rotated by
    # other frequencies, so a cache agrees with a full pass in the first layer alone.
    name: Literal["none", "linear", "dynamic", "yarn", "llama3"] = "none"
    factor: PositiveFloat = 1.0  # how many times longer
    original_max_position_embeddings: Size | None = None  # yarn, llama3; None: max_position_embeddings
    low_freq_factor: PositiveFloat = 1.0  # llama3: waves longer than original / this are stretched
    high_freq_factor: PositiveFloat = 4.0  # llama3: waves shorter than original / this stay
    beta_fast: PositiveFloat = 32.0  # yarn: pairs with more rotations over the original length are left as they are
    beta_slow: PositiveFloat = 1.0  # yarn: pairs with fewer rotations are stretched
    attention_factor: PositiveFloat | None = None  # yarn: of queries and keys; None: 0.1 ln(factor) + 1

    def _check(self) -> None:
        require(self.factor >= 1, f"rope_scaling.factor must be at least 1, got {self.factor}")
        require(
            self.name != "none" or not self.given(),
            f"rope_scaling.name is 'none', but {', '.join(self.given())} is given: name one of linear, dynamic, yarn, "
            "llama3",
        )
        for owners, settings in _SCALING_SETTINGS.items():
            stray = [name for name in settings if name in self.given() and self.name not in owners]
            require(
                not stray,
                f"rope_scaling.{', '.join(stray)} belongs to {' and '.join(owners)}, the name is {self.name!r}",
            )
        require(
            self.name in ("none", "dynamic") or self.factor > 1 or self.attention_factor is not None,
            f"rope_scaling.name={self.name} with factor 1 changes nothing: give rope_scaling.factor, or leave both out",
        )
        require(
            self.beta_fast > self.beta_slow,
            f"rope_scaling.beta_fast {self.beta_fast} must be above beta_slow {self.beta_slow}",
        )
        require(
            self.high_freq_factor > self.low_freq_factor,
            f"rope_scaling.high_freq_factor {self.high_freq_factor} must be above low_freq_factor "
            f"{self.low_freq_factor}",
        )


@dataclass(frozen=True, kw_only=True)
class MemoryConfig(Section):
    """Segment memory: states of earlier tokens that a layer attends to, carried from segment to segment.

    Dai et al. 2019, https://arxiv.org/abs/1901.02860.
    """

    # Tokens before a token that each layer remembers and attends to; a list gives each layer its own. 0: none.
    length: SizeOrZero | tuple[SizeOrZero, ...] = 0
    recent_share: Share = 1.0  # of the slots, for the newest states; the others hold compressed older ones
    compression_weight: Share = 0.7  # of a compressed slot's old content when older states are added to it
    batch_policy: Literal["strict", "select", "repeat"] = (
        "strict"  # when the batch changes size; see Memory.match_batch
    )


@dataclass(frozen=True, kw_only=True)
class CacheConfig(Section):
    """The key/value cache of generation."""

    dtype: Literal["compute", "float32", "bfloat16", "int8", "float8_e4m3fn"] = "compute"  # 8 bits: half the memory
    heavy_hitters: SizeOrZero | None = None  # keep so many keys that got most attention, drop other old ones
    recent: Size | None = None  # with heavy_hitters: the newest keys, which always stay

    def _check(self) -> None:
        require(
            (self.heavy_hitters is None) == (self.recent is None),
            f"cache.heavy_hitters and cache.recent belong together, got {self.heavy_hitters} and {self.recent}",
        )


@dataclass(frozen=True, kw_only=True)
class ByteConfig(Section):
    """The network. Field names are Hugging Face's where one exists.

    ``None`` means "derived": see the properties ``kv_heads``, ``head_size`` and ``mlp_size``.
    """

    _aliases = _ALIASES
    _example = "hidden_size"

    vocab_size: Size = 32000
    vocab_size_multiple: Size = 1  # embedding and head get rows up to a multiple, which no token ever uses
    hidden_size: Size = 768
    num_hidden_layers: LayerCount = 12
    num_attention_heads: Size = 12
    num_key_value_heads: Size | None = None  # fewer than the heads: grouped-query attention, a smaller KV cache
    head_dim: Size | None = None
    intermediate_size: Size | None = None
    hidden_act: Literal["silu", "gelu", "gelu_pytorch_tanh"] = "silu"  # silu: SwiGLU; gelu: GEGLU
    # stellarbyte: the original's own, silu(up) * sigmoid(gate) between an inner norm and an inner residual.
    mlp_style: Literal["gated", "stellarbyte"] = "gated"
    max_position_embeddings: Size = 2048
    tie_word_embeddings: bool = False

    # xpos: attention decays with distance. stellarbyte: the original's mixed pairing, for its checkpoints only.
    position_embedding: Literal["rope", "xpos", "stellarbyte"] = "rope"
    rope_theta: PositiveFloat = 10000.0
    rope_pairing: Literal["half", "interleaved"] = "half"  # half: channel i is rotated with i + H/2, as in Hugging Face
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    xpos_scale_base: PositiveFloat = 512.0  # smaller: attention decays faster with distance
    xpos_learnable: bool = False  # each layer learns its rates of decay, from the paper's on

    rms_norm_eps: PositiveFloat = 1e-5
    rms_norm_eps_rule: Literal["add", "clamp"] = "add"
    attention_bias: bool = False  # on q, k and v
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head of q and k: tames growing attention logits
    sliding_window: Size | None = None
    layer_types: tuple[str, ...] | None = None  # "full_attention" | "sliding_attention" for each layer
    sink_tokens: SizeOrZero = 0  # first tokens of a document, which a window never hides; refuses cudnn
    attention_logit_softcap: PositiveFloat | None = None  # refuses the fused kernels
    attention_prune_below: Fraction = (
        0.0  # weights below this fraction of the largest are masked; refuses the fused kernels
    )
    memory: MemoryConfig = field(default_factory=MemoryConfig)

    parallel_residual: bool = False  # attention and MLP read the same norm and are added together
    # branch: each branch is divided by sqrt(2 layers). deepnorm: norm(alpha x + branch), as in the paper.
    residual_scaling: Literal["none", "branch", "deepnorm"] = "none"
    layer_scale_init: PositiveFloat | None = None  # a learned factor for each channel of a branch
    drop_path: Fraction = 0.0  # rate at which the last layer's branches are left out in training; layer 0 never is
    # depth: residual outputs smaller by sqrt(2 layers). stellarbyte: all matrices. deepnorm: the paper's.
    # None: deepnorm where residual_scaling is, else depth.
    initialization: Literal["normal", "depth", "stellarbyte", "deepnorm"] | None = None
    initializer_range: PositiveFloat = 0.02

    attention_dropout: Fraction = 0.0  # refuses the fused kernels
    hidden_dropout: Fraction = 0.0
    residual_dropout: Fraction = 0.0

    # How it is computed; none of this changes the function or the checkpoint.
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    attention_implementation: AttentionImplementation = "auto"
    remat: Literal["none", "dots", "full"] = "none"  # full: least memory, about a third more time
    scan_unroll: PositiveInt | None = 1  # None: all layers; faster steps on small models, longer compilation
    cache: CacheConfig = field(default_factory=CacheConfig)

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
        self._check_layers()

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

    def _check_layers(self) -> None:
        if self.layer_types is not None:
            known = ("full_attention", "sliding_attention")
            unknown = sorted(set(self.layer_types) - set(known))
            require(not unknown, f"layer_types may hold {known}, got {shown(unknown)}")
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
            require(
                isinstance(self.memory.length, int) or len(self.memory.length) == self.num_hidden_layers,
                f"memory.length names {shown(self.memory.length)}, num_hidden_layers is {self.num_hidden_layers}",
            )
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
            return tuple(
                LayerSpec(r + 1, r, n - r) if n else LayerSpec(None) for r, n in zip(recent, lengths, strict=False)
            )
        if self.layer_types is None:
            return tuple(LayerSpec(self.sliding_window) for _ in layers)
        return tuple(LayerSpec(self.sliding_window if t == "sliding_attention" else None) for t in self.layer_types)

    @property
    def layer_groups(self) -> tuple[LayerGroup, ...]:
        """The layers in order, those with the same weights together. All layers of this network have the same."""
        return (LayerGroup(self.layer_specs),)

    @property
    def memory_slots(self) -> int:
        """Memory slots of the layer that has most."""
        return max(spec.memory_slots for spec in self.layer_specs)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Window of each layer, None where attention is full."""
        return tuple(spec.window for spec in self.layer_specs)
