"""How long things take: steps, swaps, hand-overs, compilations. Pure functions of their arguments; no clock, no jax.

The interface, used by policies, routers and the simulator:

    model.step_s(work)        the time from one step to the next, as the engine runs them; `work_of(rows, rung, rung_rows)`
    model.device_s(work)      of that, what the device works ...
    model.host_s(work)        ... and the host: planning, dispatch, results, text
    model.parts(work)         step_s by part: matmul, attention, collectives, launch, host; they add up to it
    model.swap_s(num_blocks)  KV blocks to the host's memory, or back
    model.transfer_s(bytes)   from one replica to another
    model.service_s(prompt, output, batch)   one request in a batch of such requests, from its first step to its last
    model.compile_s           a size of a step that is not compiled yet

Made by `cost.roofline.of_chip`, `cost.fit`, or `cost.files.load`; kept as JSON by `cost.files`. All seconds are those of one
replica, whose devices work together.
"""

import dataclasses

from jaxserve.cost.forms import Fitted, Roofline
from jaxserve.cost.work import Work, decode_work, prompt_work

_CHUNK = 512  # tokens of a step that `service_s` takes a prompt to be cut into


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """Seconds that the host spends on a step."""

    step_s: float = 0.0
    row_s: float = 0.0
    token_s: float = 0.0  # of each token, padding apart


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CostModel:
    """See the top of this file."""

    name: str
    device: Roofline | Fitted
    host: Host = Host()
    hidden: float = 1.0  # how much of the shorter of device and host time passes while the other works; 0: none
    block_bytes: float = 0.0  # of a KV block, on each device
    swap_bytes_per_s: float = 15e9  # one way, between a device and its host
    transfer_bytes_per_s: float = 25e9  # one way, between replicas
    copy_s: float = 1e-4  # of a swap or a transfer, however small
    compile_s: float = 10.0

    def step_s(self, work: Work) -> float:
        """Seconds from one step to the next, in a stream of steps."""
        device_s = self.device.step_s(work)
        host_s = self.host_s(work)
        if device_s < host_s:
            device_s, host_s = host_s, device_s
        return device_s + (1.0 - self.hidden) * host_s

    def device_s(self, work: Work) -> float:
        """Seconds that the device works on a step."""
        return self.device.step_s(work)

    def host_s(self, work: Work) -> float:
        """Seconds that the host works on a step, before and after it."""
        host = self.host
        return host.step_s + work.rows * host.row_s + work.tokens * host.token_s

    def parts(self, work: Work) -> dict[str, float]:
        """`step_s` by part; "host" is what the device waits for."""
        parts = self.device.parts(work)
        return parts | {"host": self.step_s(work) - self.device.step_s(work)}

    def swap_s(self, num_blocks: int) -> float:
        """Seconds to copy KV blocks to the host's memory, or back; all devices copy their parts at once."""
        return self.copy_s + num_blocks * self.block_bytes / self.swap_bytes_per_s if num_blocks else 0.0

    def transfer_s(self, num_bytes: float) -> float:
        """Seconds to hand bytes from one replica to another."""
        return self.copy_s + num_bytes / self.transfer_bytes_per_s if num_bytes else 0.0

    def service_s(self, prompt: int, output: int, batch: int = 1) -> float:
        """Seconds from a request's first step to its last: its prompt, cut into steps, then one step for each token, in a
        batch of requests that are like it and half done."""
        prefill_s, start = 0.0, 0
        while start < prompt:
            count = min(_CHUNK, prompt - start)
            prefill_s += self.step_s(prompt_work(count, start))
            start += count
        steps = max(output - 1, 0)
        decode_s = self.step_s(decode_work(batch, batch * (prompt + output // 2)))
        return prefill_s + steps * decode_s
