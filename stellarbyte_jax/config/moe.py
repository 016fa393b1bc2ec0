"""Settings of layers whose feed-forward part is a mixture of experts."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from stellarbyte_jax.config.foreign import listed
from stellarbyte_jax.config.section import (
    Fraction,
    NonNegativeFloat,
    PositiveFloat,
    Section,
    Share,
    Size,
    SizeOrZero,
    require,
)

# Where a choice goes that its expert had no room for, one after another.
OVERFLOW_STEPS = ("next_best", "cold", "sticky", "random")

# When experts are split and merged: a run may change that.
REBALANCING = ("rebalance_interval", "split_above", "merge_below", "twin_steps")

# Settings that are read where another one has a value, in words.
_BELONG: Mapping[str, tuple[str, ...]] = {
    "dispatch=capacity": (
        "capacity_factor",
        "min_capacity",
        "max_capacity",
        "dynamic_capacity",
        "overflow",
    ),
    "gate=context": ("context_size", "gate_intermediate_size", "history_decay"),
}


@dataclass(frozen=True, kw_only=True)
class MoEConfig(Section):
    """Mixture of experts: some gated MLPs of many for each token.

    Shazeer et al. 2017, https://arxiv.org/abs/1701.06538.

    Attributes:
      num_experts: experts of a layer; 0: every layer has one MLP
      num_experts_per_tok: experts of a token, at most
      intermediate_size: channels inside an expert; none: intermediate_size of the model
      n_shared_experts: further experts, that every token passes
      first_k_dense_replace: first layers that have one MLP
      decoder_sparse_step: every n-th layer has experts, the others have one MLP
      mlp_only_layers: numbers of layers that have one MLP, from 0
      shared_pool: all layers use the same experts, each with a router of its own
      gate: linear: scores from the token alone; context: the original's, from features of the token, its position
        and what came before
      context_size: channels of the context gate's features; half as many of the position
      gate_intermediate_size: channels inside the context gate's MLP; none: as context_size
      history_decay: weight of the past in the running mean of a document's earlier tokens that the context gate reads;
        0: it reads none
      scoring_func: softmax over the experts, or sigmoid of each
      norm_topk_prob: the weights of a token's experts add up to one
      routed_scaling_factor: factor of the weights
      n_group: equal groups of experts, of which a token uses topk_group
      topk_group: see n_group
      dynamic_k: a token has no more experts than it needs for this share of its scores; none: always
        num_experts_per_tok
      noise: of the scores in training; noisy_topk: normal, with a learned size for each token and expert; gumbel: of
        one size, so that experts are drawn by their scores
      noise_scale: factor of the noise
      temperature: the scores' logits are divided by it
      adaptive_temperature: it is learned, and rises while the load is uneven
      expert_priority: experts that are little used get larger scores
      cooling_steps: an expert that got no tokens has up to twice its score, which cools down over so many steps from
        the time it is used again; 0: it has not
      router_warmup_steps: first steps, in which tokens go to random experts, fewer and fewer of them
      implementation: of dropless experts; xla: products of blocks; pallas: kernels for Hopper GPUs, refused on others
        and for adapters of experts; auto: these kernels where they can be used, else xla, and says which
      dispatch: dropless: every token gets its experts; capacity: an expert takes no more than its capacity in training
      capacity_factor: room of an expert by its fair share of the tokens
      min_capacity: least room of an expert, in tokens
      max_capacity: most room of an expert, in tokens; none: no limit
      dynamic_capacity: the room is smaller while experts use it, as in the original
      overflow: where choices go for which there was no room, in this order: next_best expert of the token, cold ones
        that are used least, sticky: the first choice of the token before, random ones; what is left passes the layer
        by
      bias_update_rate: balance without a loss: a bias of each expert, for the choice alone, rises or falls by this in
        each step; 0: there is none
      state_decay: weight of the past in the running means of load and use
      rebalance_interval: optimizer steps after which, in each layer, two idle experts become one and an overloaded one
        becomes two; none: never
      split_above: load from which an expert is split, as a multiple of its fair share
      merge_below: load below which experts are merged, as a share of the fair one
      twin_steps: steps after a split in which tokens at even positions see one of the two and those at odd positions
        the other, so that nothing changes but their weights
    """

    _example = "num_experts"

    num_experts: SizeOrZero = 0
    num_experts_per_tok: Size = 2
    intermediate_size: Size | None = None
    n_shared_experts: SizeOrZero = 0
    first_k_dense_replace: SizeOrZero = 0
    decoder_sparse_step: Size = 1
    mlp_only_layers: tuple[SizeOrZero, ...] = ()
    shared_pool: bool = False

    gate: Literal["linear", "context"] = "linear"
    context_size: Size = 64
    gate_intermediate_size: Size | None = None
    history_decay: Fraction = 0.0
    scoring_func: Literal["softmax", "sigmoid"] = "softmax"
    norm_topk_prob: bool = True
    routed_scaling_factor: PositiveFloat = 1.0
    n_group: Size = 1
    topk_group: Size = 1
    dynamic_k: Share | None = None
    noise: Literal["none", "noisy_topk", "gumbel"] = "none"
    noise_scale: PositiveFloat = 1.0
    temperature: PositiveFloat = 1.0
    adaptive_temperature: bool = False
    expert_priority: bool = False
    cooling_steps: SizeOrZero = 0
    router_warmup_steps: SizeOrZero = 0

    implementation: Literal["auto", "xla", "pallas"] = "auto"
    dispatch: Literal["dropless", "capacity"] = "dropless"
    capacity_factor: PositiveFloat = 1.25
    min_capacity: Size = 4
    max_capacity: Size | None = None
    dynamic_capacity: bool = False
    overflow: tuple[str, ...] = ("next_best",)

    bias_update_rate: NonNegativeFloat = 0.0
    state_decay: Fraction = 0.9

    rebalance_interval: Size | None = None
    split_above: PositiveFloat = 2.0
    merge_below: Share = 0.25
    twin_steps: Size = 100

    def _check(self) -> None:
        if self.num_experts == 0:
            require(
                not self.given(),
                f"moe.num_experts is 0, but {', '.join(self.given())} is given: set moe.num_experts",
            )
            return
        E, K = self.num_experts, self.num_experts_per_tok
        require(
            self.implementation == "auto" or self.dispatch == "dropless",
            f"moe.implementation={self.implementation} is of moe.dispatch=dropless: with a capacity leave it at auto",
        )
        require(K <= E, f"moe.num_experts_per_tok {K} is above moe.num_experts {E}")
        require(
            E % self.n_group == 0,
            f"moe.num_experts {E} is not divisible by moe.n_group {self.n_group}: groups are equal",
        )
        require(
            self.topk_group <= self.n_group,
            f"moe.topk_group {self.topk_group} is above moe.n_group {self.n_group}",
        )
        kept = E // self.n_group * self.topk_group
        require(
            K <= kept,
            f"moe.num_experts_per_tok {K} is above the {kept} experts of moe.topk_group {self.topk_group} groups: "
            "raise topk_group",
        )
        require(
            self.dynamic_k is None or K > 1,
            f"moe.dynamic_k {self.dynamic_k} leaves a token fewer of its experts, and moe.num_experts_per_tok is {K}: "
            "raise it, or leave dynamic_k out",
        )
        for owner, settings in _BELONG.items():
            name, _, value = owner.partition("=")
            stray = [setting for setting in settings if setting in self.given() and getattr(self, name) != value]
            require(not stray, f"moe.{', '.join(stray)} belongs to moe.{owner}: set that, or leave it out")
        require(
            "noise_scale" not in self.given() or self.noise != "none",
            "moe.noise_scale is of the noise: set moe.noise to noisy_topk or gumbel, or leave it out",
        )
        unknown = [step for step in self.overflow if step not in OVERFLOW_STEPS]
        require(not unknown, f"moe.overflow may hold {', '.join(OVERFLOW_STEPS)}, got {listed(unknown)}")
        require(len(set(self.overflow)) == len(self.overflow), "moe.overflow names a step twice")
        require(
            self.max_capacity is None or self.max_capacity >= max(self.min_capacity, K),
            f"moe.max_capacity {self.max_capacity} is below moe.min_capacity {self.min_capacity} or "
            f"moe.num_experts_per_tok {K}",
        )
        self._check_rebalance()

    def _check_rebalance(self) -> None:
        if self.rebalance_interval is None:
            stray = [name for name in REBALANCING if name in self.given()]
            require(not stray, f"moe.{', '.join(stray)} belongs to moe.rebalance_interval: set that, or leave it out")
            return
        E, K = self.num_experts, self.num_experts_per_tok
        require(
            E >= 3 and K < E,
            f"moe.rebalance_interval merges two experts and splits a third, of which a token sees one half: it needs 3 "
            f"experts and more than num_experts_per_tok, there are {E} and {K}",
        )
        require(self.split_above > 1, f"moe.split_above {self.split_above} is no overload: give more than 1")
        require(
            self.merge_below < 1, f"moe.merge_below {self.merge_below} is the load of a used expert: give less than 1"
        )
        obstacles = {
            "shared_pool": (self.shared_pool, "layers share experts, and each has loads of its own"),
            "topk_group": (self.topk_group < self.n_group, "a split expert may come into a group that a token lacks"),
            "adaptive_temperature": (self.adaptive_temperature, "the temperature follows loads, which a split changes"),
        }
        for name, (is_set, why) in obstacles.items():
            require(not is_set, f"moe.rebalance_interval and moe.{name}: {why}; leave one of them out")

    def has_experts(self, layer: int) -> bool:
        """Whether this layer, from 0, has experts and not one MLP."""
        return (
            self.num_experts > 0
            and layer >= self.first_k_dense_replace
            and (layer + 1) % self.decoder_sparse_step == 0
            and layer not in self.mlp_only_layers
        )

    def slots(self, tokens: int) -> int:
        """The slots that are laid out for each expert where so many tokens are computed at once."""
        fair = tokens * self.num_experts_per_tok / self.num_experts
        slots = max(self.min_capacity, math.ceil(fair * self.capacity_factor - 1e-9))  # not one more for a rounding
        return max(1, min(slots, self.max_capacity or slots, tokens))

    def check_capacity(self, tokens: int) -> None:
        """Raises ConfigError where experts have less room for so many tokens than a token has choices."""
        if self.num_experts == 0 or self.dispatch != "capacity":
            return
        K, slots = self.num_experts_per_tok, self.slots(tokens)
        require(
            slots >= min(K, tokens),
            f"moe.capacity_factor {self.capacity_factor:g} gives an expert room for {slots} of {tokens:,} tokens, less "
            f"than moe.num_experts_per_tok {K}: raise moe.capacity_factor or moe.min_capacity",
        )

    @property
    def is_random(self) -> bool:
        """Whether training draws random numbers for it."""
        return self.noise != "none" or self.router_warmup_steps > 0 or "random" in self.overflow
