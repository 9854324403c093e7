"""Events that have come since the last time are one piece."""

import asyncio

from jaxserve.output import CompletionOutput, Event, RequestMetrics, RequestOutput
from jaxserve.request import Request
from jaxserve.server.merge import joined, merged
from jaxserve.stream import Stream

OUTPUT = RequestOutput("r", None, [1], [CompletionOutput(0), CompletionOutput(1)], RequestMetrics(0.0))


def event(index: int, token: int, finish: str | None = None) -> Event:
    return Event("r", index, chr(token), (token,), finish, OUTPUT)


def test_each_answer_has_one_piece_in_the_order_of_its_first():
    parts = joined([event(1, 97), event(0, 98), event(1, 99, "stop"), event(0, 100)])
    assert [(p.index, p.text, p.token_ids, p.finish_reason) for p in parts] == [
        (1, "ac", (97, 99), "stop"),
        (0, "bd", (98, 100), None),
    ]


def test_a_patient_stream_wakes_for_the_first_every_nth_and_the_last():
    async def run() -> list[str]:
        stream = Stream(Request(request_id="r", prompt_token_ids=(1,)), asyncio.get_running_loop(), lambda *_: None)
        taken = list[str]()

        async def read() -> None:
            async for _, (piece,) in merged([stream], 4):
                taken.append(piece.text)

        reader = asyncio.create_task(read())
        for number in range(11):
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            stream.push([event(0, 97 + number)], is_last=number == 10)
        await asyncio.wait_for(reader, 5)
        return taken

    assert asyncio.run(run()) == ["a", "bcde", "fghi", "jk"]
