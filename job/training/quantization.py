"""`JOB_QUANTIZATION`: which matrices of a base are held in 4 bits. Imports no torch.

`nf4` all, `none` none, `mixed:v_proj,o_proj` all but those. A plain `mixed` keeps as many in 16
bits as memory allows, in the order of `MIXED_ORDER`; of a checkpoint that is in 4 bits already it
is what its maker chose.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from job.quantization import in_one_spelling


def names_in_16_bits(quantization: str) -> tuple[str, ...]:
    """The matrices that a `mixed:` names; none for the other modes."""
    _, _, names = in_one_spelling(quantization).partition(":")
    return tuple(names.split(",")) if names else ()


def mixed_of(names: Collection[str]) -> str:
    """The mode that keeps these matrices in 16 bits; `nf4` if there are none."""
    return f"mixed:{','.join(names)}" if names else "nf4"


def is_in_4_bits(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a checkpoint whose weights are in 4 bits already."""
    return bool(config.get("quantization_config"))


def is_kept(module: str, patterns: Collection[str]) -> bool:
    """Whether a checkpoint's `llm_int8_skip_modules` keep this module in 16 bits.

    The rule of transformers, quantizers/quantizers_utils.py, `should_convert_module`.
    """
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    return any(
        re.match(rf"(?:{pattern}){boundary}", module) or module.endswith(pattern)
        for pattern in patterns
    )


def price_of_4_bits(
    quantization: str, untuned: float, untuned_16bit: float, num_rows: int | None
) -> str:
    """What holding the untuned base so costs against 16 bits, by its eval/loss in both."""
    held = in_short(quantization) + ("," if "," in in_short(quantization) else "")
    rows = "the held-out rows" if num_rows is None else f"these {num_rows} rows"
    price = round(untuned - untuned_16bit, 3) + 0.0  # -0.0 + 0.0 is 0.0
    return (
        f"{held} cost the untuned base {price:.3f} nats on {rows}"
        f" ({untuned:.3f} against {untuned_16bit:.3f})"
    )


def words(quantization: str) -> str:
    """The mode in a person's words."""
    if quantization == "nf4":
        return "4 bits (NF4)"
    if quantization == "none":
        return "16 bits"
    names = ", ".join(names_in_16_bits(quantization))
    return f"4 bits (NF4), {names or 'parts'} in 16 bits"


def in_short(quantization: str) -> str:
    """The mode in a person's words, without the format of the 4 bits."""
    return words(quantization).replace(" (NF4)", "")
