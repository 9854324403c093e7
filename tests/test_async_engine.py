"""The engine's thread and the event loops: every request ends in exactly one way, and the answers are those it has alone."""

import asyncio
import gc
import random
import threading
import time
from types import SimpleNamespace

import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.async_engine import AsyncEngine
from jaxserve.errors import DeviceError, InvariantError, RequestError, UnavailableError
from tests.fakes import EOS, VOCAB_SIZE, Rig, ask, check_answer, make_engine
from tests.models import toy
from tests.test_soak import MAX_MODEL_LEN, check_request, random_request

ROOMY = {"num_blocks": 2048, "max_model_len": 4096}
LONG = {"max_tokens": 3000, "ignore_eos": True}
PATIENCE_S = 10.0


class Held:
    """A fake engine behind an AsyncEngine. Closed, `gate` holds its thread before the next step."""

    def __init__(self, *, max_requests: int | None = None, **options):
        self.rig: Rig = make_engine(**options)
        self.gate = threading.Event()
        self.gate.set()
        self.broken: BaseException | None = None
        self.stops_at_news = False  # the gate closes when a step has made events
        self._step, self.rig.engine.step = self.rig.engine.step, self.step
        model = SimpleNamespace(eos_token_ids=(EOS,), vocab_size=VOCAB_SIZE, embed_size=1)
        metrics = {"num_running": 0}
        built = SimpleNamespace(
            engine=self.rig.engine, tokenizer=None, model=model, max_model_len=64, metrics=lambda: dict(metrics)
        )
        self.engine = AsyncEngine.of(built, max_requests=max_requests)

    def step(self):
        assert self.gate.wait(PATIENCE_S)
        if self.broken is not None:
            raise self.broken
        events = self._step()
        if events and self.stops_at_news:
            self.gate.clear()
        return events

    async def idle(self) -> None:
        """Wait until nothing is left, and look whether that is so."""
        end_s = time.monotonic() + PATIENCE_S
        while self.engine.num_unfinished or await self.engine.ask(lambda: self.rig.engine.has_work):
            assert time.monotonic() < end_s, "the engine does not come to rest"
            await asyncio.sleep(0.001)
        await self.engine.ask(self.rig.check_empty)


@pytest.fixture
def make():
    made = list[Held]()

    def one(**options) -> Held:
        made.append(Held(**options))
        return made[-1]

    yield one
    for held in made:
        held.gate.set()
        held.engine.close()


def within(work):
    """Run a coroutine; nothing may hang."""
    return asyncio.run(asyncio.wait_for(work, 4 * PATIENCE_S))


async def collect(stream):
    """The texts of each answer, from the events, and the output."""
    texts, tokens = {}, {}
    async for event in stream:
        texts[event.index] = texts.get(event.index, "") + event.text
        tokens[event.index] = [*tokens.get(event.index, []), *event.token_ids]
    assert texts == {answer.index: answer.text for answer in stream.output.outputs}
    assert tokens == {answer.index: answer.token_ids for answer in stream.output.outputs}
    return stream.output


def test_streams_are_the_answers_of_the_offline_engine(tmp_path):
    toy.write_checkpoint(tmp_path, toy.CASES["llama3"]["config"], toy.CASES["llama3"]["seed"])
    options = {
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        "block_size": 8,
        "num_kv_blocks": 128,
        "progress": False,
    }
    prompts = [[number + 1] * (number + 3) for number in range(6)]
    params = [SamplingParams(temperature=0.0, max_tokens=12, n=1 + number % 2) for number in range(6)]
    llm = LLM(tmp_path, **options)
    expected = [[a.token_ids for a in output.outputs] for output in llm.generate(prompts, params)]

    async def main():
        async with await AsyncEngine.load(tmp_path, **options) as engine:
            streams = [engine.submit(p, o) for p, o in zip(prompts, params, strict=True)]
            streamed = await asyncio.gather(*map(collect, streams))
            whole = await asyncio.gather(*[engine.generate(p, o) for p, o in zip(prompts, params, strict=True)])
            for outputs in (streamed, whole):
                assert [[a.token_ids for a in output.outputs] for output in outputs] == expected
            scores = await engine.score([1, 2, 3], [[4, 5], [6]])
            assert [s.logprob for s in scores] == pytest.approx(
                [s.logprob for s in llm.score([1, 2, 3], [[4, 5], [6]])]
            )
            assert await engine.embed(prompts) == pytest.approx(llm.embed(prompts), abs=1e-5)
            assert (await engine.metrics())["num_running"] == 0
        with pytest.raises(UnavailableError, match="shut down"):
            engine.submit([1])

    within(main())


