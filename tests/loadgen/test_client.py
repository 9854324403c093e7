"""The client against a scripted server: its times are the script's, and whatever breaks is told by kind."""

import asyncio
import json

import pytest

from jaxserve.errors import ServerError
from jaxserve.loadgen.http import Host
from tests.loadgen.rigs import DONE, END, EVENTS, FakeServer, chunk, event, on_virtual_time, streamed, text, usage


def ask(response, path="/v1/completions", **options):
    """The answer to one request that gets this response."""

    async def main():
        async with FakeServer(lambda *_: response) as server:
            return await server.client(**options).ask(path, b"{}")

    return on_virtual_time(main)


def test_times_are_those_of_the_script():
    answer = ask(
        streamed((0.5, text("a")), (0.03, text("b")), (0.07, text("c")), (0.2, text("", "length")), (0.01, usage(9, 4)))
    )
    assert answer.error == ""
    assert answer.ttft_s == pytest.approx(0.5)
    assert answer.gaps == pytest.approx([0.03, 0.07])
    assert answer.tpot_s == pytest.approx(0.3 / 3)  # four tokens by usage: the last one had no text
    assert answer.e2e_s == pytest.approx(0.8)
    assert (answer.text, answer.finish_reason, answer.num_prompt, answer.num_output) == ("abc", "length", 9, 4)


def test_a_chunk_of_several_tokens_is_one_arrival_and_counts_as_usage_says():
    answer = ask(streamed((0.1, text("abc")), (0.4, text("def") + text("ghi", "stop") + usage(1, 9))))
    assert answer.gaps == pytest.approx([0.4, 0.0])
    assert answer.num_output == 9
    assert answer.tpot_s == pytest.approx(0.4 / 8)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
def test_bytes_may_be_cut_anywhere(size):
    whole = text("Zoë 🙂") + b": a comment\r\n\r\n" + event({"choices": [{"text": "!", "finish_reason": "stop"}]})
    whole += usage(2, 3) + DONE
    raw = json.dumps({"choices": [{"text": "日本", "finish_reason": None}]}, ensure_ascii=False).encode()
    body = b"".join(chunk(part) for part in (event(raw), whole)) + END
    answer = ask((200, EVENTS, [(0.01, body[i : i + size]) for i in range(0, len(body), size)]))
    assert answer.error == ""
    assert answer.text == "日本Zoë 🙂!"
    assert answer.num_output == 3


def test_the_role_of_a_chat_is_no_token_but_reasoning_is():
    def delta(**fields):
        return event({"choices": [{"delta": fields, "finish_reason": None}]})

    last = event({"choices": [{"delta": {}, "finish_reason": "stop"}]})
    parts = [delta(role="assistant", content=""), delta(reasoning_content="hm"), delta(content="yes"), last]
    answer = ask(streamed(*((0.25, part) for part in parts)), path="/v1/chat/completions")
    assert answer.ttft_s == pytest.approx(0.5)
    assert answer.e2e_s == pytest.approx(1.0)
    assert (answer.text, answer.num_output, answer.has_usage) == ("hmyes", 2, False)


def test_without_usage_a_tokenizer_counts():
    answer = ask(streamed((0, text("four")), (0, text("", "stop"))), count=len)
    assert answer.num_output == 4


def test_an_answer_without_tokens_has_its_end_as_first_token():
    answer = ask(streamed((0.3, text("", "stop")), (0, usage(5, 1))))
    assert answer.ttft_s == answer.e2e_s == pytest.approx(0.3)
    assert answer.tpot_s is None


REFUSAL = json.dumps({"error": {"message": "no such model 'x'", "code": 404}}).encode()


