"""Bytes and seconds for people to read."""

import math


def format_bytes(nbytes: int) -> str:
    """Bytes in binary units with three significant digits or more: ``"48.9 MiB"``."""
    if abs(nbytes) < 1024:
        return f"{nbytes} B"
    value = float(nbytes)
    for unit in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        value /= 1024
        if abs(value) < 1023.95 or unit == "PiB":
            break
    return f"{value:.2f} {unit}" if abs(value) < 9.995 else f"{value:.1f} {unit}"


def format_seconds(seconds: float) -> str:
    """A duration with three significant digits: ``"3.20 ms"``; a dash where it is unbounded."""
    if not math.isfinite(seconds):
        return "—"
    if seconds == 0:
        return "0 s"
    for factor, unit in ((1e6, "µs"), (1e3, "ms"), (1, "s")):
        value = seconds * factor
        if abs(value) < 999.5 or unit == "s":
            break
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f} {unit}"
