"""Parameters that are left to the slow tier: `@pytest.mark.parametrize("x", [1, *slow(2, 3)])`."""

from __future__ import annotations

from typing import Any

import pytest


def slow(*values: object) -> list[Any]:
    """Each value as a parameter whose test is marked slow; its id is what it would be without."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]