def test_several_answers_of_one_request_come_apart(make):
    held, request = make(), ask("r", [1, 2, 3], n=3, temperature=0.7, seed=5, max_tokens=20)

    async def main():
        check_answer(await collect(held.engine.start(request)), request)
        await held.idle()

    within(main())


def test_one_of_several_answers_can_be_ended(make):
    held = make(**ROOMY)
    held.stops_at_news = True  # else all 100 tokens may be there before we have aborted
    request = ask("r", [1, 2, 3], n=2, **LONG | {"max_tokens": 100})

    async def main():
        stream = held.engine.start(request)
        await stream.take()
        stream.abort(1)
        held.stops_at_news = False
        held.gate.set()
        output = await held.engine.finish(stream)
        assert [answer.finish_reason for answer in output.outputs] == ["length", "abort"]
        await held.idle()

    within(main())


@pytest.mark.parametrize("way", ["cancel", "break", "forget"])
def test_who_goes_away_takes_the_request_along(make, way):
    held = make(**ROOMY)
    held.stops_at_news = True  # to collect garbage takes as long as thousands of these steps

    async def consume(stream):
        async for _ in stream:
            if way == "break":
                return

    async def main():
        stream = held.engine.start(ask("r", [1, 2, 3], **LONG))
        if way == "forget":  # a generator that nobody closes
            iterator = aiter(stream)
            await anext(iterator)
            del iterator
            gc.collect()
        else:
            task = asyncio.ensure_future(consume(stream))
            while stream.output is None:
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
        await asyncio.sleep(0)
        held.stops_at_news = False
        held.gate.set()
        await held.idle()
        while events := await stream.take():
            assert events
        assert stream.output.outputs[0].finish_reason == "abort"

    within(main())


def test_cancelling_generate_ends_the_request(make):
    held = make(**ROOMY)

    async def main():
        task = asyncio.ensure_future(held.engine.generate([1, 2], SamplingParams(**LONG)))
        while not held.engine.num_unfinished:
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        await held.idle()

    within(main())


def test_too_many_requests_are_refused_and_taken_again_later(make):
    held = make(max_requests=3)

    async def main():
        held.gate.clear()
        streams = [held.engine.start(ask(f"r{number}", [1, 2])) for number in range(3)]
        with pytest.raises(UnavailableError, match="3 requests are under way"):
            held.engine.start(ask("more", [1, 2]))
        held.gate.set()
        await asyncio.gather(*map(collect, streams))
        await collect(held.engine.start(ask("more", [1, 2])))

    within(main())


def test_many_at_once_leave_room_for_others_and_one_failure_ends_them_all(make):
    held = make(max_requests=6, **ROOMY)
    requests = [ask(f"r{number}", [1, 2, number % 9 + 1], max_tokens=5) for number in range(40)]

    async def main():
        work = asyncio.ensure_future(held.engine.finish_all([(request, None) for request in requests]))
        most = 0
        while not work.done():
            most = max(most, held.engine.num_unfinished)
            await asyncio.sleep(0)
        assert 0 < most <= held.engine.window == 3
        for output, request in zip(work.result(), requests, strict=True):
            check_answer(output, request, max_model_len=4096)
        with pytest.raises(ValueError, match="in use"):
            await held.engine.finish_all([(ask("same", [1], **LONG), None)] * 2)
        await held.idle()

    within(main())


def test_a_slow_consumer_gets_larger_pieces_and_loses_nothing(make):
    held, request = make(**ROOMY), ask("r", [1, 2, 3], max_tokens=300, ignore_eos=True)

    async def main():
        stream, pieces = held.engine.start(request), []
        while events := await stream.take():
            pieces.append(events)
            await asyncio.sleep(0.01)
        assert len(pieces) < 150
        tokens = [token for events in pieces for event in events for token in event.token_ids]
        assert tokens == stream.output.outputs[0].token_ids
        check_answer(stream.output, request, max_model_len=4096)

    within(main())


def test_a_stream_has_one_consumer(make):
    held = make()

    async def main():
        held.gate.clear()
        stream = held.engine.start(ask("r", [1, 2]))
        first = asyncio.ensure_future(stream.take())
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="one consumer"):
            await stream.take()
        held.gate.set()
        assert await first
        await held.engine.finish(stream)

    within(main())


