"""Blocks on their way between the pool and host memory.

Nothing waits for a copy that it does not need. A block that leaves is gathered by a program in the queue of steps, before
whoever has its place now writes there, and travels while later steps run. A block that comes can set out one step ahead
(FastSwitch, arXiv 2411.18424, section 3: asynchronous swaps; the gather makes one piece of scattered blocks, so what is
dear is the number of calls, and blocks go many at a time).
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxserve.executor.program import DeviceState, jit_put, jit_take
from jaxserve.executor.program_store import Program
from jaxserve.models.kv import BLOCKS_AXES, KVPages
from jaxserve.sharding.rules import partition
from jaxserve.step import BlockSwap

SIZES = (1, 4, 16)  # blocks (of each replica) in one call; fewer are padded


class _Load(NamedTuple):
    """Blocks that go together: as many places for each replica, of which the first are used."""

    size: int
    parts: tuple[tuple[BlockSwap, ...], ...]

    def places(self, kind: str, default: int) -> np.ndarray:
        """i32[replicas * size]: the `device` or `host` block of each place."""
        found = np.full((len(self.parts), self.size), default, np.int32)
        for index, part in enumerate(self.parts):
            found[index, : len(part)] = [getattr(swap, kind) for swap in part]
        return found.reshape(-1)


class HostPool:
    """The blocks in host memory of all replicas, and the calls that move them."""

    def __init__(self, state: DeviceState, mesh: Mesh | None, num_replicas: int, num_blocks: int):
        """`state` may be shapes. `num_blocks` in host memory, of each replica."""
        kv = state.kv
        self._past_the_pool = kv.num_blocks // num_replicas
        self._block_shape = (kv.num_layers, *kv.pages_pkbd.shape[1:])
        self._num_replicas, self._num_blocks = num_replicas, num_blocks
        # The system hands out memory as it is written to.
        self._blocks = np.empty((num_replicas, num_blocks, *self._block_shape), kv.pages_pkbd.dtype)
        self._sharding = None if mesh is None else NamedSharding(mesh, partition(BLOCKS_AXES))
        self._take, self._put = jit_take(state, mesh), jit_put(state, mesh)
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self._leaving: deque[tuple[int, _Load, jax.Array]] = deque()  # with the plan's index
        self._coming: dict[_Load, jax.Array] = {}

    def programs(self, kv: KVPages[Any]) -> dict[Any, Program]:
        """What has to be compiled."""
        programs: dict[Any, Program] = {}
        for size in SIZES:
            shape = (self._num_replicas * size, *self._block_shape)
            blocks = jax.ShapeDtypeStruct(shape, self._blocks.dtype, sharding=self._sharding)
            places = np.zeros(self._num_replicas * size, np.int32)
            programs["take", size] = Program(self._take, (kv, places))
            programs["put", size] = Program(self._put, (kv, blocks, places))
        return programs

    def use(self, compiled: dict[Any, Callable[..., Any]]) -> None:
        """Take the compiled `programs`."""
        self._compiled = compiled

    def take_out(self, kv: KVPages[jax.Array], swaps: Sequence[BlockSwap], plan_index: int) -> None:
        """Start blocks on their way to host memory. The pool may be written to as soon as this returns."""
        for load in self._loads(swaps):
            blocks = self._compiled["take", load.size](kv, load.places("device", 0))
            blocks.copy_to_host_async()
            self._leaving.append((plan_index, load, blocks))

    def bring_in(self, kv: KVPages[jax.Array], swaps: Sequence[BlockSwap]) -> KVPages[jax.Array]:
        """Write blocks from host memory into the pool."""
        coming, self._coming = self._coming, {}
        for load in self._loads(swaps):
            blocks = coming.pop(load) if load in coming else self._fetch(load)
            kv = self._compiled["put", load.size](kv, blocks, load.places("device", self._past_the_pool))
        return kv

    def prefetch(self, swaps: Sequence[BlockSwap]) -> None:
        """Start blocks on their way to the device; the next `bring_in` finds them there."""
        for load in self._loads(swaps):
            self._coming[load] = self._fetch(load)

    def settle(self, plan_index: int | None = None) -> None:
        """Store what left with this plan or an earlier one (None: with any), so that the device can forget it."""
        while self._leaving and (plan_index is None or self._leaving[0][0] <= plan_index):
            _, load, blocks = self._leaving.popleft()
            arrived = np.asarray(blocks).reshape(self._num_replicas, load.size, *self._block_shape)
            for replica, part in enumerate(load.parts):
                self._blocks[replica, [swap.host for swap in part]] = arrived[replica, : len(part)]

    def forget(self) -> None:
        """A step has failed: what is on its way is lost."""
        self._leaving.clear()
        self._coming.clear()

    def _fetch(self, load: _Load) -> jax.Array:
        self.settle()
        blocks = np.zeros((self._num_replicas, load.size, *self._block_shape), self._blocks.dtype)
        for replica, part in enumerate(load.parts):
            blocks[replica, : len(part)] = self._blocks[replica, [swap.host for swap in part]]
        return self._send(blocks.reshape(-1, *self._block_shape))

    def _send(self, blocks: np.ndarray) -> jax.Array:
        return jax.device_put(blocks, self._sharding)

    def _loads(self, swaps: Sequence[BlockSwap]) -> Iterator[_Load]:
        left = [[swap for swap in swaps if swap.replica == replica] for replica in range(self._num_replicas)]
        while any(left):
            parts = tuple(tuple(some[: SIZES[-1]]) for some in left)
            longest = max(map(len, parts))
            yield _Load(next(size for size in SIZES if size >= longest), parts)
            left = [some[SIZES[-1] :] for some in left]
