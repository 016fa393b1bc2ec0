"""From the metrics of finished steps to lines and trackers, with the speed since the last line."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np

from stellarbyte_jax.command import MendableError
from stellarbyte_jax.config import TrainConfig
from stellarbyte_jax.inspect.costs import flops_per_token
from stellarbyte_jax.training.metrics import memory_metrics, speed_metrics
from stellarbyte_jax.training.telemetry import BY_LAYER, LOADS, layer_numbers

Metrics = dict[str, jax.Array]


class DivergedError(MendableError):
    """The loss, the gradient or the weights are no longer numbers."""


def diverged(found: str, step: int) -> DivergedError:
    """The error for what was found at a step."""
    return DivergedError(
        f"{found} at step {step}. The checkpoints before it are kept: lower optimizer.learning_rate or lengthen "
        "schedule.warmup_steps, then start the run again"
    )


class Meter:
    """Owns the step that the device is still computing: its numbers are read after the next one was dispatched.

    Attributes:
      rates: tokens a second, of each line.
      last: numbers of the last step that was read.
      loads: of that step, shares [L, E] of each layer with experts; None where there are none.
      tokens: of the steps that were read and of earlier starts, without padding; None where those did not count.
    """

    def __init__(
        self,
        config: TrainConfig,
        active_parameters: int,
        show: Callable[[int, dict[str, float], bool], None],
        counts: Callable[[], Mapping[str, int]],
        seconds: float | None = 0.0,
        tokens: int | None = 0,
        devices: int = 1,
    ) -> None:
        """Begins to count.

        Args:
          config: of the run.
          active_parameters: number of weights that one token uses.
          show: takes each step's number, its metrics, and whether they are due for lines and trackers.
          counts: what the data left out so far, by the name of its metric.
          seconds: of training, of earlier starts; None where they did not count.
          tokens: that earlier starts trained on; None likewise.
          devices: that the run uses.
        """
        self._steps_in_all, self._interval = config.steps, config.logging.interval
        self._flops = flops_per_token(config.model, active_parameters, config.data.sequence_length)
        self._step_tokens = config.global_batch_size * config.data.sequence_length
        self._show, self._counts, self._devices = show, counts, devices
        self._pending: tuple[int, Metrics] | None = None
        self.rates: list[float] = []
        self.last: dict[str, float] = {}
        self.loads: np.ndarray | None = None
        self._layers = config.model.moe_layers
        self._earlier, self._began, self.tokens = seconds, time.perf_counter(), tokens
        self.reset()

    @property
    def seconds(self) -> float | None:
        """Of training so far, everything in it (compilation, validation, checkpoints) and earlier starts included."""
        return None if self._earlier is None else self._earlier + time.perf_counter() - self._began

    def totals(self) -> dict[str, float]:
        """``wall_seconds`` and ``tokens`` of the whole run so far, where all its starts counted them."""
        totals = {"wall_seconds": self.seconds, "tokens": self.tokens}
        return {name: total for name, total in totals.items() if total is not None}

    def reset(self) -> None:
        """Begins a new interval of speed."""
        self._since, self._steps, self._read_tokens = time.perf_counter(), 0, 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves what happens inside out of the speed."""
        before = time.perf_counter()
        yield
        self._since += time.perf_counter() - before

    def push(self, step: int, metrics: Metrics) -> None:
        """Takes a step that was dispatched, and reads the one before it.

        Raises:
          DivergedError: the loss, gradient or update of that one is not finite.
        """
        self.flush()
        self._pending = (step, metrics)

    def flush(self) -> None:
        """Waits for the step that is not read yet, if there is any.

        Raises:
          DivergedError: its loss, gradient or update is not finite.
        """
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        arrays = jax.device_get(metrics)
        self.loads = arrays.pop(LOADS, None)
        values = {**_numbers(arrays), **layer_numbers(arrays, self._layers)}
        finite = values.pop("finite", True)
        self._steps += 1
        tokens = self._step_tokens * (1 - values.get("padding", 0.0))
        self._read_tokens += tokens
        if self.tokens is not None:
            self.tokens += round(tokens)
        what = [name for name in ("loss", "gradient_norm") if not np.isfinite(values.get(name, 0.0))]
        if what or not finite:
            found = f"the {what[0].replace('_', ' ')} is {values[what[0]]}" if what else "the update is not finite"
            raise diverged(found, step)
        speed = {}
        if self._steps > 1 or self.rates:
            seconds = time.perf_counter() - self._since
            speed = speed_metrics(self._read_tokens, seconds, self._flops, self._devices)
        self.last = {**values, **speed, **memory_metrics(), **self.totals()}
        self.last |= {name: float(count) for name, count in self._counts().items()}
        due = step % self._interval == 0 or step == self._steps_in_all
        self._show(step, self.last, due)
        if due and speed:
            self.rates.append(speed["tokens_per_second"])
            self.reset()


def _numbers(metrics: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Scalars under their names, entries of vectors, but for those that are of layers, under ``name/index``."""
    found = {}
    for name, value in metrics.items():
        if np.ndim(value) == 0:
            found[name] = float(value)
        elif name not in BY_LAYER:
            found |= {f"{name}/{i}": float(x) for i, x in enumerate(np.ravel(value))}
    return found
