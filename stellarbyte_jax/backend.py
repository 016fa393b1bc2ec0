"""What keeps JAX from being imported or from starting its devices, and what to do about it. Imports next to nothing."""

import os
import sys
import traceback

_CHOOSE = ("JAX_PLATFORMS", "JAX_PLATFORM_NAME", "JAX_NUM_CPU_DEVICES")  # devices


def import_problem(error: BaseException) -> tuple[str, str] | None:
    """What an error tells of a jax that cannot be imported, and what to do; None where it tells of something else."""
    modules = [
        frame.f_globals.get("__name__", "").partition(".")[0]
        for frame, _ in traceback.walk_tb(error.__traceback__)
        if frame.f_code.co_name == "<module>"
    ]
    if not {"jax", "jaxlib"} & set(modules):
        return None
    text = str(error) or type(error).__name__
    named = [name for name in sorted(os.environ) if name.startswith("JAX_") and name.lower() in text.lower()]
    mend = f"unset {named[0]}, or give it a value that jax knows" if named else "pip install -U jax jaxlib"
    return f"jax cannot be imported: {text}", mend


def start_problem(error: BaseException) -> tuple[str, str]:
    """What an error tells with which JAX started no device, and what to do."""
    given = [name for name in _CHOOSE if os.environ.get(name)]
    told = " ".join(f"{name}={os.environ[name]}" for name in given)
    text = str(error) or (f"no device for {told}" if given else type(error).__name__)
    mend = f"unset {' and '.join(given)}, or ask for devices that are here" if given else "see stellarbyte doctor"
    return f"JAX could not start: {text}", mend


def failed_start(error: BaseException) -> tuple[str, str] | None:
    """Likewise of an error that came out of jax; None where it has devices, or did not raise it."""
    jax, frames = sys.modules.get("jax"), list(traceback.walk_tb(error.__traceback__))
    if jax is None or not frames or not frames[-1][0].f_globals.get("__name__", "").startswith("jax."):
        return None
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as again:
        return start_problem(again)
    return None
