"""The untuned base measured in 16 bits, once in a sweep: what 4 bits cost it.

Nobody's trial may end by it: what goes wrong is a warning, and what takes long is left out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from job.data.samples import SampleTable
from job.errors import PreemptedError
from job.log import log
from job.training.quantization import is_in_4_bits

if TYPE_CHECKING:
    from job.trial.attempt import Attempt

MAX_SHARE = 0.05  # of JOB_TRIAL_BUDGET_HOURS
# A process that the kernel killed for its memory leaves no word: after so many attempts that did
# not come to a step, the next one leaves this out.
MAX_STARTLESS = 2
TITLE = "untuned in 16 bits"


class _TooLongError(Exception):
    """Measuring would take more than its share of the trial."""


def untuned_in_16_bits(attempt: Attempt, rows: SampleTable) -> float | None:
    """The base's eval/loss with its weights in 16 bits; None where it is not measured.

    The base as it is trained on stays in memory beside it. Counts as the trial's GPU time, not as
    its training clock. Raises `PreemptedError`, and `GpuError` where even tidying up fails.
    """
    if is_in_4_bits(attempt.loaded.base.config):
        return None  # it has no others
    if attempt.lease.record.startless >= MAX_STARTLESS:
        log.warning("%s: left out, earlier attempts did not come to a step", TITLE)
        return None
    begun, loss = time.monotonic(), None
    limit = MAX_SHARE * 3600 * attempt.settings.trial_budget_hours
    try:
        with attempt.watchdog.phase("measuring the base in 16 bits"):
            loss = _measure(attempt, rows, _pace(attempt.should_stop, limit))
    except PreemptedError:
        raise
    except _TooLongError as error:
        log.info("%s: left out, %s", TITLE, error)
    except Exception as error:  # out of memory, a damaged file, whatever a family's own code raises
        first_line = str(error).strip().partition("\n")[0]
        log.warning("%s: not measured: %s: %s", TITLE, type(error).__name__, first_line)
    _clean_up(attempt)  # here, as inside a handler the model is alive
    attempt.clock.untuned_seconds = time.monotonic() - begun
    if loss is not None:
        log.info("%s: eval/loss %.4f, %.1f s", TITLE, loss, attempt.clock.untuned_seconds)
    return loss


def _measure(attempt: Attempt, rows: SampleTable, pace: Callable[[float], None]) -> float | None:
    import torch

    from job.training.device import weight_memory_bytes
    from job.training.measuring import loss_in_16_bits
    from job.training.weights import local_folder

    base, device = attempt.loaded.base, attempt.loaded.device
    memory_bytes = weight_memory_bytes(device, gpu_memory_gb=attempt.settings.gpu_memory_gb)
    if device.type == "cuda":  # which counts what this process holds as free
        memory_bytes -= torch.cuda.memory_allocated(device)
    folder = local_folder(base.location, base.hub_revision, fetched=True)
    loss = loss_in_16_bits(
        str(folder), None, rows, device, title=TITLE, memory_bytes=memory_bytes, pace=pace
    )
    if loss is None or not math.isfinite(loss):  # JSON has no NaN
        return None
    return loss


def _pace(should_stop: Callable[[], None], limit_seconds: float) -> Callable[[float], None]:
    """Stop measuring when the process is to end, and once it is seen to take too long."""
    begun = time.monotonic()

    def pace(done: float) -> None:
        should_stop()
        seconds = time.monotonic() - begun
        # What comes first takes long for reasons of its own: not judged before a part of the limit.
        if seconds > limit_seconds / 20 and seconds > done * limit_seconds:
            raise _TooLongError(
                f"it would take {seconds / done:.0f} s, more than {MAX_SHARE:.0%} of"
                " JOB_TRIAL_BUDGET_HOURS"
            )

    return pace


def _clean_up(attempt: Attempt) -> None:
    """Give back the memory; a trial's peak is that of its training."""
    import torch

    from job.training.gpu_faults import gpu_faults_told
    from job.training.measuring import free_memory

    device = attempt.loaded.device
    with gpu_faults_told():
        free_memory(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
