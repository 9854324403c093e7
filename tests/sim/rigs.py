"""Small replicas for tests of the simulator: round numbers, so that times can be reckoned by hand."""

import dataclasses
import zlib
from typing import Any

from jaxserve.cost.forms import Roofline
from jaxserve.cost.model import CostModel, Host
from jaxserve.sim.replica import ReplicaSpec
from jaxserve.workload.call import Call, Piece, Span, Workload, make_workload

# 1 ms of device time for a padded token, nothing for the rest.
SLOW = CostModel(
    name="a millisecond a token",
    device=Roofline(flop_per_s=1e3, bytes_per_s=1e3, token_flop=1, row_flop=0, pair_flop=0, weight_bytes=0, kv_bytes=0),
    block_bytes=1.0,
    swap_bytes_per_s=100.0,  # 10 ms a block
    copy_s=0.0,
    compile_s=5.0,
)


def cost(*, host_s: float = 0.0, hidden: float = 1.0, **changes: Any) -> CostModel:
    """SLOW, changed."""
    return dataclasses.replace(SLOW, host=Host(step_s=host_s), hidden=hidden, **changes)


def spec(**changes: Any) -> ReplicaSpec:
    """A small replica."""
    sizes: dict[str, Any] = {
        "cost": SLOW,
        "num_blocks": 64,
        "block_size": 8,
        "max_num_seqs": 8,
        "token_budget": 64,
        "max_model_len": 256,
    }
    return ReplicaSpec(**sizes | changes)


def call(call_id: str, prompt: int | tuple[Piece, ...] = 16, output_tokens: int = 4, **fields: Any) -> Call:
    """A call; a number of prompt tokens means that nobody shares them."""
    pieces = (Span(zlib.crc32(call_id.encode()) + 1, prompt),) if isinstance(prompt, int) else prompt
    return Call(call_id=call_id, prompt=pieces, output_tokens=output_tokens, **fields)


def work(*calls: Call) -> Workload:
    """A workload."""
    return make_workload("test", calls)
