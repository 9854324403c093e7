"""Reading what the TPU compiler writes about a kernel: slots used per bundle, and memory."""

import dataclasses
import re

_ALLOCATION = re.compile(r"\s*#allocation\w+ \[shape = '.*?', space=(\w+), size = (\w+)")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Slots that the bundles of a kernel use; a bundle is what the chip does in one cycle."""

    names: list[str]
    capacity: list[int]
    bundles: list[list[int]]

    def core(self) -> "Schedule":
        """The bundles from the first to the last that uses the matrix unit; all of them if none does."""
        busy = [i for i, used in enumerate(self.bundles) if any(used[self.names.index(unit)] for unit in _MATRIX)]
        return dataclasses.replace(self, bundles=self.bundles[busy[0] : busy[-1] + 1]) if busy else self

    def total(self, name: str) -> int:
        """Slots used of one unit."""
        return sum(used[self.names.index(name)] for used in self.bundles)

    def share(self, name: str) -> float:
        """Part of a unit's slots that is used."""
        return self.total(name) / max(len(self.bundles) * self.capacity[self.names.index(name)], 1)

    def busy(self, name: str) -> float:
        """Part of the bundles that use a unit at all."""
        return sum(used[self.names.index(name)] > 0 for used in self.bundles) / max(len(self.bundles), 1)


_MATRIX = ("MATMUL", "MATPUSH")


def parse(text: str) -> Schedule:
    """Read the compiler's table of slots per bundle."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("MATMUL"))
    names = [name.strip() for name in lines[start].split(",")]
    numbers = [[int(x) for x in line.split()] for line in lines[start + 1 :] if line.strip() and "=" not in line]
    return Schedule(names, numbers[0], numbers[1:])


def memory(text: str) -> dict[str, int]:
    """Bytes that a kernel's program allocates, by kind of memory ("vmem", "smem"); room for spilled registers included."""
    sums: dict[str, int] = {}
    for space, size in _ALLOCATION.findall(text):
        sums[space] = sums.get(space, 0) + int(size, 0)
    return sums
