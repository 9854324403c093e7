"""What to tell callers when a step fails on the device."""

import logging

from jaxserve.errors import DeviceError
from jaxserve.step import StepPlan

_log = logging.getLogger(__name__)


def explain(error: Exception, plan: StepPlan) -> DeviceError:
    """A failure of any kind as one sentence with its remedy. What is no lack of memory is logged with its trace."""
    size = f"a step of {plan.num_tokens} tokens in {len(plan.rows)} sequences"
    reason = next(iter(str(error).splitlines()), "")
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return DeviceError(
            f"{size} ran out of device memory ({reason:.200})",
            remedy="Lower memory_utilization (or num_kv_blocks), max_num_batched_tokens or max_num_seqs",
        )
    _log.error("%s failed", size, exc_info=error)
    return DeviceError(
        f"{size} failed ({type(error).__name__}: {reason:.200})",
        remedy="Ask again; if that fails too, load the model anew",
    )
