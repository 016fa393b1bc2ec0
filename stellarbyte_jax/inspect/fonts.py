"""A font for the labels of charts: one that has every character, so that no label is a row of boxes."""

import functools
import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path

from stellarbyte_jax.inspect.labels import Language, all_characters

_log = logging.getLogger(__name__)

_PACKAGE, _FILE = "pylopdf_fonts_zh_cn", "NotoSansSC-Regular.otf"  # of the extra "report"
# Families that systems have, the sans-serif ones of the most frequent systems first.
_FAMILIES = (
    "Noto Sans CJK SC",
    "Noto Sans SC",
    "Source Han Sans SC",
    "Source Han Sans CN",
    "PingFang SC",
    "Hiragino Sans GB",
    "Microsoft YaHei",
    "SimHei",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "Noto Sans CJK JP",
    "Droid Sans Fallback",
    "Arial Unicode MS",
)


@functools.cache
def usable_language(language: Language) -> Language:
    """The language whose labels charts can show: English, with one line in the log, where no font has the others."""
    if find_font(language) is not None:
        return language
    _log.warning(
        "no font here has Chinese characters, so the charts are labelled in English: pip install "
        "'stellarbyte_jax[report]' brings one, as does a package of the system such as fonts-noto-cjk"
    )
    return "en"


@functools.cache
def find_font(language: Language) -> Path | None:
    """A font file that has every character of a language's labels: matplotlib's own, the extra's, or a system's."""
    wanted = {ord(character) for character in all_characters(language)}
    return next((path for path in _candidates() if wanted <= _characters(path)), None)


def _candidates() -> Iterator[Path]:
    from matplotlib import font_manager  # pyright: ignore[reportMissingImports]

    yield Path(font_manager.findfont("DejaVu Sans"))
    package = importlib.util.find_spec(_PACKAGE)
    if package is not None and package.origin is not None:
        yield Path(package.origin).with_name(_FILE)
    found = {entry.name: Path(entry.fname) for entry in reversed(font_manager.fontManager.ttflist)}
    yield from (found[family] for family in _FAMILIES if family in found)


def _characters(path: Path) -> set[int]:
    """Code points that a font file has; none where it cannot be read."""
    from matplotlib.ft2font import FT2Font  # pyright: ignore[reportMissingImports]

    try:
        return set(FT2Font(str(path)).get_charmap())
    except (OSError, RuntimeError):
        return set()
