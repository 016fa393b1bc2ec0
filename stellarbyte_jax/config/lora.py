"""Settings of low-rank adapters."""

from dataclasses import dataclass
from typing import Literal

from stellarbyte_jax.config.foreign import listed
from stellarbyte_jax.config.moe import MoEConfig
from stellarbyte_jax.config.section import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, Section, require

# Weights that may have an adapter, by their names in settings, with those of PEFT for the same.
TARGETS = ("q", "k", "v", "o", "gate_up", "down", "experts", "shared", "router", "embed", "head")
_ALIASES = {
    "q_proj": ("q",),
    "k_proj": ("k",),
    "v_proj": ("v",),
    "o_proj": ("o",),
    "down_proj": ("down",),
    "gate": ("router",),
    "embed_tokens": ("embed",),
    "lm_head": ("head",),
    "attention": ("q", "k", "v", "o"),
    "mlp": ("gate_up", "down"),
    "all-linear": ("q", "k", "v", "o", "gate_up", "down"),
}
_PAIR = ("gate_proj", "up_proj")  # of PEFT: one weight here, gate_up


def _targets_of(name: str) -> tuple[str, ...]:
    return ("gate_up",) if name in _PAIR else _ALIASES.get(name, (name,))


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(Section):
    """Low-rank adapters: ``W x + (lora_alpha / r) B A x`` with ``W`` frozen, A random and B zero at the start.

    Hu et al. 2021, https://arxiv.org/abs/2106.09685.

    Attributes:
      r: rank of the adapters; 0: none, and all weights are trained
      lora_alpha: adapters are multiplied by lora_alpha / r
      rslora: adapters are multiplied by lora_alpha / sqrt(r) instead, so that larger ranks learn as fast
        (Kalajdzievski 2023)
      target_modules: weights with an adapter: q, k, v, o, gate_up, down, experts, shared, router, embed, head; or names
        of PEFT (q_proj, ...), attention, mlp, all-linear
      layers: layers with adapters, from 0; none: all
      dropout: share of what an adapter reads that is set to 0 in training; not of experts and embed
      dora: adapters change the direction of each output's weights, and learn its length beside it (Liu et al. 2024)
      activation: of the inner channels of adapters, not of experts and embed; none: they are linear, and can be merged
        into the weights
      init: A at the start: kaiming, as in PEFT, or gaussian with a deviation of 1 / r
      modules_to_save: further weights that are trained whole: embed, head, norms, biases
      base_dtype: type of the frozen matrices; bfloat16: half the memory, and the same results where compute_dtype is it
      regularization: weight in the loss of the mean square of what adapters add to the weights
    """

    r: NonNegativeInt = 0
    lora_alpha: PositiveFloat = 16.0
    rslora: bool = False
    target_modules: tuple[str, ...] = ("all-linear",)
    layers: tuple[NonNegativeInt, ...] | None = None
    dropout: Fraction = 0.0
    dora: bool = False
    activation: Literal["none", "relu", "silu", "gelu"] = "none"
    init: Literal["kaiming", "gaussian"] = "kaiming"
    modules_to_save: tuple[Literal["embed", "head", "norms", "biases"], ...] = ()
    base_dtype: Literal["float32", "bfloat16"] = "float32"
    regularization: NonNegativeFloat = 0.0

    @property
    def targets(self) -> frozenset[str]:
        """Weights with an adapter, by their names in ``TARGETS``."""
        if not self.r:
            return frozenset()
        return frozenset(t for name in self.target_modules for t in _targets_of(name))

    @property
    def scale(self) -> float:
        """What adapters are multiplied by."""
        return self.lora_alpha / (self.r**0.5 if self.rslora else self.r)

    def _check(self) -> None:
        if not self.r:
            given = self.given()
            require(not given, f"lora.{listed(given)} would change nothing without adapters: set lora.r, such as 16")
            return
        names = set(self.target_modules)
        unknown = sorted(names - {*TARGETS, *_ALIASES, *_PAIR})
        require(
            not unknown,
            f"lora.target_modules names {listed(unknown)}; there are {', '.join((*TARGETS, *_ALIASES, *_PAIR))}",
        )
        require(
            len(names & set(_PAIR)) != 1 or bool(names & {"gate_up", "mlp", "all-linear"}),
            "lora.target_modules: gate_proj and up_proj are one weight here: name both, or gate_up",
        )
        require(bool(self.target_modules), "lora.target_modules is empty: name weights, such as all-linear")
        targets = self.targets
        require(
            self.dropout == 0 or not targets & {"experts", "embed"},
            "lora.dropout is not for experts and embed: set it to 0, or leave these out of lora.target_modules",
        )
        require(
            self.activation == "none" or not targets & {"experts", "embed"},
            "lora.activation is not for experts and embed: set it to none, or leave these out of lora.target_modules",
        )
        twice = sorted(targets & set(self.modules_to_save))
        require(not twice, f"lora.modules_to_save trains {listed(twice)} whole: leave it out of lora.target_modules")
        require(
            not self.dora or (self.activation == "none" and "embed" not in targets),
            "lora.dora is of linear adapters of matrices: leave out lora.activation and the target embed",
        )
        require(
            not (self.dora and "head" in targets and self.dropout),
            "lora.dora of the head, which is merged before it is used, has no dropout: set lora.dropout=0, or leave "
            "head out of lora.target_modules",
        )

    def check_network(self, moe: MoEConfig, layers: int, *, dense: bool, tied: bool) -> None:
        """Raises ConfigError where these settings name what a network does not have.

        Args:
          moe: its experts.
          layers: number of its layers.
          dense: whether a layer of it has no experts.
          tied: whether its head is its embedding.
        """
        if not self.r:
            return
        require(
            not (tied and "head" in self.targets | set(self.modules_to_save)),
            "lora names head, which is the embedding here (tie_word_embeddings): name embed",
        )
        require(
            moe.rebalance_interval is None,
            "moe.rebalance_interval changes weights of experts, which are frozen beside adapters: set it to none",
        )
        experts = moe.num_experts > 0
        has = {"gate_up": dense, "down": dense, "experts": experts, "router": experts, "head": not tied}
        has["shared"] = experts and moe.n_shared_experts > 0
        there = [name for name in TARGETS if has.get(name, True)]
        lacking = [name for name in self.target_modules if not has.get(name, True)]
        require(
            not lacking and bool(self.targets & set(there)),
            f"lora.target_modules names {listed(lacking or self.target_modules)}, which the model does not have; there "
            f"are {', '.join(there)}",
        )
        require(self.layers != (), "lora.layers is empty: name layers, or none for all")
        beyond = [layer for layer in self.layers or () if layer >= layers]
        require(not beyond, f"lora.layers names {listed(beyond)}, there are {layers} layers from 0")
        require(
            self.layers is None or not (moe.shared_pool and "experts" in self.targets),
            "lora.layers: layers share one pool of experts here: leave it out, or experts out of lora.target_modules",
        )