def test_what_can_never_be_served_is_refused_before_it_is_queued(make):
    held = make()

    async def main():
        for prompt in ([], [VOCAB_SIZE], [-1], [1] * 64):
            with pytest.raises(RequestError):
                held.engine.submit(prompt)
        with pytest.raises(RequestError):
            await held.engine.set_priority("r", "high")
        assert held.engine.num_unfinished == 0

    within(main())


def test_an_asker_who_does_not_wait_harms_nobody(make):
    held, request = make(), ask("r", [1, 2])

    async def main():
        held.gate.clear()
        stream = held.engine.start(request)
        question = asyncio.ensure_future(held.engine.metrics())
        await asyncio.sleep(0.02)
        question.cancel()
        await asyncio.wait([question])
        held.gate.set()
        check_answer(await held.engine.finish(stream), request)
        assert not held.engine.has_failed

    within(main())


def test_draining_waits_for_those_under_way_and_takes_no_more(make):
    held, request = make(), ask("r", [1, 2])

    async def main():
        held.gate.clear()
        stream = held.engine.start(request)
        draining = asyncio.ensure_future(held.engine.drain())
        await asyncio.sleep(0.05)
        assert not draining.done()
        with pytest.raises(UnavailableError, match="shutting down"):
            held.engine.start(ask("late", [1]))
        held.gate.set()
        assert await draining is True
        check_answer(await held.engine.finish(stream), request)
        assert not held.engine.has_failed

    within(main())


def test_draining_aborts_whom_it_cannot_wait_for(make):
    held = make(**ROOMY)

    async def main():
        stream = held.engine.start(ask("r", [1, 2], **LONG))
        await stream.take()
        assert await held.engine.drain(0.01) is False
        output = await held.engine.finish(stream)
        assert output.outputs[0].finish_reason == "abort"
        await held.idle()

    within(main())


def test_closing_ends_every_stream_with_an_error(make):
    held = make(**ROOMY)

    async def main():
        streams = [held.engine.start(ask(f"r{number}", [1, 2], **LONG)) for number in range(20)]
        await streams[0].take()
        waiting = [asyncio.ensure_future(held.engine.finish(stream)) for stream in streams]
        await asyncio.to_thread(held.engine.close)
        ends = await asyncio.gather(*waiting, return_exceptions=True)
        assert {type(end) for end in ends} == {UnavailableError}
        with pytest.raises(UnavailableError, match="shut down"):
            await held.engine.metrics()
        assert held.engine.num_unfinished == 0
        assert not held.engine.has_failed

    within(main())


