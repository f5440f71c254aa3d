"""Advice before GPUs are paid for: what others found, and what to try. Nothing here is a rule.

The public table is thinking-machines-lab/tinker-cookbook's
tinker_cookbook/recipes/chat_sl/results/sft_sweep.md: LoRA runs at batch 128 and alpha 32 with rates
of 4e-5, 1e-4, 3e-4 and 1e-3 and ranks of 4, 16, 64 and 128. Of its ten models below 10 B, five were
best at 3e-4 and five at 1e-3, all at rank 64 or 128.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from job.report.findings import BAYES_FROM_TRIALS
from job.report.importance import searched
from job.settings import Settings
from job.sweep.definition import SweepDefinition
from job.sweep.distributions import Choice, Constant, Distribution

TABLES_BEST_RATE = 3e-4  # the lowest of the table's best rates
WIDE = "job/sweep/sweep-wide.yaml"
WIDE_RANKS = (32, 16)
MANY_TRIALS = 12
MANY_PARAMETERS = 5


def of_range(settings: Settings, definition: SweepDefinition) -> Iterator[str]:
    """Say that the best learning rate may lie above the sweep's."""
    highest = _highest(definition.parameters.get("learning_rate"), settings.learning_rate)
    if highest < TABLES_BEST_RATE:
        yield (
            f"learning rates end at {highest:g}: in a public table of LoRA runs (tinker-cookbook,"
            " batch 128) all ten models below 10 B were best at 3e-4 or 1e-3; smaller batches want"
            f" lower rates, but the best may lie above this range: {WIDE} searches 3e-5 to 1e-3"
        )


def of_rank(
    settings: Settings, definition: SweepDefinition, fits: Callable[[int], bool]
) -> Iterator[str]:
    """Say which higher rank `fits` the card's memory and the adapter's limit."""
    highest = int(_highest(definition.parameters.get("lora_r"), settings.lora_r))
    rank = next((rank for rank in WIDE_RANKS if rank > highest and fits(rank)), None)
    if rank is not None:
        yield (
            f"lora_r ends at {highest}, and {rank} fits as well: in a public table of LoRA runs"
            " (tinker-cookbook) all ten models below 10 B were best at rank 64 or 128 of 4, 16, 64"
            f" and 128; {WIDE} searches 8, 16 and 32"
        )


def of_trials(settings: Settings, definition: SweepDefinition) -> Iterator[str]:
    """Say how many trials so many parameters want."""
    count = len(searched(definition.parameters))
    is_many = count >= MANY_PARAMETERS and settings.num_trials > MANY_TRIALS
    if definition.method == "bayes" and settings.wandb_sweep_id is None and is_many:
        yield (
            f"{count} parameters want about {BAYES_FROM_TRIALS} trials, not {settings.num_trials}:"
            " the first ones are at the largest adapters, where the learning rate decides"
        )


def _highest(domain: Distribution | None, setting: float) -> float:
    """The highest value that a trial may have."""
    if domain is None:
        return setting
    if isinstance(domain, Constant):
        return float(domain.value)
    if isinstance(domain, Choice):
        return max(float(value) for value in domain.values)
    return float(domain.max)
