"""Prefill of prompts of mixed lengths: which devices share which prompts, so that a wave of them is done soonest.

Short prompts are cheapest on one device each, a long one wants many; so a wave splits the devices into groups of different
sizes (degrees), and gives each prompt to one. Host-only and deterministic; numbers in, numbers out.

Source: FlexSP, arXiv 2412.01523, made for training; its program of integers (`flexsp_exact.py`) takes seconds, so groups are
found greedily here.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

from jaxserve.errors import CapacityError

EXTRA_WAVES = 4  # so many more waves than memory asks for are tried


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CostModel:
    """Time and memory of a group of `degree` devices, fitted by measuring.

    pair_s, token_s: on one device, for the square of a prompt's length, and for its length.
    start_s: of each group, whatever it does.
    sent_bytes: for each token, all layers together, shared by the group's devices.
    bytes_per_s: of a device in a group, by degree. Powers of two; besides 1 there are no other degrees than these.
    link_start_s: of each group of more than one device, whatever it sends.
    token_bytes: keys and values of a token, on the devices of its group together.
    free_bytes: of each device, for keys and values; less what a step needs besides.
    """

    pair_s: float
    token_s: float
    start_s: float
    sent_bytes: float
    bytes_per_s: Mapping[int, float]
    link_start_s: float
    token_bytes: float
    free_bytes: float

    def work_s(self, length: int, degree: int) -> float:
        """What one prompt adds to the time of a group."""
        computed_s = (self.pair_s * length + self.token_s) * length / degree
        return computed_s if degree == 1 else computed_s + self.sent_bytes * length / degree / self.bytes_per_s[degree]

    def fixed_s(self, degree: int) -> float:
        """What a group takes besides."""
        return self.start_s if degree == 1 else self.start_s + self.link_start_s

    def time_s(self, degree: int, lengths: Sequence[int]) -> float:
        """Of a group's prompts together."""
        return self.fixed_s(degree) + sum(self.work_s(length, degree) for length in lengths)

    def degrees(self, num_devices: int) -> list[int]:
        """Those that so many devices allow, the largest first."""
        return sorted((d for d in {1, *self.bytes_per_s} if d <= num_devices), reverse=True)

    def room_tokens(self, degree: int) -> int:
        """Tokens that a group has memory for."""
        return int(self.free_bytes * degree // self.token_bytes)


@dataclasses.dataclass(frozen=True, slots=True)
class Group:
    """Devices `first` .. `first + degree - 1`, aligned to the degree, and the prompts (by index) that they share."""

    degree: int
    first: int
    prompts: tuple[int, ...]
    time_s: float


@dataclasses.dataclass(frozen=True, slots=True)
class Wave:
    """Groups that run at the same time. Each is free for what comes next when it is done, not when the wave is."""

    groups: tuple[Group, ...]

    @property
    def time_s(self) -> float:
        """Until the last group is done."""
        return max(group.time_s for group in self.groups)

    @property
    def device_s(self) -> float:
        """Of all devices together, until each is free."""
        return sum(group.degree * group.time_s for group in self.groups)


def plan(lengths: Sequence[int], num_devices: int, cost: CostModel) -> list[Wave]:
    """Waves for all prompts, longest last, with about the least sum of times.

    For up to 16 devices: the ways to split more of them into groups are too many to try.

    Raises: CapacityError if a prompt does not fit the largest group.
    """
    if not lengths:
        return []
    longest, widest = max(lengths), cost.degrees(num_devices)[0]
    if longest > cost.room_tokens(widest):
        raise CapacityError(
            f"a prompt has {longest} tokens, and a group of {widest} devices has room for {cost.room_tokens(widest)}",
            remedy="Give the KV pool more memory, or use more devices",
        )
    fewest = -(-sum(lengths) // cost.room_tokens(num_devices))
    best: list[Wave] | None = None
    for count in range(fewest, len(lengths) + 1):
        waves = [form_wave(lengths, chunk, num_devices, cost) for chunk in split(lengths, count)]
        if all(waves) and (best is None or _total_s(waves) < _total_s(best)):
            best = [wave for wave in waves if wave]
        if best and count >= fewest + EXTRA_WAVES:
            break
    assert best, "each prompt alone fits"
    return best


def form_wave(lengths: Sequence[int], prompts: Sequence[int], num_devices: int, cost: CostModel) -> Wave | None:
    """The wave of these prompts (indices) that is done soonest, and of such the one that keeps devices least, as far as
    giving them out longest first finds it. None if they do not fit."""
    order = sorted(prompts, key=lambda i: (-lengths[i], i))
    works = {degree: [cost.work_s(lengths[i], degree) for i in order] for degree in cost.degrees(num_devices)}
    best: Wave | None = None
    for degrees in partitions(num_devices, cost.degrees(num_devices)):
        if best and cost.fixed_s(degrees[0]) + works[degrees[0]][0] > best.time_s:
            continue  # the longest alone takes longer than the best so far
        wave = _give_out(lengths, order, degrees, works, cost)
        if wave and (best is None or (wave.time_s, wave.device_s) < (best.time_s, best.device_s)):
            best = wave
    return best


def partitions(num_devices: int, degrees: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """All ways to split devices into groups of these degrees (largest first, 1 last): 10 for 8 devices, 36 for 16."""
    if not num_devices:
        yield ()
    for index, degree in enumerate(degrees):
        if degree <= num_devices:
            for rest in partitions(num_devices - degree, degrees[index:]):
                yield degree, *rest


def lower_bound_s(lengths: Sequence[int], num_devices: int, cost: CostModel) -> float:
    """No wave of these prompts is done sooner: they are shared evenly and nothing is sent, or the longest is alone."""
    even_s = sum(cost.work_s(length, 1) for length in lengths) / num_devices + cost.start_s
    return max(even_s, min(cost.time_s(degree, [max(lengths)]) for degree in cost.degrees(num_devices)))


def split(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Prompts (indices) in order of length, cut into `count` runs of which the largest has as few tokens as possible."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    low, high = max(lengths), sum(lengths)
    while low < high:  # the smallest size that is enough for all
        middle = (low + high) // 2
        low, high = (low, middle) if len(_fill(lengths, order, middle)) <= count else (middle + 1, high)
    runs = _fill(lengths, order, low)
    while len(runs) < count:
        largest = max(range(len(runs)), key=lambda r: len(runs[r]))
        half = len(runs[largest]) // 2
        runs[largest : largest + 1] = [runs[largest][:half], runs[largest][half:]]
    return runs


def bucket(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Prompts (indices) in order of length, in at most `count` runs. If each were as long as the longest of its run, that
    would add as few tokens as possible."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    sums = [0]
    for i in order:
        sums.append(sums[-1] + lengths[i])
    size, count = len(order), min(count, len(order))
    least = [[0, *[math.inf] * size]]  # tokens added by so many runs up to so many prompts
    begins: list[list[int]] = []
    for _ in range(count):
        before, now, begun = least[-1], [math.inf] * (size + 1), [0] * (size + 1)
        for end in range(1, size + 1):
            last = lengths[order[end - 1]]
            options = [before[begin] + last * (end - begin) - (sums[end] - sums[begin]) for begin in range(end)]
            now[end] = min(options)
            begun[end] = options.index(now[end])
        least.append(now)
        begins.append(begun)
    runs, end = list[list[int]](), size
    for begun in reversed(begins):
        runs.append(order[begun[end] : end])
        end = begun[end]
    return runs[::-1]


def _fill(lengths: Sequence[int], order: Sequence[int], most: int) -> list[list[int]]:
    """In order, into runs of at most `most` tokens."""
    runs, tokens = list[list[int]](), most
    for i in order:
        tokens += lengths[i]
        if tokens > most:
            runs.append([])
            tokens = lengths[i]
        runs[-1].append(i)
    return runs


def _give_out(
    lengths: Sequence[int],
    order: Sequence[int],
    degrees: Sequence[int],
    works: Mapping[int, Sequence[float]],
    cost: CostModel,
) -> Wave | None:
    """Each prompt to the group that would be done with it soonest, of those with room. `works`: by degree, in this order."""
    times = [cost.fixed_s(degree) for degree in degrees]
    rooms = [cost.room_tokens(degree) for degree in degrees]
    given: list[list[int]] = [[] for _ in degrees]
    for rank, prompt in enumerate(order):
        soonest_s, group = math.inf, -1
        for g, degree in enumerate(degrees):
            time_s = times[g] + works[degree][rank]
            if time_s < soonest_s and rooms[g] >= lengths[prompt]:
                soonest_s, group = time_s, g
        if group < 0:
            return None
        times[group] = soonest_s
        rooms[group] -= lengths[prompt]
        given[group].append(prompt)
    groups, first = list[Group](), 0
    for degree, prompts, time_s in zip(degrees, given, times, strict=True):
        if prompts:
            groups.append(Group(degree, first, tuple(prompts), time_s))
        first += degree
    return Wave(tuple(groups))


def _total_s(waves: Sequence[Wave | None]) -> float:
    return sum(wave.time_s for wave in waves if wave)
