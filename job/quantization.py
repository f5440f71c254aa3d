"""How `JOB_QUANTIZATION` may be written, and the one spelling in which modes are compared.

`mixed:down_proj, v_proj` and `mixed:v_proj,down_proj` mean the same weights, so they are one mode:
blanks and repetitions go, and the matrices stand in the order in which a plain `mixed` names them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")

QUANTIZATION_PATTERN = r"nf4|none|mixed(:\s*\w+\s*(,\s*\w+\s*)*)?"
QUANTIZATION_WORDS = "nf4, none, mixed, or mixed: and matrices, as mixed:down_proj,v_proj"
# What a plain `mixed` keeps in 16 bits, the first first: attention, its small matrices before its
# large ones, then the feed-forward's way out. With gate and up as well it would be `none`.
MIXED_ORDER = ("v_proj", "k_proj", "qkv_proj", "o_proj", "q_proj", "down_proj")


def in_one_spelling(quantization: T) -> T | str:
    """The mode as it is compared: matrices in `MIXED_ORDER`, the others after them by name.

    Anything that is no mode is given back as it is.
    """
    if not isinstance(quantization, str) or not re.fullmatch(QUANTIZATION_PATTERN, quantization):
        return quantization
    mode, _, names = quantization.partition(":")
    matrices = {name.strip() for name in names.split(",")} if names else set()
    return f"{mode}:{','.join(sorted(matrices, key=_place))}" if matrices else mode


def params_in_one_spelling(params: Mapping[str, T]) -> dict[str, T | str]:
    """Hyper-parameters by name, the base's mode among them as it is compared."""
    return {
        name: in_one_spelling(value) if name == "quantization" else value
        for name, value in params.items()
    }


def _place(matrix: str) -> tuple[int, str]:
    return MIXED_ORDER.index(matrix) if matrix in MIXED_ORDER else len(MIXED_ORDER), matrix
