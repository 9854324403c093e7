"""A cost model from measured steps: least squares on few numbers, none of them negative, so that more work takes longer."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxserve.cost.forms import Fitted
from jaxserve.cost.model import CostModel, Host
from jaxserve.cost.work import Work

Floats = NDArray[np.float64]

_ROUNDS = 5  # of weighing down what does not fit
_FAR = 0.2  # relative error from which on a measurement counts less (Huber)


class Sample(NamedTuple):
    """One kind of step as measured, in seconds."""

    work: Work
    device_s: float  # alone: from dispatch to its result
    host_s: float  # alone: from a result to the next dispatch
    period_s: float  # from result to result, in a stream of such steps as the engine runs them


class Errors(NamedTuple):
    """How well a model tells periods."""

    median: float  # of the relative errors, without sign
    p90: float
    bias: float  # median, with sign: above 0, steps take longer than told
    rank: float  # Spearman's correlation of told and measured


def fit(samples: Sequence[Sample], name: str, **sizes: float) -> CostModel:
    """The model that tells these samples best, by relative errors. `sizes` are fields of `CostModel` about bytes.

    Raises:
      ValueError: there are no steps of decodes, or none with prompts.
    """
    sizes_of = {kind: sorted({s.work.rung for s in samples if s.work.is_decode is kind}) for kind in (True, False)}
    if not all(sizes_of.values()):
        raise ValueError("steps of decodes are needed, and steps with prompts")
    columns = [(kind, rung) for kind, rungs in sizes_of.items() for rung in rungs]
    table = np.array([[*(_is_of(s.work, *column) for column in columns), *_slopes(s.work)] for s in samples], float)
    # Alone, a step may take longer than in a stream of steps: threads fall asleep in between.
    found = _solve(table, np.array([min(sample.device_s, sample.period_s) for sample in samples]))
    bases = dict(zip(columns, found, strict=False))
    decode_kv_s, chunk_kv_s, pair_s, row_s = map(float, found[len(columns) :])
    device = Fitted(
        decode=_rising([(rung, bases[True, rung]) for rung in sizes_of[True]]),
        mixed=_rising([(rung, bases[False, rung]) for rung in sizes_of[False]]),
        decode_kv_s=decode_kv_s,
        chunk_kv_s=chunk_kv_s,
        pair_s=pair_s,
        row_s=row_s,
    )
    hosts = np.array([(1, sample.work.rows, sample.work.tokens) for sample in samples], float)
    step_s, host_row_s, token_s = map(float, _solve(hosts, np.array([sample.host_s for sample in samples])))
    host = Host(step_s=step_s, row_s=host_row_s, token_s=token_s)
    return _overlapped(CostModel(name=name, device=device, host=host, **sizes), samples)


def errors(model: CostModel, samples: Iterable[Sample]) -> Errors:
    """Of steps that a model was not fitted to, one hopes."""
    pairs = np.array([(model.step_s(sample.work), sample.period_s) for sample in samples])
    told, measured = pairs.T
    relative = measured / told - 1
    return Errors(
        median=float(np.median(np.abs(relative))),
        p90=float(np.quantile(np.abs(relative), 0.9)),
        bias=float(np.median(relative)),
        rank=float(np.corrcoef(_ranks(told), _ranks(measured))[0, 1]),
    )


def _is_of(work: Work, is_decode: bool, rung: int) -> bool:
    return work.is_decode is is_decode and work.rung == rung


def _slopes(work: Work) -> tuple[float, ...]:
    return work.decode_kv, work.chunk_kv, work.pairs - work.decode_kv, work.rows


def _rising(points: list[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """A curve that does not fall, as noise would have it: neighbours that do are given their mean."""
    pools = list[tuple[float, int]]()  # seconds, points
    for _, second in points:
        pools.append((float(second), 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (left, m), (right, n) = pools[-2:]
            pools[-2:] = [((left * m + right * n) / (m + n), m + n)]
    seconds = [second for second, count in pools for _ in range(count)]
    return tuple((rung, second) for (rung, _), second in zip(points, seconds, strict=True))


def _overlapped(model: CostModel, samples: Sequence[Sample]) -> CostModel:
    """What of the shorter of device and host is hidden when steps overlap. Should they hinder each other by more than all of
    it (on a CPU, whose cores do both), everything takes longer by a factor."""
    told = np.array([(model.device_s(s.work), model.host_s(s.work), s.period_s) for s in samples])
    longer, shorter, period = told[:, :2].max(1), told[:, :2].min(1), told[:, 2]
    hidden = float(np.clip(np.median((longer + shorter - period) / np.maximum(shorter, 1e-12)), 0.0, 1.0))
    # Of sums, so that a stream of steps takes as long as it did: single errors are not spread evenly about 0.
    factor = float(period.sum() / (longer + (1 - hidden) * shorter).sum())
    return scaled(dataclasses.replace(model, hidden=hidden), factor)


def scaled(model: CostModel, factor: float) -> CostModel:
    """A fitted model of a machine on which everything takes `factor` times as long."""
    device = model.device
    assert isinstance(device, Fitted)
    slopes = ("decode_kv_s", "chunk_kv_s", "pair_s", "row_s")
    return dataclasses.replace(
        model,
        device=Fitted(
            decode=tuple((rung, seconds * factor) for rung, seconds in device.decode),
            mixed=tuple((rung, seconds * factor) for rung, seconds in device.mixed),
            **{name: getattr(device, name) * factor for name in slopes},
        ),
        host=Host(**{name: value * factor for name, value in dataclasses.asdict(model.host).items()}),
    )


def _solve(table: Floats, seconds: Floats) -> Floats:
    """x, none of it negative, so that table @ x is near the seconds, by relative errors; far ones count less."""
    weight = 1 / np.maximum(seconds, 1e-9)
    trust = np.ones_like(weight)
    found = np.zeros(table.shape[1])
    for _ in range(_ROUNDS):
        scale = weight * np.sqrt(trust)
        found = _least_squares(table * scale[:, None], seconds * scale)
        off = np.abs(table @ found - seconds) * weight
        trust = np.minimum(1.0, _FAR / np.maximum(off, 1e-12))
    return found


def _least_squares(table: Floats, goal: Floats) -> Floats:
    """Least squares; of columns that would get negative numbers the worst is left out, one after the other."""
    size = np.maximum(np.linalg.norm(table, axis=0), 1e-300)
    used = list(range(table.shape[1]))
    found = np.zeros(table.shape[1])
    while used:
        part, *_ = np.linalg.lstsq(table[:, used] / size[used], goal, rcond=1e-9)
        if part.min() >= 0:
            found[used] = part / size[used]
            break
        used.pop(int(part.argmin()))
    return found


def _ranks(values: Floats) -> Floats:
    """Place of each value in their order; of equals the mean of their places."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]