@pytest.mark.parametrize(
    ("response", "kind", "told"),
    [
        ((404, {"Content-Length": str(len(REFUSAL))}, [(0, REFUSAL)]), "HTTP 404", "no such model 'x'"),
        ((401, {"Content-Length": "0"}, []), "HTTP 401", ""),
        ((422, {"Content-Length": "18"}, [(0, b'{"detail": "no \xc3\xa9"}')]), "HTTP 422", "no é"),
        ((502, {"Connection": "close"}, [(0, b"<html>bad"), (0, b" gateway"), None]), "HTTP 502", "<html>bad gateway"),
        ((200, EVENTS, [(0, chunk(text("a"))), None]), "connection broke", "closed the connection"),
        ((200, EVENTS, [(0, chunk(text("a"))), (0, END)]), "cut off", "before the answer did"),
        (
            (200, EVENTS, [(0, chunk(event({"error": {"message": "out of memory"}})) + END)]),
            "error in the stream",
            "memory",
        ),
        ((200, EVENTS, [(0, chunk(event(b"{bad")) + END)]), "not OpenAI's protocol", "JSONDecodeError"),
        ((200, EVENTS, [(0, chunk(event(b"[1]")) + END)]), "not OpenAI's protocol", "AttributeError"),
        ((200, EVENTS, [(0, b"what\r\n")]), "connection broke", "no HTTP: b'what' is no number"),
        ((200, {"Content-Type": "application/json", "Content-Length": "2"}, [(0, b"{}")]), "not OpenAI's", "no stream"),
        ((200, EVENTS, [(7200, b"")]), "timeout", "3600 s"),
    ],
)
def test_what_goes_wrong_is_told_by_kind(response, kind, told):
    answer = ask(response)
    assert answer.error.startswith(kind)
    assert told in answer.error_text


def test_a_server_that_closes_after_the_end_has_answered():
    body = chunk(text("a", "stop")) + chunk(DONE)  # without the last, empty chunk
    assert ask((200, EVENTS, [(0, body), None])).error == ""
    headers = {"Content-Type": "text/event-stream", "Connection": "close"}  # all until the end
    assert ask((200, headers, [(0, text("a", "stop") + DONE), None])).error == ""


def test_a_failed_answer_keeps_what_came():
    answer = ask((200, EVENTS, [(0.5, chunk(text("a"))), None]))
    assert (answer.text, answer.num_output) == ("a", 1)
    assert answer.ttft_s == pytest.approx(0.5)


def test_nobody_there():
    async def main():
        async with FakeServer(lambda *_: streamed()) as server:
            client = server.client()
        answer = await client.ask("/v1/completions", b"{}")
        with pytest.raises(ServerError, match="no server answers at http://127"):
            await client.models()
        return answer

    answer = on_virtual_time(main)
    assert answer.error == "no connection"
    assert "refused" in answer.error_text.lower()


def test_connections_are_kept_and_replaced_when_the_server_drops_them():
    async def main():
        good = streamed((0, text("a", "stop")))
        responses = [good, (200, EVENTS | {"Connection": "close"}, good[2]), good, (*good[:2], [*good[2], None]), good]
        async with FakeServer(lambda *_: responses.pop(0)) as server:
            client = server.client()
            answers = []
            for _ in range(5):
                answers.append(await client.ask("/v1/completions", b"{}"))
                await asyncio.sleep(0.1)
            return answers, server.connections

    answers, connections = on_virtual_time(main)
    assert [answer.error for answer in answers] == [""] * 5
    assert connections == 3  # two ended theirs, one of them without a word


def test_headers_and_prefix_of_the_address_are_sent():
    async def main():
        async with FakeServer(lambda *_: streamed((0, text("a", "stop")))) as server:
            server.url += "/somewhere/"
            await server.client(headers={"Authorization": "Bearer k"}).ask("/v1/completions", b"{}")
            return server.heads[0]

    head = on_virtual_time(main)
    assert head.startswith("POST /somewhere/v1/completions HTTP/1.1\r\nHost: 127.0.0.1:")
    assert "Authorization: Bearer k\r\n" in head


def test_models():
    listed = json.dumps({"data": [{"id": "one"}, {"id": "two"}]}).encode()

    def client_of(status, body, main):
        async def run():
            response = (status, {"Content-Length": str(len(body))}, [(0, body)])
            async with FakeServer(lambda *_: response) as server:
                return await server.client().models()

        return main(run)

    assert client_of(200, listed, on_virtual_time) == ["one", "two"]
    with pytest.raises(ServerError, match=r"refuses: HTTP 401, who are you$"):
        client_of(401, b'{"error": {"message": "who are you"}}', on_virtual_time)
    with pytest.raises(ServerError, match="Give --model"):
        client_of(200, b"[]", on_virtual_time)


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://x", "http://", "http://x:99999", "http://[::1"])
def test_addresses_that_are_none(url):
    with pytest.raises(ValueError, match="is no address of a server"):
        Host(url)
