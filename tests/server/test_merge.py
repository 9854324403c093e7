"""Events that have come since the last time are one piece."""

from jaxserve.output import CompletionOutput, Event, RequestMetrics, RequestOutput
from jaxserve.server.merge import joined

OUTPUT = RequestOutput("r", None, [1], [CompletionOutput(0), CompletionOutput(1)], RequestMetrics(0.0))


def event(index: int, token: int, finish: str | None = None) -> Event:
    return Event("r", index, chr(token), (token,), finish, OUTPUT)


def test_each_answer_has_one_piece_in_the_order_of_its_first():
    parts = joined([event(1, 97), event(0, 98), event(1, 99, "stop"), event(0, 100)])
    assert [(p.index, p.text, p.token_ids, p.finish_reason) for p in parts] == [
        (1, "ac", (97, 99), "stop"),
        (0, "bd", (98, 100), None),
    ]
