"""Versions of Python, of jax and of its CUDA, as installed and as loaded."""

import ctypes
import importlib.metadata
import platform
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from stellarbyte_jax.launch.doctor.finding import Finding

PACKAGE = "stellarbyte_jax"
_ROOT = Path(__file__).parents[3]
DRIVERS = {13: 580, 12: 525}  # CUDA of jax's wheels -> the oldest driver's branch; docs.jax.dev, "Installation"


def bounds(root: Path = _ROOT) -> tuple[str, list[Requirement]]:
    """Versions of Python and packages that the project asks for, without those of extras.

    Args:
      root: of a clone, whose ``pyproject.toml`` is read; elsewhere it is what was installed that counts.
    """
    file = root / "pyproject.toml"
    if file.is_file():
        project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
        return project["requires-python"], [Requirement(text) for text in project["dependencies"]]
    metadata = importlib.metadata.metadata(PACKAGE)
    required = [Requirement(text) for text in importlib.metadata.requires(PACKAGE) or []]
    kept = [each for each in required if each.marker is None or each.marker.evaluate({"extra": ""})]
    return metadata["Requires-Python"] or "", kept


def installed(name: str) -> str | None:
    """The version of a package, None where it is absent."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_python(specifier: str) -> Iterator[Finding]:
    """Whether this Python is one of those that the project supports."""
    version = platform.python_version()
    fits = SpecifierSet(specifier).contains(version, prereleases=True)
    mend = "" if fits else f"make an environment of a Python {specifier}"
    yield Finding("ok" if fits else "fault", "python", f"Python {version}, {specifier} wanted", mend)


def check_packages(required: Sequence[Requirement]) -> Iterator[Finding]:
    """Whether the packages fit: jax, jaxlib and flax a line each, the others where they do not fit."""
    shown, fit = {"jax", "flax"}, 0
    for each in required:
        version = installed(each.name)
        wanted = str(each.specifier)
        mend = f"pip install -U '{each.name}{wanted}'"
        if version is None:
            yield Finding("fault", each.name, f"{each.name} is not installed, {wanted} wanted", mend)
        elif not each.specifier.contains(version, prereleases=True):
            yield Finding("fault", each.name, f"{each.name} {version}, {wanted} wanted", mend)
        elif each.name in shown:
            yield Finding("ok", each.name, f"{each.name} {version}, {wanted} wanted")
        else:
            fit += 1
    yield from check_companions(importlib.metadata.requires("jax") or [])
    yield Finding("ok", "packages", f"{fit} other packages fit")


def check_companions(required: Sequence[str]) -> Iterator[Finding]:
    """Whether jaxlib and the CUDA plugin are those of this jax: with another plugin jax computes on the CPU.

    Args:
      required: the requirements of jax, extras included.
    """
    wanted: dict[str, SpecifierSet] = {}
    for text in required:
        each = Requirement(text)
        if each.name == "jaxlib" or re.fullmatch(r"jax-cuda\d+-plugin", each.name):
            wanted.setdefault(each.name, each.specifier)
    for name, specifier in wanted.items():
        version = installed(name)
        if version is None:
            continue
        fits = specifier.contains(version, prereleases=True)
        mend = "" if fits else f"pip install -U '{name}{specifier}'"
        yield Finding("ok" if fits else "fault", name, f"{name} {version}, {specifier} wanted by jax", mend)


def cuda_of_wheels() -> int | None:
    """The CUDA that jax's plugin is built for, such as 13; None without a plugin."""
    return next((major for major in DRIVERS if installed(f"jax-cuda{major}-plugin")), None)


def pip_command(driver: str | None) -> str:
    """The command that installs jax with the newest CUDA that a driver can run.

    Args:
      driver: its version, such as ``580.82.07``; None where it is not known.
    """
    branch = int((driver or "0").split(".")[0])
    major = next((major for major, oldest in DRIVERS.items() if branch >= oldest), min(DRIVERS))
    wanted = next((str(each.specifier) for each in bounds()[1] if each.name == "jax"), "")
    return f"pip install -U 'jax[cuda{major}]{wanted}'"


def check_driver(driver: str | None, cuda: int | None) -> Iterator[Finding]:
    """Whether the driver can run the CUDA of jax's wheels.

    Args:
      driver: its version, None where there is none.
      cuda: major version of the wheels' CUDA, None without a plugin.
    """
    if driver is None:
        if cuda is not None:
            mend = f"install an NVIDIA driver of {DRIVERS[cuda]} or later, or start the container with its GPUs"
            yield Finding("fault", "driver", f"jax has CUDA {cuda}, and no NVIDIA driver was found", mend)
        return
    if cuda is None:
        yield Finding("ok", "driver", f"NVIDIA driver {driver}; jax has no CUDA plugin that needs one")
        return
    oldest = DRIVERS[cuda]
    fits = int(driver.split(".")[0]) >= oldest
    mend = "" if fits else f"update the driver, or {pip_command(driver)}"
    what = f"NVIDIA driver {driver}, CUDA {cuda} of jax needs {oldest} or later"
    yield Finding("ok" if fits else "fault", "driver", what, mend)


def _dotted(number: int, base: int = 1000) -> str:
    """A version that a library tells as one number: 12090 -> 12.9, 91002 (base 10000) -> 9.10.2."""
    if base == 1000:
        return f"{number // 1000}.{number % 1000 // 10}"
    return f"{number // 10000}.{number % 10000 // 100}.{number % 100}"


def loaded_nccl() -> str | None:
    """The version of the NCCL that this process has loaded, None where it has none."""
    maps = Path("/proc/self/maps")
    found = re.search(r"/\S*libnccl\.so\S*", maps.read_text()) if maps.exists() else None
    if found is None:
        return None
    number = ctypes.c_int()
    ctypes.CDLL(found[0]).ncclGetVersion(ctypes.byref(number))
    return _dotted(number.value, 10000)


def check_cuda() -> Iterator[Finding]:
    """CUDA, cuDNN and NCCL: as this process has loaded them, and their wheels."""
    wheels = {
        each.metadata["Name"]: each.version
        for each in importlib.metadata.distributions()
        if re.match(r"nvidia-(cuda-runtime|cudnn|nccl|cublas|nvshmem)", each.metadata["Name"] or "")
    }
    from jax._src.lib import cuda_versions  # None without a plugin; jax has no public name for it

    parts: list[str] = []
    facts: dict[str, Any] = {"wheels": wheels}
    for name, function, base in (
        ("CUDA", "cuda_runtime_get_version", 1000),
        ("cuDNN", "cudnn_get_version", 10000),
    ):
        get = getattr(cuda_versions, function, None)
        if get is not None:
            facts[name] = _dotted(get(), base)
            parts.append(f"{name} {facts[name]}")
    nccl = loaded_nccl()
    if nccl is not None:
        facts["NCCL"] = nccl
        parts.append(f"NCCL {nccl}")
    listed = ", ".join(f"{name} {version}" for name, version in sorted(wheels.items()))
    what = f"loaded: {', '.join(parts) or 'none'}; wheels: {listed or 'none'}"
    yield Finding("ok", "cuda", what, facts=facts)
