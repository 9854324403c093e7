"""Events come in order and none is lost, at the pace that their consumers want."""

import asyncio
import itertools
import random

import pytest

from jaxserve.delivery import Delivery
from jaxserve.errors import UnavailableError
from jaxserve.output import CompletionOutput, Event, RequestMetrics, RequestOutput
from jaxserve.request import Request
from jaxserve.stream import WHOLE, Pace, Stream

OUTPUT = RequestOutput("r", None, [1], [CompletionOutput(0)], RequestMetrics(0.0))


def event(number: int) -> Event:
    return Event("r", 0, f"{number} ", (number,), None, OUTPUT)


def make_stream(pace: Pace = Pace()) -> Stream:  # noqa: B008
    stream = Stream(Request(request_id="r", prompt_token_ids=(1,)), asyncio.get_running_loop(), lambda *_: None)
    stream.pace = pace
    return stream


def refuse_loss(loop):
    raise AssertionError("no event loop was closed")


class Reader:
    """Takes pieces from a stream as they come."""

    def __init__(self, stream: Stream):
        self.stream, self.pieces, self.failure = stream, list[list[int]](), None
        self.task = asyncio.ensure_future(self._read())

    @property
    def tokens(self) -> list[int]:
        return [token for piece in self.pieces for token in piece]

    async def _read(self) -> None:
        try:
            while events := await self.stream.take():
                self.pieces.append([event.token_ids[0] for event in events])
        except UnavailableError as error:
            self.failure = error


async def settle() -> None:
    for _ in range(100):
        await asyncio.sleep(0)


def run(work):
    return asyncio.run(asyncio.wait_for(work, 20))


def test_at_first_at_once_then_so_many_together_and_the_rest_at_the_end():
    async def main():
        reader, delivery = Reader(make_stream(Pace(num_events=4))), Delivery(refuse_loss)
        for number in range(11):
            ended = [reader.stream] if number == 10 else []
            delivery.send([(reader.stream, event(number))], ended, float(number))
            await settle()
        await reader.task
        return reader.pieces

    assert run(main()) == [[0], [1, 2, 3, 4], [5, 6, 7, 8], [9, 10]]


@pytest.mark.parametrize(
    ("num_streams", "delay_s", "wanted"),
    [
        (1, 0.05, 1),  # a step takes 10 ms: 100 pieces a second
        (10, 0.05, 1),  # 1,000 are just enough
        (40, 0.05, 4),  # 4,000 would be too many
        (100, 0.05, 5),
        (400, 0.05, 5),  # the delay is the most
        (400, 0.0, 1),
    ],
)
def test_many_streams_share_what_an_event_loop_can_send(num_streams, delay_s, wanted):
    async def main():
        delivery = Delivery(refuse_loss)
        readers = [Reader(make_stream(Pace(delay_s=delay_s))) for _ in range(num_streams)]
        for number in range(41):
            news = [(reader.stream, event(number)) for reader in readers]
            delivery.send(news, [reader.stream for reader in readers] if number == 40 else [], number * 0.010001)
            await settle()
        for reader in readers:
            await reader.task
            assert reader.tokens == list(range(41))
            assert len(reader.pieces[0]) == 1
            assert {len(piece) for piece in reader.pieces[1:-1]} == {wanted}

    run(main())


def test_who_wants_the_whole_answer_slows_nobody():
    async def main():
        delivery = Delivery(refuse_loss)
        reader, others = Reader(make_stream(Pace(delay_s=9.0))), [Reader(make_stream(WHOLE)) for _ in range(500)]
        for number in range(6):
            readers = [reader, *others]
            ended = [each.stream for each in readers] if number == 5 else []
            delivery.send([(each.stream, event(number)) for each in readers], ended, number * 0.01)
            await settle()
        await asyncio.gather(*(each.task for each in [reader, *others]))
        assert [len(piece) for piece in reader.pieces] == [1] * 6
        assert all([len(piece) for piece in other.pieces] == [1, 5] for other in others)

    run(main())


def test_what_is_held_back_goes_with_any_later_step():
    """A stream whose request was preempted has no events of its own for a while."""

    async def main():
        delivery = Delivery(refuse_loss)
        reader, crowd = (
            Reader(make_stream(Pace(delay_s=0.05))),
            [Reader(make_stream(Pace(delay_s=9.0))) for _ in range(99)],
        )
        for number in range(2):
            delivery.send([(each.stream, event(number)) for each in (reader, *crowd)], [], number * 0.001)
        delivery.send([], [], 0.06)
        await settle()
        assert reader.tokens == [0, 1]
        for each in (reader, *crowd):
            each.task.cancel()

    run(main())


def test_hundreds_of_ends_leave_rounds_to_others():
    async def main():
        delivery, seen = Delivery(refuse_loss), list[int]()
        readers = [Reader(make_stream()) for _ in range(200)]
        delivery.send([(each.stream, event(0)) for each in readers], [each.stream for each in readers], 0.0)
        while not seen or seen[-1] < 200:
            seen.append(sum(each.task.done() for each in readers))
            await asyncio.sleep(0)
        assert max(b - a for a, b in itertools.pairwise(seen)) <= 16

    run(main())


def test_a_failure_comes_after_what_was_held_back():
    async def main():
        reader, delivery = Reader(make_stream(WHOLE)), Delivery(refuse_loss)
        for number in range(3):
            delivery.send([(reader.stream, event(number))], [], float(number))
        delivery.fail({reader.stream: UnavailableError("the engine has gone")})
        await reader.task
        assert reader.tokens == [0, 1, 2]
        assert "has gone" in str(reader.failure)

    run(main())


def test_an_event_loop_that_was_closed_is_told_and_forgotten():
    lost = list[asyncio.AbstractEventLoop]()
    delivery = Delivery(lost.append)
    loop = asyncio.new_event_loop()
    stream = Stream(Request(request_id="r", prompt_token_ids=(1,)), loop, lambda *_: None)
    loop.close()
    delivery.send([(stream, event(0))], [], 0.0)
    assert lost == [loop]
    delivery.send([], [], 9.0)
    assert lost == [loop]


def test_random_paces_lose_and_swap_nothing():
    rng = random.Random(7)

    async def main():
        delivery, now_s, sent = Delivery(refuse_loss), 0.0, dict[Stream, int]()
        readers = [
            Reader(make_stream(Pace(rng.choice([1, 1, 3, 50]), rng.choice([0.0, 0.02, 0.3])))) for _ in range(60)
        ]
        left = list(readers)
        while left:
            now_s += rng.random() * 0.02
            some = [each for each in left if rng.random() < 0.8]
            news = list[tuple[Stream, Event]]()
            for each in some:
                for _ in range(rng.randint(1, 3)):
                    number = sent[each.stream] = sent.get(each.stream, -1) + 1
                    news.append((each.stream, event(number)))
            ended = [each for each in some if rng.random() < 0.05]
            delivery.send(news, [each.stream for each in ended], now_s)
            left = [each for each in left if each not in ended]
            for _ in range(rng.randint(0, 3)):  # the event loop may be behind
                await asyncio.sleep(0)
        await asyncio.gather(*(each.task for each in readers))
        for each in readers:
            assert each.tokens == list(range(sent[each.stream] + 1))

    run(main())
