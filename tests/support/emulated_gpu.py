"""Runs a Mosaic GPU kernel's own Python on a CPU, so that its numbers and its barriers can be tested without a GPU.

Stands in for the modules `plgpu`, `pl` and `lax` of a kernel's file: warpgroups are threads, memory is numpy. Meant to be
unkind: shared memory begins as nan; a copy makes its target nan when it is issued and arrives only when a barrier is waited
for, so that reading too early and overwriting too early both show; a product or copy of what this warpgroup wrote and did
not commit is an error, as is a wait that a barrier's two phases cannot tell, and a deadlock.

What it cannot show: layouts of registers, swizzles, limits of memory, speed. Those are the compiler's part.
"""

import threading
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

PATIENCE_S = 30.0

_here = threading.local()  # .place: grid names -> index; .program: what the warpgroups of a program share


class Program:
    """What the warpgroups of one program share."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.errors: list[BaseException] = []


class Ref:
    """A view of some memory. `owner` is the array it is a view of."""

    def __init__(self, array: np.ndarray, owner: "Ref | None" = None, *, is_padded: bool = False) -> None:
        self.array, self.owner, self.is_padded = array, owner or self, is_padded
        self.uncommitted: set[int] = set()  # warpgroups that wrote

    shape = property(lambda self: self.array.shape)
    dtype = property(lambda self: self.array.dtype)

    @property
    def at(self) -> "At":
        return At(self)

    def __getitem__(self, index: Any) -> Any:
        return self.array[index].copy()

    def __setitem__(self, index: Any, value: Any) -> None:
        assert not self.is_padded, "a write past the end"
        assert self.array[index].shape == value.shape
        assert self.dtype == value.dtype
        self.array[index] = value
        self.owner.uncommitted.add(axis_index("warpgroup"))


class At:
    """`ref.at[...]`: integers and slices; past the end of what is only read there are zeros."""

    def __init__(self, ref: Ref) -> None:
        self.ref = ref

    def __getitem__(self, index: Any) -> Ref:
        index = tuple(i if isinstance(i, slice) else int(i) for i in (index if isinstance(index, tuple) else (index,)))
        array, is_padded = self.ref.array, self.ref.is_padded
        for axis, i in enumerate(index):
            begin, end = (i.start or 0, i.stop or 0) if isinstance(i, slice) else (i, i + 1)
            assert begin >= 0, "an index below zero"
            if end > array.shape[axis]:
                assert isinstance(i, slice), f"index {i} of {array.shape[axis]}"
                width = [(0, 0)] * array.ndim
                width[axis] = (0, end - array.shape[axis])
                array, is_padded = np.pad(array, width), True
        return Ref(array[index], self.ref.owner, is_padded=is_padded)


class Barrier:
    """Counts arrivals and finished phases; remembers how many each warpgroup has waited for."""

    def __init__(self, num_arrivals: int = 1) -> None:
        self.num_arrivals, self.arrived, self.finished = num_arrivals, 0, 0
        self.waited: dict[int, int] = {}
        self.copies: list[Callable[[], None]] = []

    def arrive(self) -> None:
        self.arrived += 1
        if self.arrived == self.num_arrivals:
            self.arrived, self.finished = 0, self.finished + 1

    def land(self) -> None:
        for copy in self.copies:
            copy()
            self.arrive()
        self.copies = []


class Barriers:
    """An array of barriers; used without an index, its first."""

    def __init__(self, num_arrivals: int = 1, num_barriers: int = 1) -> None:
        self.all = [Barrier(num_arrivals) for _ in range(num_barriers)]

    @property
    def at(self) -> list[Barrier]:
        return self.all


def _one(barrier: Barrier | Barriers) -> Barrier:
    return barrier.all[0] if isinstance(barrier, Barriers) else barrier


def axis_index(name: str) -> int:
    return _here.place[name]


def barrier_arrive(barrier: Barrier | Barriers) -> None:
    with _here.program.changed:
        _one(barrier).arrive()
        _here.program.changed.notify_all()


def barrier_wait(barrier: Barrier | Barriers) -> None:
    barrier, me, program = _one(barrier), axis_index("warpgroup"), _here.program
    with program.changed:
        mine = barrier.waited.get(me, 0)

        def is_over() -> bool:
            barrier.land()
            return barrier.finished > mine or bool(program.errors)

        assert program.changed.wait_for(is_over, PATIENCE_S), "a deadlock"
        program.changed.notify_all()
        assert not program.errors, "another warpgroup failed"
        assert barrier.finished == mine + 1, "a phase was missed: waiting would last for ever, or not at all"
        barrier.waited[me] = mine + 1


def copy_gmem_to_smem(source: Ref, target: Ref, barrier: Barrier | Barriers) -> None:
    assert source.shape == target.shape
    assert source.dtype == target.dtype
    with _here.program.changed:
        target.array[...] = np.nan

        def land() -> None:
            target.array[...] = source.array

        _one(barrier).copies.append(land)
        _here.program.changed.notify_all()


def copy_smem_to_gmem(source: Ref, target: Ref) -> None:
    assert source.shape == target.shape
    assert source.dtype == target.dtype
    assert not target.is_padded, "a write past the end"
    _assert_committed(source)
    target.array[...] = source.array


def commit_smem() -> None:
    for ref in _here.program.memory:
        ref.uncommitted.discard(axis_index("warpgroup"))


def wgmma(sums: "Sums", a: Any, b: Ref) -> None:
    (m, k), (_, n) = a.shape, b.shape
    assert m % 64 == 0
    assert n % 8 == 0
    assert k % 16 == 0
    assert a.dtype == b.dtype
    for x in (a, b):
        if isinstance(x, Ref):
            _assert_committed(x)
    a, b = (x.array if isinstance(x, Ref) else np.asarray(x) for x in (a, b))
    with np.errstate(invalid="ignore"):  # nan among the numbers: what comes of it must not be used
        sums.value = sums.value + a.astype(np.float32) @ b.astype(np.float32)


def _assert_committed(ref: Ref) -> None:
    assert axis_index("warpgroup") not in ref.owner.uncommitted, "written and not committed"


class Sums:
    """An accumulator."""

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        self.value = np.zeros(shape, dtype)

    @classmethod
    def init(cls, value: Any) -> "Sums":
        sums = cls(value.shape, value.dtype)
        sums.value = value
        return sums

    def __getitem__(self, index: Any) -> Any:
        return self.value[index]


def run_state(body: Callable[[Sums], None]) -> Callable[[Sums], Any]:
    def run(sums: Sums) -> Any:
        body(sums)
        return sums.value

    return run


def fori_loop(begin: Any, end: Any, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    for i in range(int(begin), int(end)):
        carry = body(np.int32(i), carry)
    return carry


def loop(begin: Any, end: Any) -> Callable[[Callable[[Any], None]], None]:
    return lambda body: fori_loop(begin, end, lambda i, _: body(i), None)


def when(condition: Any) -> Callable[[Callable[[], None]], Any]:
    return lambda body: body() if bool(condition) else None


def kernel(body: Callable[..., None], *, out_type, scratch_types, grid, grid_names, num_threads, thread_name, **_: Any):
    """The kernel as a function of arrays, which a jitted function may call; programs run one after the other."""

    def run(*operands: Any) -> tuple[np.ndarray, ...]:
        inputs = [Ref(np.asarray(x)) for x in operands]
        outputs = [Ref(np.full(x.shape, np.nan, x.dtype)) for x in out_type]
        for index in np.ndindex(*grid):
            program = Program()
            scratch = {name: allocate(x) for name, x in scratch_types.items()}
            program.memory = [x for x in scratch.values() if isinstance(x, Ref)]  # pyright: ignore[reportAttributeAccessIssue]

            def work(warpgroup: int, index=index, program=program, scratch=scratch) -> None:
                _here.place = dict(zip(grid_names, index, strict=True)) | {thread_name: warpgroup}
                _here.program = program
                try:
                    body(*inputs, *outputs, **scratch)
                except BaseException as error:  # noqa: BLE001  (raised again by the thread that started this one)
                    with program.changed:
                        program.errors.append(error)
                        program.changed.notify_all()

            threads = [threading.Thread(target=work, args=(w,)) for w in range(num_threads)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            if program.errors:
                raise program.errors[0]
            for barriers in (x for x in scratch.values() if isinstance(x, Barriers)):
                assert not any(barrier.copies for barrier in barriers.all), "a copy that nobody waited for"
        return tuple(ref.array for ref in outputs)

    return lambda *operands: jax.pure_callback(run, out_type, *operands)


def allocate(kind: Any) -> Ref | Barriers:
    if isinstance(kind, Barriers):
        return Barriers(kind.all[0].num_arrivals, len(kind.all))  # new ones: a program's own
    shape, dtype = kind
    return Ref(np.full(shape, np.nan, dtype))


class _NumPyInside:
    """`jnp`, and within a kernel numpy, which is a hundred times faster at small things."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np if hasattr(_here, "place") else jnp, name)


