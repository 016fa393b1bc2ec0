"""What a report says: sections of tables, notes and charts, in one language, for any way to show them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.inspect.costs import ParameterCounts, flops_per_token, parameter_counts
from stellarbyte_jax.inspect.labels import Language, label
from stellarbyte_jax.inspect.memory import (
    CACHE_DTYPES,
    OPTIMIZERS,
    WEIGHT_DTYPES,
    OptimizerName,
    cache_bytes,
    cache_growth,
    optimizer_bytes,
    training_bytes,
    weight_bytes,
)
from stellarbyte_jax.inspect.numbers import factor, of_bytes, percent, short
from stellarbyte_jax.inspect.sparsity import Statistics, WeightStatistics
from stellarbyte_jax.inspect.speed import Speed
from stellarbyte_jax.model.decoder import ByteTransformer
from stellarbyte_jax.model.trees import IsTrainable, all_trainable


@dataclass(frozen=True)
class Table:
    """Columns, of which the first holds names and the others numbers; rows of texts."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Section:
    """A title, tables, notes below them, and the keys of its charts."""

    title: str
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()
    charts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """A whole report.

    Attributes:
      title: with the model's name.
      language: of its words.
      sections: in order.
    """

    title: str
    language: Language
    sections: tuple[Section, ...]


@dataclass(frozen=True)
class Setup:
    """The sizes for which memory and operations are told.

    Attributes:
      optimizer: of a training step.
      rows: sequences of a training step at once.
      length: tokens of such a sequence.
      average: whether training keeps an average of the weights.
      cache_batch: rows of the cache.
      cache_length: tokens of each of them.
    """

    optimizer: OptimizerName
    rows: int
    length: int
    average: bool
    cache_batch: int
    cache_length: int


@dataclass(frozen=True)
class Measured:
    """Speeds by batch size, and how they were measured."""

    speeds: Sequence[Speed]
    prompt_length: int
    new_tokens: int
    repeats: int
    device: str
    fresh_weights: bool


