"""Numbers as a reader wants them: few digits and a unit."""

import math

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_SCALES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K"))


def of_bytes(count: float) -> str:
    """``1536`` as ``1.50 KiB``."""
    power = 0
    while abs(count) >= 1024 and power < len(_UNITS) - 1:
        count, power = count / 1024, power + 1
    return f"{count:.0f} B" if power == 0 else f"{count:,.2f} {_UNITS[power]}"


def short(count: float) -> str:
    """``162220800`` as ``162M``: three digits and a letter, ``G`` for 10^9."""
    if abs(count) < 1000:
        return f"{count:.3g}"
    for scale, letter in _SCALES:
        if abs(count) >= 0.9995 * scale:
            scaled = count / scale
            digits = max(0, 2 - math.floor(math.log10(abs(scaled) * 1.0005)))
            return f"{scaled:.{digits}f}{letter}"
    return f"{count:.0f}"


def percent(share: float) -> str:
    """``0.1234`` as ``12.34 %``."""
    return f"{100 * share:.2f} %"


def factor(ratio: float) -> str:
    """``0.3333`` as ``0.333×``, ``1900`` as ``1,900×``."""
    return f"{ratio:,.0f}×" if ratio >= 1000 else f"{ratio:.3g}×"