def broadcasted_iota(dtype: Any, shape: tuple[int, ...], axis: int, *, layout: Any) -> np.ndarray:
    return np.arange(shape[axis], dtype=dtype).reshape([-1 if i == axis else 1 for i in range(len(shape))])


def broadcast_in_dim(x: np.ndarray, shape: tuple[int, ...], axes: tuple[int, ...]) -> np.ndarray:
    return np.broadcast_to(x.reshape([x.shape[axes.index(i)] if i in axes else 1 for i in range(len(shape))]), shape)


def stand_ins() -> dict[str, Any]:
    """What to put into the place of a kernel's modules, by the names it knows them by."""

    def over(module: types.ModuleType, **others: Any) -> types.SimpleNamespace:
        return types.SimpleNamespace(**vars(module) | others)

    return {
        "jnp": _NumPyInside(),
        "lax": over(
            lax,
            axis_index=axis_index,
            fori_loop=fori_loop,
            broadcast_in_dim=broadcast_in_dim,
            div=lambda x, y: np.int32(int(x) // y),
            rem=lambda x, y: np.int32(int(x) % y),
        ),
        "pl": over(
            pl,
            when=when,
            loop=loop,
            ds=lambda begin, size: slice(int(begin), int(begin) + size),
            run_scoped=lambda body, kind: body(Sums(*kind)),
            run_state=run_state,
        ),
        "plgpu": over(
            plgpu,
            kernel=kernel,
            SMEM=lambda shape, dtype, transforms=(): (shape, dtype),
            WGMMAAccumulatorRef=_Accumulator,
            Barrier=Barriers,
            barrier_arrive=barrier_arrive,
            barrier_wait=barrier_wait,
            copy_gmem_to_smem=copy_gmem_to_smem,
            copy_smem_to_gmem=copy_smem_to_gmem,
            wait_smem_to_gmem=lambda _: None,
            commit_smem=commit_smem,
            set_max_registers=lambda count, *, action: None,
            wgmma=wgmma,
            transpose_ref=lambda ref, order: Ref(ref.array.transpose(order), ref.owner),
            load=lambda ref, index, *, layout: ref[index],
            layout_cast=lambda x, layout: x,
            broadcasted_iota=broadcasted_iota,
        ),
    }


class _Accumulator(tuple):
    """`plgpu.WGMMAAccumulatorRef`: a shape and a type to allocate, or by `init` a value to begin with."""

    __slots__ = ()
    init = Sums.init

    def __new__(cls, shape: tuple[int, ...], dtype: Any) -> "_Accumulator":
        return super().__new__(cls, (shape, dtype))
