"""What a step asks of the device."""

import random

from jaxserve.cost.work import Work, decode_work, prompt_work, work_of
from jaxserve.step import Row, Seat


def row(start: int, count: int, *, samples: bool = True, feeds_last: bool = False) -> Row:
    known = tuple(range(count - feeds_last))
    seat = Seat(seq_id=f"{start}+{count}", slot=0)
    return Row(seat, start, known, feeds_last, samples=samples)


def test_decodes_and_chunks_are_counted_apart():
    rows = [row(9, 1), row(4, 1, feeds_last=True), row(10, 3), row(0, 4, samples=False)]
    # 10 + 5 tokens are read by decodes, 13 + 4 by chunks; the chunks' queries see 11 + 12 + 13 and 1 + 2 + 3 + 4 keys.
    assert work_of(rows, 16, 8) == Work(16, 4, 9, 15, 17, 15 + 36 + 10, logit_rows=4)
    assert not work_of(rows, 16, 8).is_decode
    assert work_of(rows[:2], 2, 2) == decode_work(2, 15) and decode_work(2, 15).is_decode
    assert work_of([row(10, 3)], 16, 16) == prompt_work(3, 10, rung=16)._replace(logit_rows=4)


def test_pairs_are_those_of_each_query_with_all_keys_before_it():
    rng = random.Random(0)
    rows = [row(rng.randrange(50), rng.choice([1, 1, 2, 7])) for _ in range(40)]
    brute = sum(r.start + i + 1 for r in rows for i in range(r.num_tokens))
    work = work_of(rows, 128, 40)
    assert (work.pairs, work.tokens, work.rows) == (brute, sum(r.num_tokens for r in rows), 40)


def test_chunks_of_a_prompt_see_what_the_whole_prompt_sees():
    starts = [0, 16, 80, 81, 144]
    chunks = [prompt_work(end - start, start) for start, end in zip(starts, [*starts[1:], 300], strict=True)]
    assert sum(chunk.pairs for chunk in chunks) == prompt_work(300).pairs
    assert sum(chunk.tokens for chunk in chunks) == 300


def test_logits_of_few_or_of_all_rows():
    """As `executor.program` does: a step that fills prompts computes few, if few are wanted."""
    prompts = [row(0, 5, samples=i < 4) for i in range(6)]
    assert work_of(prompts, 64, 8).logit_rows == 4
    assert work_of([*prompts, row(3, 1)], 64, 8).logit_rows == 8
    assert work_of([row(3, 1)] * 3, 4, 4).logit_rows == 4
