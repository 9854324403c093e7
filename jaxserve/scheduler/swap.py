"""Whether a preempted sequence goes to host memory, or is computed again later."""

from jaxserve.cost.model import CostModel
from jaxserve.cost.work import prompt_work
from jaxserve.scheduler.replica import SwapRule


def swap_rule(mode: str, cost: CostModel) -> SwapRule:
    """The rule for `EngineConfig.preemption_mode`: "swap" always, "auto" where the way there and back is quicker.

    What a prompt costs is the device's time for it alone: its steps carry the decodes of others, too. A swap costs links,
    while the device does other work, so this rather favours computing.
    """
    if mode == "swap":
        return lambda num_blocks, num_tokens: True
    return lambda num_blocks, num_tokens: 2 * cost.swap_s(num_blocks) < cost.device_s(prompt_work(num_tokens))
