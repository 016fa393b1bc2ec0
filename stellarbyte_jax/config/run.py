"""Everything about a training run that is not the network: data, optimizer, schedule, loss, checkpoints, logging."""

import json
from dataclasses import dataclass, field
from typing import Literal

from stellarbyte_jax.config.data import DataConfig
from stellarbyte_jax.config.foreign import listed
from stellarbyte_jax.config.mesh import MeshConfig
from stellarbyte_jax.config.model import ByteConfig
from stellarbyte_jax.config.section import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    Share,
    require,
)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section):
    """The update rule. ``learning_rate`` is the peak of the schedule.

    ``b1`` and ``b2`` are decay rates of averages: of gradients and their squares in AdamW; in Lion ``b1`` mixes the
    update and ``b2`` the momentum; in Muon both are those of the AdamW rule for what is no matrix inside a layer, whose
    momentum is optax's 0.95 there.

    Attributes:
      name: update rule
      learning_rate: peak of the schedule
      b1: decay rate of the average of gradients; see above
      b2: decay rate of the average of squared gradients; see above
      eps: added to the root of the second average (adamw, muon)
      weight_decay: decay rate of matrices; norms, biases and scales are left alone
      decay_embeddings: weight decay is of embeddings too
      gradient_clip_norm: gradients of a larger norm are scaled down to it; none: never
      router_learning_rate_ratio: learning rate of the routers of experts by that of the other weights
    """

    name: Literal["adamw", "lion", "muon"] = "adamw"
    learning_rate: PositiveFloat = 6e-4
    b1: Fraction = 0.9
    b2: Fraction = 0.95
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    decay_embeddings: bool = True
    gradient_clip_norm: PositiveFloat | None = 1.0
    router_learning_rate_ratio: PositiveFloat = 1.0

    def _check(self) -> None:
        require(
            self.name != "lion" or "eps" not in self.given(),
            "optimizer.eps is of adamw and muon: lion takes signs and divides by nothing, leave it out",
        )
        require(self.eps > 1.2e-38, f"optimizer.eps {self.eps} is 0 in float32: give at least 1e-37")
        require(
            self.decay_embeddings or self.weight_decay > 0,
            "optimizer.decay_embeddings=false spares embeddings from weight decay, and weight_decay is 0: leave it out",
        )


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Section):
    """Learning rate over optimizer steps, counted after accumulation.

    Attributes:
      name: form of the learning rate
      warmup_steps: optimizer steps from 0 to the peak
      final_ratio: share of the peak at the last step, even where the warm-up would reach so far
      decay_steps: optimizer steps of the last phase of wsd; none: a fifth of the run
      cycles: number of cycles of cosine_restarts
      cycle_decay: each cycle's peak is this times the last one's (cosine_restarts)
    """

    name: Literal["cosine", "cosine_restarts", "wsd", "linear", "constant"] = "cosine"
    warmup_steps: NonNegativeInt = 100
    final_ratio: Share = 0.1
    decay_steps: PositiveInt | None = None
    cycles: PositiveInt = 1
    cycle_decay: PositiveFloat = 1.0

    def _check(self) -> None:
        require(
            self.name == "cosine_restarts" or (self.cycles == 1 and self.cycle_decay == 1.0),
            f"schedule.cycles and cycle_decay belong to cosine_restarts, the schedule is {self.name}",
        )
        require(
            self.name == "wsd" or self.decay_steps is None,
            f"schedule.decay_steps belongs to wsd, the schedule is {self.name}",
        )
        require(
            self.name != "constant" or "final_ratio" not in self.given(),
            "schedule.final_ratio is where a schedule falls to, and constant never falls: leave it out",
        )
        require(
            self.cycles > 1 or self.cycle_decay == 1.0,
            "schedule.cycle_decay is from one cycle to the next, and there is one: set schedule.cycles",
        )


