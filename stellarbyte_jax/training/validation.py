"""Validation in a run: a pass over its data, and which losses may be compared."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stellarbyte_jax.config import TrainConfig
from stellarbyte_jax.data.files import DataError
from stellarbyte_jax.data.loader import Loader
from stellarbyte_jax.model.decoder import ByteTransformer
from stellarbyte_jax.model.io import State
from stellarbyte_jax.tokenizer.byte_lengths import token_byte_lengths
from stellarbyte_jax.training.console import Reporter
from stellarbyte_jax.training.metrics import validation_metrics
from stellarbyte_jax.training.placement import replicated, shardings
from stellarbyte_jax.training.state import TrainState
from stellarbyte_jax.training.step import make_eval_step


def compiled_eval_step(
    config: TrainConfig, model: ByteTransformer, shapes: TrainState
) -> Callable[..., tuple[dict[str, jax.Array], State]]:
    """The compiled ``step.make_eval_step`` of a run; what it carries stays where ``shapes`` have it."""
    byte_lengths = token_byte_lengths(config.data.tokenizer)
    step = make_eval_step(config, model, None if byte_lengths is None else jnp.asarray(byte_lengths))
    return jax.jit(step, out_shardings=(replicated(), shardings(shapes.carried)))


def evaluate(
    run_eval: Callable[..., tuple[dict[str, jax.Array], State]],
    params: dict[str, Any],
    batches: Iterable[Any],
    limit: int | None,
    report: Reporter,
    state: State,
    stopped: Callable[[], bool],
) -> dict[str, float] | None:
    """Token-weighted validation metrics over at most ``limit`` batches, from ``state`` on.

    None where ``stopped``, which is asked before each batch, came true.
    """
    totals: list[dict[str, jax.Array]] = []
    for index, batch in enumerate(batches):
        if index == limit:
            break
        if stopped():
            return None
        sums, state = run_eval(params, batch, state)
        totals.append(sums)
        report.validation(index + 1, limit)
    sums = jax.device_get(totals)
    return validation_metrics({name: np.sum([np.float64(s[name]) for s in sums], axis=0) for name in sums[0]})


def measured_on(loader: Loader, limit: int | None) -> dict[str, Any]:
    """What a loss was measured on: the content of the files, and how many batches of them; JSON values."""
    whole = loader.pass_batches is not None
    return {"files": loader.contents, "batches": loader.pass_batches if whole else limit, "whole": whole}


def check_comparable(before: Mapping[str, Any] | None, loader: Loader, limit: int | None) -> None:
    """Checks that losses of now may be compared with those measured on ``before``; None: there are none.

    Raises:
      DataError: files or the number of rows changed.
    """
    if before is None:
        return
    other = loader.changed(before["files"])
    advice = "put them back as they were"
    if other is None:
        count, whole = before["batches"], before["whole"]
        if count == limit or (whole and (limit is None or limit >= count)):
            return
        other = f"evaluation.batches was {count} and is {limit}"
        if whole:
            other = f"evaluation.batches is {limit}, and all {count} were read before"
        advice = f"set evaluation.batches={'none' if count is None else count}"
    raise DataError(
        f"data.validation: {other}. Losses could not be compared with those before, by which the best checkpoint and "
        f"evaluation.patience go: {advice}, or start a new run"
    )
