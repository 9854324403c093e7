"""Which scheme shares a prompt's attention best: what each of them sends, and a rule from shape and links. Pure numbers."""

import dataclasses
import math

SCHEMES = (
    "gather",
    "ulysses",
    "ring",
    "bidirectional",
    "zigzag",
    "tokenring",
    "pass_q",
)  # of equals the first is taken


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One layer's attention of a prompt, split over devices in order. `itemsize`: bytes of a query's number, or a key's."""

    num_devices: int
    num_tokens: int  # of the prompt, padding included
    num_heads: int  # queries'; those of one device if heads are split, too
    num_kv_heads: int
    head_size: int
    itemsize: int
    causal: bool = True
    window: int | None = None

    @property
    def share(self) -> int:
        """Tokens of one device."""
        return self.num_tokens // self.num_devices

    @property
    def q_bytes(self) -> int:
        """One device's queries, or its output."""
        return self.share * self.num_heads * self.head_size * self.itemsize

    @property
    def kv_bytes(self) -> int:
        """One device's keys and values."""
        return 2 * self.share * self.num_kv_heads * self.head_size * self.itemsize

    @property
    def partial_bytes(self) -> int:
        """What was computed for one device's queries: output and logarithm, float32."""
        return 4 * self.share * self.num_heads * (self.head_size + 1)

    @property
    def num_steps(self) -> int:
        """How many other devices' blocks a query may need: all, or those before it that a window reaches back to."""
        others = self.num_devices - 1
        # The first query of a block is (i - 1) * share + 1 behind the last key of the i-th block before it.
        return others if self.window is None else min(others, -(-(self.window - 1) // self.share))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Links:
    """How fast devices talk and compute.

    bytes_per_s: one way over one link to a neighbour (torus), or all that a device can send (switch).
    is_torus: neighbours alone are linked, and what goes further passes through others.
    start_s: until a collective begins.
    flop_per_s: what attention reaches.
    """

    bytes_per_s: float
    is_torus: bool
    start_s: float
    flop_per_s: float


def refusal(scheme: str, case: Case) -> str:
    """Why a scheme cannot take a case; empty if it can.

    Raises: ValueError for an unknown scheme.
    """
    ends_early = case.num_steps < case.num_devices - 1
    match scheme:
        case "ulysses" if case.num_heads % case.num_devices:
            return f"{case.num_heads} query heads cannot be split over {case.num_devices} devices"
        case "zigzag" if case.share % 2 and case.num_devices > 1:
            return f"zig-zag needs an even number of tokens on each device, not {case.share}"
        case "bidirectional" if ends_early:
            return f"a window of {case.window} reaches back over a part of the ring, and nothing is needed from ahead"
        case "pass_q" if ends_early:
            return f"a window of {case.window} reaches back over a part of the ring, and results would go all round"
        case _ if scheme not in SCHEMES:
            raise ValueError(f"{scheme=} is unknown; there are: auto, {', '.join(SCHEMES)}")
    return ""


def sent_bytes(scheme: str, case: Case) -> int:
    """What one device sends for one layer, all steps together; the device that sends most."""
    size, steps = case.num_devices, case.num_steps
    if size == 1:
        return 0
    match scheme:
        case "gather" | "bidirectional":
            return (size - 1) * case.kv_bytes
        case "ulysses":
            num_kv_heads = math.lcm(case.num_kv_heads, size)  # repeated where there are fewer than devices
            exchanged = 2 * case.q_bytes + case.kv_bytes // case.num_kv_heads * num_kv_heads
            return exchanged * (size - 1) // size
        case "ring":
            return steps * case.kv_bytes
        case "zigzag":
            return (size - 1) * case.kv_bytes + _relaid_bytes(case)
        case "tokenring":
            return steps * (case.q_bytes + case.partial_bytes)
        case "pass_q":
            return (size - 1) * (case.q_bytes + case.partial_bytes) + case.q_bytes
    raise ValueError(f"{scheme=} is unknown; there are: {', '.join(SCHEMES)}")


def estimate_s(scheme: str, case: Case, links: Links) -> float:
    """One layer's attention, seconds. What a ring sends is hidden behind what it computes, or the reverse; other collectives
    are waited for. Without zig-zag the device with the last tokens is the slowest."""
    size, steps, start = case.num_devices, case.num_steps, links.start_s
    pair_s = 4 * case.num_heads * case.head_size / links.flop_per_s
    even_s, slowest_s = pair_s * _pairs(case) / size, pair_s * _most_pairs(case)
    if size == 1:
        return even_s

    def hop_s(num_bytes: float) -> float:
        return start + num_bytes / links.bytes_per_s

    def spread_s(num_bytes: float) -> float:  # to all others; round a ring they are size / 4 away, both ways being used
        return start + num_bytes / links.bytes_per_s * (max(size / 8, 0.5) if links.is_torus else 1.0)

    def ring_s(compute_s: float, rounds: int, sent_s: float, blocks: int = size) -> float:
        own_s = compute_s / blocks
        return own_s + rounds * max((compute_s - own_s) / max(rounds, 1), sent_s)

    match scheme:
        case "gather":
            return start + sent_bytes(scheme, case) / links.bytes_per_s / (2 if links.is_torus else 1) + slowest_s
        case "ulysses":
            return start + spread_s(sent_bytes(scheme, case)) + even_s
        case "ring":
            return ring_s(slowest_s, steps, hop_s(case.kv_bytes), steps + 1)
        case "bidirectional":
            sent = case.kv_bytes * (1 if links.is_torus or size == 2 else 2)
            return ring_s(slowest_s, size // 2, hop_s(sent))
        case "zigzag":
            return 3 * start + spread_s(_relaid_bytes(case)) + ring_s(even_s, steps, hop_s(case.kv_bytes))
        case "tokenring":
            far = [min(i, size - i) if links.is_torus else 1 for i in range(1, steps + 1)]  # links that a result passes
            back_s = hop_s(case.partial_bytes * sum(far) / max(steps, 1))
            there_s = hop_s(case.q_bytes)
            sent_s = max(there_s, back_s) if links.is_torus else there_s + back_s
            return ring_s(slowest_s, steps, sent_s, steps + 1) + (back_s if steps else 0.0)
        case "pass_q":
            home_s = hop_s(case.q_bytes)
            return ring_s(slowest_s, size - 1, hop_s(case.partial_bytes) + home_s) + home_s
    raise ValueError(f"{scheme=} is unknown; there are: {', '.join(SCHEMES)}")


def choose_scheme(case: Case, links: Links, *, into_pool: bool = False) -> str:
    """The scheme with the least estimate among those that take the case.

    into_pool: keys and values go into a pool that is split by heads; all but Ulysses exchange them for that once more.
    """
    able = [scheme for scheme in SCHEMES if not refusal(scheme, case)]
    sent = case.kv_bytes * (case.num_devices - 1) / case.num_devices
    stored_s = links.start_s + sent / links.bytes_per_s if into_pool else 0.0
    return min(able, key=lambda scheme: estimate_s(scheme, case, links) + (scheme != "ulysses") * stored_s)


def _relaid_bytes(case: Case) -> int:
    """Into zig-zag order and back. Of two devices each keeps a half of what it has."""
    return (2 * case.q_bytes + case.kv_bytes) // (2 if case.num_devices == 2 else 1)


def _pairs(case: Case) -> float:
    """Of a query and a key that it sees, half a pair more or less for each."""
    num_tokens = case.num_tokens
    if not case.causal:
        return float(num_tokens) ** 2
    reach = min(case.window or num_tokens, num_tokens)
    return reach * (num_tokens - reach / 2)


def _most_pairs(case: Case) -> float:
    """Those of the device with the last tokens."""
    if not case.causal:
        return float(case.share) * case.num_tokens
    return case.share * min(case.window or case.num_tokens, case.num_tokens - case.share / 2)
