"""Time of device work: many calls in one compiled loop, each of which needs a number of the call before.

To start a call from Python takes longer than a short decode does, so single calls cannot be timed. In a loop of calls that
need nothing of each other, the compiler may move the call out of the loop. So each writes one number of its result into the
queries of the next, which costs a launch (2 us), and the loop returns the last result, so that all of it is computed.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

_RUN_S = 0.02  # one run of a loop is to take so long, or a few calls
_FEWEST, _MOST = 2, 500

Call = Callable[[jax.Array, Any, Any], tuple[jax.Array, Any]]


def num_calls(bound_s: float) -> int:
    """Calls in a loop, when one takes at least `bound_s`."""
    return int(min(max(_RUN_S / max(bound_s, 1e-9), _FEWEST), _MOST))


class Loop:
    """A compiled loop of `call(q, state, fixed) -> (out, state)`; `out` has q's shape and dtype.

    The state may be large and shared with other loops: it is donated to a run, and what comes back is the new one.
    """

    def __init__(self, call: Call, q: jax.Array, state: Any, fixed: Any, number: int):
        def run(q, state, fixed):
            def turn(_, carry):
                q, state, _ = carry
                out, state = call(q, state, fixed)
                first = out[(slice(0, 1),) * out.ndim]
                return lax.dynamic_update_slice(q, first, (0,) * q.ndim), state, out

            return lax.fori_loop(0, number, turn, (q, state, q))

        begin_s = time.perf_counter()
        self._run = jax.jit(run, donate_argnums=1).lower(q, state, fixed).compile()
        self.compile_s = time.perf_counter() - begin_s
        self.temp_bytes: int = self._run.memory_analysis().temp_size_in_bytes
        self._q, self._fixed, self._number = q, fixed, number
        self.out: jax.Array | None = None  # of the last call

    def seconds(self, state: Any) -> tuple[float, Any]:
        """Run once: seconds per call, and the new state."""
        jax.block_until_ready((self._q, state, self._fixed))
        begin_s = time.perf_counter()
        _, state, self.out = jax.block_until_ready(self._run(self._q, state, self._fixed))
        return (time.perf_counter() - begin_s) / self._number, state
