"""A model as lm-eval takes it. Needs the extra ``eval``, which is imported by the calls alone."""

import functools
from collections.abc import Iterable
from typing import Any

from stellarbyte_jax.checkpoint.bundle import Bundle
from stellarbyte_jax.evaluation.backend import Backend, Progress, silent


def require_lm_eval() -> None:
    """Raises ImportError, with how to install it, where lm-eval is missing."""
    try:
        import lm_eval  # noqa: F401 # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            f"evaluation on tasks needs lm-eval ({error.name} is not installed): pip install 'stellarbyte_jax[eval]'"
        ) from error


def as_lm(bundle: Bundle, *, batch_size: int, progress: Progress = silent) -> Any:
    """The model as an ``lm_eval.api.model.LM``, for ``lm_eval.simple_evaluate(model=...)``.

    Args:
      bundle: the model, see :func:`checkpoint.bundle.load_bundle`.
      batch_size: requests that are computed at once.
      progress: see :class:`Backend`.

    Raises:
      ImportError: lm-eval is not installed.
      ValueError: the tokenizer has neither bos nor eos.
    """
    require_lm_eval()
    return _lm_class()(bundle, batch_size=batch_size, progress=progress)


@functools.cache
def _lm_class() -> Any:
    from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
    from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
        get_rolling_token_windows,
        make_disjoint_window,
    )

    base: Any = LM

    class StellarbyteLM(Backend, base):
        """The methods are those of :class:`Backend`."""

        def windows(self, tokens: list[int]) -> Iterable[tuple[list[int], list[int]]]:
            rolling = get_rolling_token_windows(tokens, self._encoder.prefix_id, self.max_length, 1)
            return map(make_disjoint_window, rolling)

    return StellarbyteLM
