"""Bytes as people read them."""

from __future__ import annotations


def size(num_bytes: float) -> str:
    """Three digits or more in powers of ten, as JOB_MAX_ADAPTER_MB counts: 34.1 kB, 336 MB."""
    for unit_bytes, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= 0.9995 * unit_bytes:  # 999.6 kB would be rounded to 1e+03
            amount = num_bytes / unit_bytes
            return f"{amount:.0f} {unit}" if amount >= 99.95 else f"{amount:.3g} {unit}"
    return f"{num_bytes:.0f} bytes"