def test_event_loops_in_two_threads_share_an_engine(make):
    held = make(num_blocks=64, num_slots=6)
    failures = list[BaseException]()

    def serve(name: str) -> None:
        requests = [ask(f"{name}{number}", [1 + number % 5, 2], max_tokens=30) for number in range(60)]

        async def main():
            outputs = await asyncio.gather(*[collect(held.engine.start(request)) for request in requests])
            for output, request in zip(outputs, requests, strict=True):
                check_answer(output, request)

        try:
            within(main())
        except BaseException as error:  # noqa: BLE001  told in the test's own thread
            failures.append(error)

    threads = [threading.Thread(target=serve, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(3 * PATIENCE_S)
        assert not thread.is_alive()
    if failures:
        raise failures[0]
    within(held.idle())


def test_a_loop_that_is_closed_takes_its_requests_along(make):
    held = make(**ROOMY)

    async def leave() -> None:
        held.engine.start(ask("lost", [1, 2], **LONG))

    asyncio.run(leave())
    request = ask("kept", [1, 2], max_tokens=10)

    async def main():
        check_answer(await collect(held.engine.start(request)), request, max_model_len=4096)
        await held.idle()

    within(main())


def test_the_last_news_of_a_loop_that_is_closed_leave_nothing_behind(make):
    held = make()

    async def leave() -> None:
        held.gate.clear()
        held.engine.start(ask("lost", [1, 2], max_tokens=1))
        held.gate.set()
        time.sleep(0.05)  # not `await`: the request ends, and the loop is closed before it is told

    for _ in range(5):
        asyncio.run(leave())
        within(held.idle())


@pytest.mark.parametrize(
    "error", [InvariantError("wrong books"), ZeroDivisionError("a bug")], ids=lambda e: type(e).__name__
)
def test_an_engine_that_fails_ends_every_stream_and_says_so(make, error, caplog):
    held = make(**ROOMY)

    async def main():
        streams = [held.engine.start(ask(f"r{number}", [1, 2], **LONG)) for number in range(20)]
        await streams[0].take()
        held.broken = error
        ends = await asyncio.gather(*map(held.engine.finish, streams), return_exceptions=True)
        assert {type(end) for end in ends} == {UnavailableError}
        assert all(type(error).__name__ in str(end) for end in ends)
        assert held.engine.has_failed
        assert type(error).__name__ in held.engine.failure
        assert held.engine.num_unfinished == 0
        for work in (held.engine.generate([1], SamplingParams()), held.engine.metrics()):
            with pytest.raises(UnavailableError, match="restart it"):
                await work
        assert await held.engine.drain(1.0) is True

    within(main())
    assert type(error).__name__ in caplog.text


@pytest.mark.parametrize("where", ["dispatch", "collect"])
def test_a_failing_step_costs_only_those_that_had_begun(make, where):
    held = make(num_slots=2, **ROOMY)
    requests = [ask(f"r{number}", [1, 2, number + 1], max_tokens=200, ignore_eos=True) for number in range(5)]

    async def main():
        streams = [held.engine.start(request) for request in requests]
        await streams[0].take()
        await held.engine.ask(lambda: setattr(held.rig.executor, "fail_next", where))
        ends = await asyncio.gather(*map(held.engine.finish, streams), return_exceptions=True)
        lost = [isinstance(end, DeviceError) for end in ends]
        assert lost == [True, True, False, False, False]
        for end, request in zip(ends[2:], requests[2:], strict=True):
            check_answer(end, request, max_model_len=4096)
        assert not held.engine.has_failed
        await held.idle()

    within(main())


def soak(held: Held, seed: int, num_requests: int, *, failing: bool = False) -> None:
    """Consumers of all kinds; what comes whole is exact, and nothing is left behind."""
    rng = random.Random(seed)
    prefixes = [[rng.randrange(1, VOCAB_SIZE) for _ in range(30)] for _ in range(4)]
    ends = {"whole": 0, "left": 0, "refused": 0, "lost": 0}

    async def consumer(request) -> None:
        await asyncio.sleep(rng.random() * num_requests / 1000)
        way = rng.choice(("stream", "stream", "take", "finish", "leave", "abort", "cancel"))
        try:
            stream = held.engine.start(request)
        except UnavailableError:
            ends["refused"] += 1
            return
        try:
            if way == "stream":
                await collect(stream)
            elif way == "take":
                while await stream.take():
                    await asyncio.sleep(rng.random() / 100)
            elif way == "finish":
                await held.engine.finish(stream)
            elif way == "abort":
                await asyncio.sleep(rng.random() / 50)
                stream.abort()
                await held.engine.finish(stream)
            elif way == "leave":
                async for _ in stream:
                    if rng.random() < 0.2:
                        break
            else:
                await asyncio.wait_for(held.engine.finish(stream), rng.random() / 50)
        except DeviceError:
            assert failing
            ends["lost"] += 1
            return
        except TimeoutError:
            assert way == "cancel"
        output = stream.output
        cut_short = output is None or not output.finished or any(a.finish_reason == "abort" for a in output.outputs)
        assert not cut_short or way in ("abort", "leave", "cancel")
        ends["left" if cut_short else "whole"] += 1
        if not cut_short and not output.error:
            check_request(output, request)

    async def fail_now_and_then() -> None:
        while failing:
            await asyncio.sleep(0.02)
            await held.engine.ask(lambda: setattr(held.rig.executor, "fail_next", rng.choice(("dispatch", "collect"))))

    async def main():
        breaking = asyncio.ensure_future(fail_now_and_then())
        requests = [random_request(rng, f"r{number}", prefixes) for number in range(num_requests)]
        await asyncio.gather(*map(consumer, requests))
        breaking.cancel()
        await held.idle()

    within(main())
    assert sum(ends.values()) == num_requests
    assert ends["whole"] > num_requests / 20, ends  # on a busy machine more are refused


TIGHT = {"num_blocks": 17, "block_size": 4, "num_slots": 6, "budget": 24, "max_model_len": MAX_MODEL_LEN}


@pytest.mark.parametrize("failing", [False, True], ids=["sound", "failing"])
def test_no_consumer_disturbs_another(make, failing):
    soak(make(max_requests=100, **TIGHT), 1, 200, failing=failing)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_no_consumer_disturbs_another_for_long(make, seed):
    soak(make(max_requests=300, **TIGHT), 10 + seed, 2000, failing=seed % 2 == 1)
