"""The role of an executor: runs plans, in order, and returns what came of them."""

from typing import Any, Protocol

from jaxserve.step import Capacity, StepPlan, StepResult


class Executor(Protocol):
    """Implementations: `local.LocalExecutor` (devices of this process), fakes in tests.

    `dispatch` and `collect` raise DeviceError when a step fails. Then everything that steps have written is lost: steps
    still under way must not be collected, and the next one dispatched finds an empty pool.
    """

    def capacity(self) -> Capacity:
        """What fits."""
        ...

    def dispatch(self, plan: StepPlan) -> Any:
        """Start a step and return at once. Steps take effect in the order they are dispatched."""
        ...

    def collect(self, pending: Any) -> StepResult:
        """Wait for a dispatched step."""
        ...