class ReportWriter:
    """Makes the sections of one model's report."""

    def __init__(
        self,
        model: ByteTransformer,
        setup: Setup,
        language: Language,
        is_trainable: IsTrainable = all_trainable,
    ) -> None:
        """Counts what all sections need; computes nothing on a device."""
        self.model, self.config, self.setup = model, model.config, setup
        self.language: Language = language
        self.counts = parameter_counts(model, is_trainable)
        self._is_trainable = is_trainable

    def word(self, key: str, *values: object) -> str:
        """A label in the report's language."""
        return label(key, self.language, *values)

    def title(self, name: str) -> str:
        """The title of the report on a model of this name."""
        return f"{self.word('report')}: {name}"

    def structure(self) -> Section:
        """The settings that say what the network is."""
        c, word = self.config, self.word
        vocabulary = f"{c.vocab_size:,}"
        if c.padded_vocab_size > c.vocab_size:
            vocabulary = word("padded", vocabulary, f"{c.padded_vocab_size:,}")
        deepnorm = c.residual_scaling == "deepnorm"
        residual = "deepnorm" if deepnorm else word("parallel" if c.parallel_residual else "sequential")
        rows = [
            ("layers", str(c.num_hidden_layers)),
            ("hidden_size", f"{c.hidden_size:,}"),
            ("heads", str(c.num_attention_heads)),
            ("kv_heads", str(c.kv_heads)),
            ("head_size", str(c.head_size)),
            *self._feed_forward(),
            ("vocabulary", vocabulary),
            ("context", f"{c.max_position_embeddings:,}"),
            ("positions", c.position_embedding),
            ("memories" if c.has_memory else "windows", self._windows()),
            ("residual", residual),
            ("tied", word("yes" if c.tie_word_embeddings else "no")),
            ("compute_dtype", c.compute_dtype),
        ]
        table = Table((word("setting"), word("value")), tuple((word(key), value) for key, value in rows))
        return Section(word("structure"), (table,), charts=("structure",))

    def _feed_forward(self) -> list[tuple[str, str]]:
        """MLPs and experts, where layers have them."""
        c, m = self.config, self.config.moe
        rows = [("mlp_size", f"{c.mlp_size:,}")] if len(c.moe_layers) < c.num_hidden_layers else []
        if c.moe_layers:
            key = "experts_of_pool" if m.shared_pool else "experts_of"
            rows += [
                ("expert_layers", str(len(c.moe_layers))),
                ("experts_of_layer", self.word(key, m.num_experts, m.num_experts_per_tok)),
                ("expert_size", f"{c.expert_size:,}"),
            ]
        return [*rows, ("shared_count", str(m.n_shared_experts))] if m.n_shared_experts else rows

    def _windows(self) -> str:
        specs = self.config.layer_specs
        sizes = Counter(spec.memory_slots if self.config.has_memory else spec.window or 0 for spec in specs)
        told = [self.word("window_of", sizes[size], f"{size:,}") for size in sorted(sizes) if size]
        return ", ".join(told) or self.word("none")

    def parameters(self) -> Section:
        """Weights by part, in all and of a layer."""
        word, total = self.word, self.counts.total
        columns = (word("part"), word("each_layer"), word("in_all"), word("share"))
        rows = [
            (word(part), self._of_a_layer(part), f"{count:,}", percent(count / total))
            for part, count in self.counts.parts.items()
        ]
        rows.append((word("in_all"), self._of_a_layer(None), f"{total:,}", percent(1.0)))
        notes = [word("note_parameters")]
        told = {"trainable": self.counts.trainable}
        if self.config.moe_layers:
            told["active"] = self.counts.active
            notes.append(word("note_active"))
        rows += [(word(key), "", f"{count:,}", percent(count / total)) for key, count in told.items()]
        return Section(word("parameters"), (Table(columns, tuple(rows)),), tuple(notes), ("parameters",))

    def _of_a_layer(self, part: str | None) -> str:
        """The number, or the range where layers that have the part differ; nothing where none has."""
        numbers = {sum(layer.values()) if part is None else layer.get(part, 0) for layer in self.counts.layers} - {0}
        if not numbers:
            return ""
        return f"{min(numbers):,}" if len(numbers) == 1 else f"{min(numbers):,} - {max(numbers):,}"

    def memory(self) -> tuple[Section, ...]:
        """Bytes of training, of the weights by dtype, and of the cache by dtype."""
        return self._training_memory(), self._weight_memory(), self._cache_memory()

    def _training_memory(self) -> Section:
        word, s, c = self.word, self.setup, self.config
        found = training_bytes(
            self.model,
            optimizer=s.optimizer,
            rows=s.rows,
            length=s.length,
            average=s.average,
            is_trainable=self._is_trainable,
        )
        named = {
            word("weights"): found.weights,
            word("gradients"): found.gradients,
            word("optimizer_state", s.optimizer): found.optimizer,
            word("average"): found.average,
            word("activations"): found.activations,
            word("in_all"): found.total,
        }
        of_parts = Table(
            (word("part"), word("size")), tuple((name, of_bytes(size)) for name, size in named.items() if size)
        )
        optimizers = Table(
            (word("optimizers"), word("size")),
            tuple((n, of_bytes(optimizer_bytes(self.model, n, self._is_trainable))) for n in OPTIMIZERS),
        )
        note = word("note_training", s.rows, s.length, c.remat)
        return Section(word("training_memory"), (of_parts, optimizers), (note,))

    def _weight_memory(self) -> Section:
        word = self.word
        rows = tuple((dtype, of_bytes(weight_bytes(self.counts.total, dtype))) for dtype in WEIGHT_DTYPES)
        return Section(word("weight_memory"), (Table((word("dtype"), word("size")), rows),))

    def _cache_memory(self) -> Section:
        word, s = self.word, self.setup
        columns = (
            word("dtype"),
            word("per_token"),
            word("per_token_later"),
            word("cache_total", s.cache_batch, f"{s.cache_length:,}"),
        )
        rows = []
        for dtype in CACHE_DTYPES:
            growth = cache_growth(self.config, dtype)
            total = cache_bytes(self.config, s.cache_batch, s.cache_length, dtype)
            rows.append((dtype, of_bytes(growth.at_first), of_bytes(growth.later), of_bytes(total)))
        return Section(word("cache_memory"), (Table(columns, tuple(rows)),), (word("note_cache"),))

    def flops(self) -> Section:
        """Operations a token, of the forward pass and of a training step, by both ways to count attention."""
        word = self.word
        training = flops_per_token(self.config, self.counts.active, self.setup.length)
        table = Table(
            (word("quantity"), word("causal"), word("full")),
            tuple(
                (word(key), short(flops.causal), short(flops.full))
                for key, flops in (("forward", training.forward), ("training", training))
            ),
        )
        notes = [word("note_flops", f"{self.setup.length:,}")]
        if self.config.moe_layers:
            notes.append(word("note_flops_experts"))
        return Section(word("flops"), (table,), tuple(notes))

    def speed(self, measured: Measured) -> Section:
        """Tokens a second by batch size."""
        word, m = self.word, measured
        columns = (word("batch_size"), word("prefill"), word("decode"))
        rows = tuple((str(s.batch_size), f"{s.prefill:,.0f}", f"{s.decode:,.0f}") for s in m.speeds)
        notes = [word("note_speed", m.prompt_length, m.new_tokens, m.repeats, m.device)]
        if m.fresh_weights:
            notes.append(word("note_fresh"))
        return Section(word("speed"), (Table(columns, rows),), tuple(notes))

    def statistics(self, found: Statistics) -> tuple[Section, ...]:
        """Of the weights by part, with the shares of small ones; and the spread of each layer."""
        word = self.word
        columns = (
            *(word(key) for key in ("part", "mean", "std", "largest", "zeros")),
            *(word("below", f"{threshold:g}") for threshold in found.thresholds),
        )

        def row(name: str, s: WeightStatistics) -> tuple[str, ...]:
            shares = (percent(s.share(threshold)) for threshold in (0, *found.thresholds))
            return (name, f"{s.mean:.3g}", f"{s.std:.3g}", f"{s.largest:.3g}", *shares)

        rows = [*(row(word(part), s) for part, s in found.parts.items()), row(word("in_all"), found.whole)]
        by_part = Section(word("statistics"), (Table(columns, tuple(rows)),), (word("note_statistics"),))
        return by_part, Section(word("layer_statistics"), (self._by_layer(found),), charts=("deviations",))

    def _by_layer(self, found: Statistics) -> Table:
        parts = [part for part in found.parts if any(part in layer for layer in found.layers)]
        rows = [
            (str(number), *(f"{layer[part].std:.3g}" if part in layer else "" for part in parts))
            for number, layer in enumerate(found.layers)
        ]
        return Table((self.word("layer"), *map(self.word, parts)), tuple(rows))

    def comparison(self, reference: ByteConfig, name: str) -> tuple[Section, dict[str, float]]:
        """This model beside a reference, and the ratios for a chart, by label."""
        ours, theirs = self._quantities(self.config, self.counts), self._quantities(reference, None)
        if not (self.config.moe_layers or reference.moe_layers):
            del ours["active_short"]  # all of them
        ratios = {key: ours[key] / theirs[key] for key in ours}
        sized = {"cache_short": of_bytes, "training_short": of_bytes}
        rows = tuple(
            (self.word(key), *(sized.get(key, short)(value) for value in (ours[key], theirs[key])), factor(ratio))
            for key, ratio in ratios.items()
        )
        columns = (self.word("quantity"), self.word("this_model"), self.word("reference"), self.word("ratio"))
        note = self.word("note_reference", name)
        return Section(self.word("comparison"), (Table(columns, rows),), (note,), ("comparison",)), ratios

    def _quantities(self, config: ByteConfig, counts: ParameterCounts | None) -> dict[str, float]:
        model, s = ByteTransformer(config), self.setup
        counts = counts or parameter_counts(model)
        training = training_bytes(model, optimizer=s.optimizer, rows=s.rows, length=s.length, average=s.average)
        return {
            "parameters_short": counts.total,
            "active_short": counts.active,
            "flops_short": flops_per_token(config, counts.active, s.length).causal,
            "cache_short": cache_bytes(config, s.cache_batch, s.cache_length),
            "training_short": training.total,
            "depth": config.num_hidden_layers,
            "width": config.hidden_size,
        }
