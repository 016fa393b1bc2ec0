"""Sampling from a model."""

import sys
import types
from typing import Any


class _CallablePackage(types.ModuleType):
    """Lets ``stellarbyte_jax.generate`` be the function and this package: one name, whichever was imported first."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from stellarbyte_jax.generate.api import generate

        return generate(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
