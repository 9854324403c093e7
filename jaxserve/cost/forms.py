"""Two ways to say how long the device takes for a step: a roofline from data sheets, and curves fitted to measured steps.

Both are plain numbers with two methods: `step_s(work)` in seconds, and `parts(work)`, the same seconds by what they are for.
More work never takes less time.
"""

import dataclasses
from bisect import bisect_left

from jaxserve.cost.work import Work


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Roofline:
    """Products and memory traffic of one device, at the speeds it is taken to reach (LLM-Viewer, 2024, arXiv 2402.16363).

    The products with weights, the attention of prompts and that of decodes come one after the other; each takes as long
    as its arithmetic or its traffic, whichever is longer. With `overlaps_parts` the longer of all arithmetic and all
    traffic counts instead, as if a step were one operation.
    """

    flop_per_s: float
    bytes_per_s: float
    token_flop: float  # of each token, padding included: products with weights, head and experts apart
    row_flop: float  # of each row: logits
    pair_flop: float  # of each query and key, over all layers
    weight_bytes: float  # read by every step, experts apart
    kv_bytes: float  # of one token's keys and values, over all layers; written once, read by later tokens
    token_bytes: float = 0.0  # of each token, padding included: what products read and write beside weights
    row_bytes: float = 0.0  # of each row: logits
    expert_flop: float = 0.0  # of each token without padding
    expert_bytes: float = 0.0  # of the weights of all experts
    expert_share: float = 0.0  # of a layer's experts that a token is given to
    token_link_s: float = 0.0  # of each token, padding included: sent to other devices
    collectives_s: float = 0.0  # of a step: what its collectives wait for, however little is sent
    launch_s: float = 0.0  # of a step: from one program to the next, and from operation to operation
    overlaps_parts: bool = False

    def step_s(self, work: Work) -> float:
        """Seconds on the device."""
        products, chunks, decodes, products_b, chunks_b, decodes_b = self._loads(work)
        if self.overlaps_parts:
            busy_s = max(products + chunks + decodes, products_b + chunks_b + decodes_b)
        else:
            busy_s = max(products, products_b) + max(chunks, chunks_b) + max(decodes, decodes_b)
        return busy_s + work.rung * self.token_link_s + self.collectives_s + self.launch_s

    def parts(self, work: Work) -> dict[str, float]:
        """Seconds by part. With `overlaps_parts`, each part's share of what takes longer: arithmetic or traffic."""
        products, chunks, decodes, products_b, chunks_b, decodes_b = self._loads(work)
        if self.overlaps_parts:
            flops, traffic = (products, chunks + decodes), (products_b, chunks_b + decodes_b)
            matmul_s, attention_s = max(flops, traffic, key=sum)
        else:
            matmul_s = max(products, products_b)
            attention_s = max(chunks, chunks_b) + max(decodes, decodes_b)
        return {
            "matmul": matmul_s,
            "attention": attention_s,
            "collectives": work.rung * self.token_link_s + self.collectives_s,
            "launch": self.launch_s,
        }

    def _loads(self, work: Work) -> tuple[float, float, float, float, float, float]:
        """Seconds of arithmetic (products, prompts, decodes), then of traffic (the same)."""
        rung, _, tokens, decode_kv, chunk_kv, pairs, logit_rows = work
        flops = rung * self.token_flop + logit_rows * self.row_flop
        traffic = self.weight_bytes + rung * self.token_bytes + logit_rows * self.row_bytes + tokens * self.kv_bytes
        if self.expert_bytes:
            # Experts chosen at random: each is missed by a token with probability 1 - share.
            flops += tokens * self.expert_flop
            traffic += self.expert_bytes * (1.0 - (1.0 - self.expert_share) ** tokens)
        kv_s = self.kv_bytes / self.bytes_per_s
        pair_s = self.pair_flop / self.flop_per_s
        return (
            flops / self.flop_per_s,
            (pairs - decode_kv) * pair_s,
            decode_kv * pair_s,
            traffic / self.bytes_per_s,
            chunk_kv * kv_s,
            decode_kv * kv_s,
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Fitted:
    """Seconds as measured: of each compiled size, and of each token read and each query and key on top.

    Between sizes that were measured the seconds lie on a line, beyond them on the last one. DistServe's simulator has this
    form (OSDI 2024, arXiv 2401.09670).
    """

    decode: tuple[tuple[int, float], ...]  # (tokens, seconds) of steps whose rows have one token each, ascending
    mixed: tuple[tuple[int, float], ...]  # of all others
    decode_kv_s: float = 0.0  # of each token that rows of one token read
    chunk_kv_s: float = 0.0  # of each token that other rows read
    pair_s: float = 0.0  # of each query and key of these
    row_s: float = 0.0  # of each row

    def step_s(self, work: Work) -> float:
        """Seconds on the device."""
        rung, rows, tokens, decode_kv, chunk_kv, pairs, _ = work
        base_s = _on_curve(self.decode if tokens == rows else self.mixed, rung)
        read_s = decode_kv * self.decode_kv_s + chunk_kv * self.chunk_kv_s
        return base_s + read_s + (pairs - decode_kv) * self.pair_s + rows * self.row_s

    def parts(self, work: Work) -> dict[str, float]:
        """Seconds by part. What a size takes by itself is counted as products."""
        base_s = _on_curve(self.decode if work.is_decode else self.mixed, work.rung)
        return {
            "matmul": base_s + work.rows * self.row_s,
            "attention": self.step_s(work) - base_s - work.rows * self.row_s,
        }


def _on_curve(curve: tuple[tuple[int, float], ...], tokens: int) -> float:
    place = bisect_left(curve, (tokens,))
    if place < len(curve) and curve[place][0] == tokens:
        return curve[place][1]
    if len(curve) == 1:
        return curve[0][1]
    place = min(max(place, 1), len(curve) - 1)
    (left, left_s), (right, right_s) = curve[place - 1], curve[place]
    return max(left_s + (right_s - left_s) * (tokens - left) / (right - left), 0.0)