@dataclass(frozen=True, kw_only=True)
class LossConfig(Section):
    """What is minimised.

    Attributes:
      label_smoothing: share of the target that is spread over all tokens
      z_loss: weight of log(Z)^2, which keeps logits near zero; 1e-4 is usual
      xpos_regularization: weight of the mean squared distance of learned XPos rates to the paper's
      router_load: weight of the load times the mean score of each expert, which is least where all experts get as
        many tokens; of each part of the batch
      router_global: the same, with loads of the whole batch as far as its parts were read
      router_sequence: the same, of each row
      router_entropy: the same, where tokens count by the entropy of their scores
      router_kl: weight of the divergence of the mean scores from even ones
      router_mse: weight of the squared distance of loads from even ones
      router_variance: weight of the squared coefficient of variation of the mean scores
      router_z: weight of the router's log(Z)^2; 1e-3 is usual
      implementation: of the head's loss: xla, or pallas, a kernel for Hopper GPUs, for a bfloat16 or float16 head
        without an adapter whose vocabulary is a multiple of 128; auto: xla
    """

    label_smoothing: Fraction = 0.0
    z_loss: NonNegativeFloat = 0.0
    xpos_regularization: NonNegativeFloat = 0.0
    router_load: NonNegativeFloat = 0.01
    router_global: NonNegativeFloat = 0.0
    router_sequence: NonNegativeFloat = 0.0
    router_entropy: NonNegativeFloat = 0.0
    router_kl: NonNegativeFloat = 0.0
    router_mse: NonNegativeFloat = 0.0
    router_variance: NonNegativeFloat = 0.0
    router_z: NonNegativeFloat = 0.0
    implementation: Literal["auto", "xla", "pallas"] = "auto"


@dataclass(frozen=True, kw_only=True)
class LossScaleConfig(Section):
    """The factor of the loss with which gradients in float16 are computed.

    A step whose gradients overflow is left out, and the factor halved.

    Attributes:
      initial: factor of the first step
      growth_interval: steps without overflow after which it is doubled
    """

    initial: PositiveFloat = 65536.0
    growth_interval: PositiveInt = 2000

    def _check(self) -> None:
        require(self.initial >= 1, f"loss_scale.initial={self.initial:g} would lose small gradients: set 1 or more")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Section):
    """Validation during training, and tasks of lm-eval.

    Attributes:
      interval: optimizer steps between validations
      batches: batches of global_batch_size rows in a validation; none: all there are
      patience: validations without a better loss after which the run stops; none: it goes on
      tasks: tasks of lm-eval that the averaged weights are measured on at the end of the run, by name or as paths of
        YAML or JSON files; needs the extra eval
      tasks_interval: optimizer steps between measurements on tasks; none: none before the end
      tasks_limit: documents of each task, the first ones; none: all there are
    """

    interval: PositiveInt = 500
    batches: PositiveInt | None = 50
    patience: PositiveInt | None = None
    tasks: tuple[str, ...] = ()
    tasks_interval: PositiveInt | None = None
    tasks_limit: PositiveInt | None = None

    def _check(self) -> None:
        require(all(self.tasks), "evaluation.tasks holds an empty name: leave it out")
        for name in ("tasks_interval", "tasks_limit"):
            require(
                getattr(self, name) is None or len(self.tasks) > 0,
                f"evaluation.{name}={getattr(self, name)} would change nothing without evaluation.tasks: name tasks, "
                f"or set evaluation.{name}=none",
            )


_OF_VALIDATION = ("interval", "batches", "patience")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Section):
    """What is kept on disk.

    Attributes:
      interval: optimizer steps between checkpoints
      keep_latest: number of newest checkpoints that are kept
      keep_best: number of checkpoints with the lowest validation loss that are kept
      verify: arrays are compared with their checksums when a checkpoint is read
    """

    interval: PositiveInt = 500
    keep_latest: PositiveInt = 2
    keep_best: NonNegativeInt = 1
    verify: bool = True


@dataclass(frozen=True, kw_only=True)
class LoggingConfig(Section):
    """Where metrics go. The console and ``metrics.jsonl`` are always written.

    Attributes:
      interval: optimizer steps between lines of metrics
      trackers: further places for metrics: tensorboard, wandb, swanlab
    """

    interval: PositiveInt = 10
    trackers: tuple[str, ...] = ()

    def _check(self) -> None:
        known = ("tensorboard", "wandb", "swanlab")
        unknown = [t for t in self.trackers if t not in known]
        require(not unknown, f"logging.trackers may hold {', '.join(known)}, got {listed(unknown)}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """One complete run.

    Attributes:
      output_dir: directory of the run: checkpoints, metrics, logs, exports
      steps: optimizer steps of the run
      init_from: weights to begin with: a run, RUN/checkpoints/STEP, a Hugging Face directory or one of PEFT, or
        owner/name of the hub; model and tokenizer, where they are left out, come from there too; without effect once
        the run has checkpoints
      global_batch_size: rows of one optimizer step, over all devices and accumulation steps
      gradient_accumulation_steps: parts in which a batch is computed, one after the other; more: less memory
      seed: of initial weights, dropout and the order of documents
      ema_decay: decay rate of an average of the weights, used for validation and export; none: no average
      sample_prompts: texts that are continued at the end of the run
      sample_interval: optimizer steps between rounds of sample_prompts during training; none: no round before the end
      export_at_end: writes output_dir/hf at the end; a model with memory or pruned attention weights has no export
      report_at_end: writes output_dir/report.html at the end, a page with plots; needs the extra report
      model: the network
      data: documents, and how they become batches
      optimizer: the update rule
      schedule: the learning rate over the run
      loss: what is minimised
      loss_scale: of gradients in float16
      evaluation: validation during training, and tasks
      checkpoint: what is kept on disk
      logging: where metrics go
      mesh: the devices of the run
    """

    output_dir: str
    steps: PositiveInt
    init_from: str | None = None
    global_batch_size: PositiveInt = 32
    gradient_accumulation_steps: PositiveInt = 1
    seed: NonNegativeInt = 0
    ema_decay: Fraction | None = None
    sample_prompts: tuple[str, ...] = ()
    sample_interval: PositiveInt | None = None
    export_at_end: bool = False
    report_at_end: bool = False
    model: ByteConfig = field(default_factory=ByteConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    loss_scale: LossScaleConfig = field(default_factory=LossScaleConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    _paths = ("output_dir", "init_from")

    def _check(self) -> None:
        require(self.output_dir.strip() != "", "output_dir is empty: name a directory for the run, such as runs/first")
        require(self.init_from != "", "init_from is empty: name a directory, or none")
        require(
            self.global_batch_size % self.gradient_accumulation_steps == 0,
            f"global_batch_size {self.global_batch_size} is not divisible by "
            f"gradient_accumulation_steps {self.gradient_accumulation_steps}",
        )
        require(
            self.sample_interval is None or len(self.sample_prompts) > 0,
            f"sample_interval={self.sample_interval} would change nothing without sample_prompts: name prompts, or set "
            "sample_interval=none",
        )
        warmup, decay = self.schedule.warmup_steps, self.schedule.decay_steps
        more = "" if decay is None else f" and schedule.decay_steps={decay}"
        require(
            warmup + (decay or 0) <= self.steps,
            f"schedule.warmup_steps={warmup}{more} do not fit into steps={self.steps}: lower them, or set more steps",
        )
        rest = self.steps - self.schedule.warmup_steps
        require(
            self.schedule.cycles == 1 or rest >= 2 * self.schedule.cycles,
            f"schedule.cycles={self.schedule.cycles} do not fit into the {rest} steps after the warm-up: a cycle has a "
            "first step and a last one",
        )
        if not self.data.validation:
            unread = {
                f"evaluation.{n}": getattr(EvaluationConfig(), n)
                for n in self.evaluation.given()
                if n in _OF_VALIDATION
            }
            if "keep_best" in self.checkpoint.given():
                unread["checkpoint.keep_best"] = CheckpointConfig().keep_best
            defaults = " ".join(f"{name}={str(value).lower()}" for name, value in unread.items())
            require(
                not unread,
                f"{', '.join(unread)} would change nothing without data.validation: name validation files, or set "
                f"{defaults}, the default",
            )
        if not self.leaves_model_out:
            self.check_model()

    @property
    def leaves_model_out(self) -> bool:
        """Whether the model is that of ``init_from``, which is not known yet; adapters go with any."""
        return self.init_from is not None and self.model.without_adapters == ByteConfig()

    def check_model(self) -> None:
        """Raises ConfigError where the model and other sections contradict each other."""
        require(
            self.data.sequence_length <= self.model.max_position_embeddings,
            f"data.sequence_length {self.data.sequence_length} is longer than "
            f"model.max_position_embeddings {self.model.max_position_embeddings}",
        )
        self.model.check_adapters()
        rows = self.global_batch_size // self.gradient_accumulation_steps
        self.model.moe.check_capacity(rows * self.data.sequence_length)
        require(
            self.data.arrangement == "contiguous" or not self.model.has_memory,
            "model.memory needs rows that continue each other: set data.arrangement=contiguous",
        )
        require(
            self.loss.xpos_regularization == 0 or self.model.xpos_learnable,
            "loss.xpos_regularization pulls learned rates: it needs model.xpos_learnable",
        )
        scaled = self.loss_scale.given()
        require(
            self.model.compute_dtype == "float16" or not scaled,
            f"loss_scale.{', '.join(scaled)} would change nothing with model.compute_dtype="
            f"{self.model.compute_dtype}: set float16, or leave it out",
        )
        for section, name in ((self.loss, "loss"), (self.optimizer, "optimizer")):
            stray = [setting for setting in section.given() if setting.startswith("router_")]
            require(
                not stray or self.model.moe.num_experts > 0,
                f"{name}.{', '.join(stray)} belongs to routers: set model.moe.num_experts, or leave it out",
            )

    def to_json(self) -> str:
        """The resolved config, as stored beside every checkpoint."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)
