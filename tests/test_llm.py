"""The whole engine on toy checkpoints: the same tokens whatever the batch, the cache, the overlap or the memory."""

import dataclasses
import json
import os
import signal
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.errors import CapacityError, CheckpointError, ConfigError, DeviceError, RequestError
from jaxserve.executor.ladder import Rung
from jaxserve.output import Event
from jaxserve.pallas_kernels.matmul import cpu
from jaxserve.pallas_kernels.ragged_paged_attention import cpu as native_attention
from jaxserve.request import Task
from tests.models import toy

CASE = "llama3"
GREEDY = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
# One set of shapes for all engines here, so that they share compiled programs.
OPTIONS = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "block_size": 8, "progress": False}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("toy")
    toy.write_checkpoint(path, toy.CASES[CASE]["config"], toy.CASES[CASE]["seed"])
    return path


@pytest.fixture(scope="session")
def llm(folder: Path) -> LLM:
    return LLM(folder, num_kv_blocks=128, **OPTIONS)


@pytest.fixture(scope="session")
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(toy.golden_path(CASE)))


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    shared = rng.integers(0, 160, 30).tolist()
    fresh = [rng.integers(0, 160, int(rng.integers(1, 60))).tolist() for _ in range(count)]
    return [shared[: int(rng.integers(0, 31))] + tail for tail in fresh]


def tokens(outputs) -> list[list[int]]:
    return [answer.token_ids for output in outputs for answer in output.outputs]


@pytest.fixture(scope="session")
def alone(llm: LLM) -> list[list[int]]:
    """Greedy answers, each computed by itself."""
    return [tokens(llm.generate(p, GREEDY))[0] for p in prompts(12)]


def test_greedy_tokens_and_logprobs_equal_transformers(llm: LLM, golden):
    ids = golden["prompt_token_ids"].tolist()
    params = dataclasses.replace(GREEDY, prompt_logprobs=5, logprobs=5)
    output = llm.generate(ids, params)[0]
    assert output.outputs[0].token_ids == golden["greedy_token_ids"].tolist()
    logits = golden["logits"].astype(np.float64)
    expected = (
        logits
        - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        - logits.max(1, keepdims=True)
    )
    assert output.prompt_logprobs[0] is None
    for position, table in enumerate(output.prompt_logprobs[1:]):
        assert ids[position + 1] in table
        best = sorted(table.items(), key=lambda item: item[1].rank)[0]
        assert best[0] == int(np.argmax(logits[position]))
        for token, entry in table.items():
            assert abs(entry.logprob - expected[position, token]) < 1e-4
    first = output.outputs[0].logprobs[0][output.outputs[0].token_ids[0]]
    assert abs(first.logprob - expected[-1].max()) < 1e-4
    assert first.rank == 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"enable_prefix_caching": False},
        {"async_scheduling": False},
        {"num_kv_blocks": 24, "max_model_len": 192},  # a third of what four sequences want: preempts
        {"scheduling_policy": "priority", "num_kv_blocks": 24, "max_model_len": 192, "async_scheduling": False},
        pytest.param({"attention_backend": "ref"}, marks=pytest.mark.slow),
    ],
    ids=lambda options: ",".join(f"{k}={v}" for k, v in options.items()) or "default",
)
def test_tokens_do_not_depend_on_batch_cache_overlap_or_memory(folder: Path, alone, options):
    engine = LLM(folder, **({"num_kv_blocks": 128} | OPTIONS | options))
    for _ in range(2):  # the second time the cache is warm
        assert tokens(engine.generate(prompts(12), GREEDY)) == alone
    metrics = engine.metrics()
    assert metrics["kv_blocks_held"] == 0
    assert (metrics["preemptions"] > 0) == ("num_kv_blocks" in options)
    assert (metrics["cached_tokens"] > 0) == options.get("enable_prefix_caching", True) or metrics["preemptions"] > 0


@pytest.mark.slow
def test_the_engine_on_interpreted_tpu_kernels_gives_the_same_tokens(folder: Path):
    small = OPTIONS | {"max_num_seqs": 2, "max_num_batched_tokens": 32, "max_model_len": 128, "block_size": 16}
    params = dataclasses.replace(GREEDY, max_tokens=6)
    answers = []
    for backend in ("tpu", "xla"):
        engine = LLM(folder, **small, num_kv_blocks=64, attention_backend=backend)
        assert engine.metrics()["attention_backend"] == backend
        answers.append(tokens(engine.generate(prompts(3), params)))
    assert answers[0] == answers[1]


def test_nothing_compiles_after_ready(llm: LLM):
    kinds = [
        GREEDY,
        SamplingParams(temperature=0.8, top_p=0.9, top_k=20, min_p=0.01, seed=1),
        SamplingParams(n=3, repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.5, logprobs=3),
        SamplingParams(logit_bias={5: 4.0}, allowed_token_ids=list(range(100)), prompt_logprobs=2, min_tokens=3),
    ]
    batch = prompts(20, seed=3)
    llm.generate(batch, [kinds[i % len(kinds)] for i in range(len(batch))])
    llm.score([1, 2, 3], [[4, 5], [6]])
    llm.embed([[1, 2, 3], [4]])
    assert llm.metrics()["compiles_after_ready"] == 0


def test_sampled_tokens_depend_on_the_seed_alone(llm: LLM):
    params = SamplingParams(temperature=1.5, seed=7, max_tokens=20, top_p=0.95)
    one = tokens(llm.generate([3, 1, 4], params))
    crowd = tokens(llm.generate([*prompts(6, seed=5), [3, 1, 4]], params))
    assert crowd[-1] == one[0]
    assert tokens(llm.generate([3, 1, 4], dataclasses.replace(params, seed=8))) != one
    several = llm.generate([3, 1, 4], dataclasses.replace(params, n=4))[0]
    assert len({tuple(answer.token_ids) for answer in several.outputs}) == 4
    assert several.outputs[0].token_ids == one[0]


def test_sampling_options_reach_the_device(llm: LLM):
    def answer(**options) -> list[int]:
        return tokens(llm.generate([9, 8, 7], SamplingParams(max_tokens=30, ignore_eos=True, **options)))[0]

    greedy = answer(temperature=0.0)
    assert set(answer(temperature=2.0, seed=0, allowed_token_ids=[3, 5])) <= {3, 5}
    assert set(answer(temperature=0.0, logit_bias={11: 100.0})) == {11}
    assert answer(temperature=5.0, top_k=1, seed=0) == greedy
    assert answer(temperature=5.0, top_p=1e-6, seed=0) == greedy
    assert answer(temperature=5.0, min_p=1.0, seed=0) == greedy
    repeated = answer(temperature=0.0, frequency_penalty=2.0, presence_penalty=2.0)
    assert len(set(repeated)) > len(set(greedy))
    assert len(answer(temperature=0.0, stop_token_ids=[greedy[4]])) == greedy.index(greedy[4]) + 1
    assert len(answer(temperature=0.0, stop_token_ids=[greedy[0]], min_tokens=7)) >= 7


def test_score_is_the_sum_of_prompt_logprobs(llm: LLM, golden):
    ids = golden["prompt_token_ids"].tolist()
    logits = golden["logits"].astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    expected = sum(logprobs[i, ids[i + 1]] for i in range(19, 39))
    scores = llm.score(ids[:20], [ids[20:], ids[20:25]])
    assert abs(scores[0].logprob - expected) < 1e-3
    assert scores[1].token_logprobs == pytest.approx(scores[0].token_logprobs[:5], abs=1e-4)
    best = [int(np.argmax(logits[19]))]
    assert llm.score(ids[:20], [best])[0].is_greedy


def test_embeddings_have_length_one_and_do_not_depend_on_the_batch(llm: LLM):
    batch = prompts(5, seed=9)
    together = llm.embed(batch)
    assert together.shape == (5, 64)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(together[3], llm.embed([batch[3]])[0], atol=1e-5)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "empty"),
        ([160], "outside the vocabulary"),
        ([-1], "outside the vocabulary"),
        ([1] * 512, "max_model_len=512"),
        ([1.5], "whole-number"),
        ("text", "no tokenizer"),
        ({"nonsense": 1}, "no tokenizer"),
        ([[1, 2], ["a"]], "whole-number"),
    ],
)
def test_a_bad_prompt_is_one_clear_error_and_harms_nothing(llm: LLM, prompt, message: str):
    with pytest.raises(RequestError, match=message):
        llm.generate([prompt] if isinstance(prompt, list) and not prompt else prompt, GREEDY)
    assert llm.metrics()["num_waiting"] == 0


def test_one_bad_prompt_in_a_batch_starts_none(llm: LLM):
    before = llm.metrics()["steps"]
    with pytest.raises(RequestError):
        llm.generate([[1, 2], [999]], GREEDY)
    assert llm.metrics()["steps"] == before


def test_bad_options_are_refused_before_weights_are_read(folder: Path):
    with pytest.raises(ConfigError, match="Did you mean 'max_model_len'"):
        LLM(folder, max_model_length=3)
    with pytest.raises(ConfigError, match="beyond the 512 positions"):
        LLM(folder, max_model_len=513)
    with pytest.raises(CapacityError, match="needs 64 KV blocks, but there is room for 10"):
        LLM(folder, max_model_len=512, num_kv_blocks=10, block_size=8)
    with pytest.raises(ConfigError, match="attention_backend='flash' does not exist"):
        LLM(folder, attention_backend="flash")
    with pytest.raises(ConfigError, match=r"attention_backend='gpu' cannot run this model here: .*Hopper"):
        LLM(folder, attention_backend="gpu")
    with pytest.raises(CheckpointError, match="no folder"):
        LLM("no/such/folder")


def test_leaving_a_stream_early_frees_everything(llm: LLM, alone):
    for event in llm.stream_events([1, 2, 3], GREEDY):
        if len(event.output.outputs[0].token_ids) > 3:
            break
    del event
    assert tokens(llm.generate(prompts(12)[0], GREEDY))[0] == alone[0]
    assert llm.metrics()["kv_blocks_held"] == 0


def test_an_interrupt_leaves_the_engine_usable(llm: LLM, alone):
    def interrupt() -> None:
        while not llm.metrics()["num_running"]:  # earlier, Python may lose it in a callback of its garbage collector
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        llm.generate(prompts(12) * 100, dataclasses.replace(GREEDY, max_tokens=200))
    assert llm.metrics()["num_running"] == llm.metrics()["num_waiting"] == 0
    assert tokens(llm.generate(prompts(12)[:2], GREEDY)) == alone[:2]
    assert llm.metrics()["kv_blocks_held"] == 0


@pytest.mark.parametrize("async_scheduling", [True, False])
@pytest.mark.parametrize("where", ["dispatch", "collect"])
def test_a_failing_step_is_one_clear_error_and_the_engine_goes_on(
    llm: LLM, folder: Path, alone, monkeypatch, where: str, async_scheduling: bool
):
    engine = llm if async_scheduling else LLM(folder, num_kv_blocks=128, async_scheduling=False, **OPTIONS)
    before = engine.metrics()["failed_steps"]
    fail_once(engine, monkeypatch, where, after=3)
    with pytest.raises(DeviceError, match=r"out of device memory .*Lower memory_utilization"):
        engine.generate(prompts(12), GREEDY)
    metrics = engine.metrics()
    assert (metrics["kv_blocks_held"], metrics["num_running"], metrics["num_waiting"]) == (0, 0, 0)
    assert metrics["failed_steps"] == before + 1
    assert tokens(engine.generate(prompts(12), GREEDY)) == alone
    assert engine.metrics()["compiles_after_ready"] == 0


def fail_once(engine: LLM, monkeypatch: pytest.MonkeyPatch, where: str, after: int) -> None:
    """Let a step fail that has taken the state: at once, or when its tokens are fetched."""
    compiled, left = engine._built.executor._compiled, [after]

    def failing(step):
        def run(*args):
            outputs, state = step(*args)
            left[0] -= 1
            if not left[0] and where == "dispatch":
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.\nmore")
            if not left[0]:
                outputs = dataclasses.replace(outputs, token_s=Unfetchable())
            return outputs, state

        return run

    for rung in [key for key in compiled if isinstance(key, Rung)]:
        monkeypatch.setitem(compiled, rung, failing(compiled[rung]))


class Unfetchable:
    """The output of a step that ran out of memory while it ran."""

    def __array__(self, *args, **kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 7 bytes.")


def test_two_engines_and_two_threads(llm: LLM, folder: Path, alone):
    other = LLM(folder, num_kv_blocks=128, **OPTIONS)
    answers: dict[int, list[list[int]]] = {}

    def work(index: int, engine: LLM) -> None:
        answers[index] = tokens(engine.generate(prompts(12)[:4], GREEDY))

    threads = [threading.Thread(target=work, args=(i, engine)) for i, engine in enumerate([llm, other, llm])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == dict.fromkeys(range(3), alone[:4])


def test_streams_may_be_interleaved(llm: LLM, alone):
    first, second = (llm.stream_events(p, GREEDY) for p in prompts(12)[:2])
    got: list[list[int]] = [[], []]
    for one, two in zip(first, second, strict=True):
        got[0] += one.token_ids
        got[1] += two.token_ids
    assert got == alone[:2]


def drain(llm: LLM) -> list[Event]:
    events = []
    while llm.has_work:
        events += llm.step()
    return events


def test_submitted_requests_answer_step_by_step_as_generate_does(llm: LLM, alone):
    names = {llm.submit(prompt, GREEDY): place for place, prompt in enumerate(prompts(12))}
    answers: list[list[int]] = [[] for _ in alone]
    for event in drain(llm):
        answers[names[event.request_id]] += event.token_ids
    assert answers == alone
    assert llm.step() == []


def test_the_priority_of_a_submitted_request_can_be_changed(llm: LLM):
    name = llm.submit([1, 2, 3], GREEDY)
    llm.set_priority(name, -2.5)
    llm.set_priority("unknown", 1)
    assert [view.priority for view in llm._engine.scheduler.waiting] == [-2.5]
    drain(llm)


def test_submitted_requests_run_while_others_call_generate(llm: LLM, alone):
    name = llm.submit(prompts(12)[0], GREEDY)
    assert tokens(llm.generate(prompts(12)[1:], GREEDY)) == alone[1:]
    events = drain(llm)
    assert {event.request_id for event in events} == {name}
    assert [token for event in events for token in event.token_ids] == alone[0]


def test_an_abort_ends_one_answer_or_all_and_the_last_events_say_so(llm: LLM):
    name = llm.submit([1, 2, 3], dataclasses.replace(GREEDY, n=3))
    while not llm.step():
        pass
    llm.abort(name, index=1)
    (event,) = llm.step()
    assert (event.index, event.finish_reason, event.output.finished) == (1, "abort", False)
    llm.abort(name)
    assert [(e.index, e.finish_reason, e.output.finished) for e in llm.step()] == [
        (0, "abort", True),
        (2, "abort", True),
    ]
    llm.abort(name)
    llm.abort("nobody")
    assert not llm.has_work
    assert llm.metrics()["kv_blocks_held"] == 0


def test_a_refused_submission_leaves_nothing(llm: LLM):
    with pytest.raises(RequestError, match="outside the vocabulary"):
        llm.submit([160])
    with pytest.raises(RequestError, match="unknown request field 'colour'"):
        llm.submit([1], meta={"colour": 1})
    assert not llm.has_work


def test_a_failed_step_tells_who_submitted(llm: LLM, monkeypatch):
    fail_once(llm, monkeypatch, "dispatch", after=2)
    name = llm.submit([1, 2, 3], GREEDY)
    events = drain(llm)
    assert (events[-1].request_id, events[-1].finish_reason) == (name, "error")
    assert "out of device memory" in events[-1].output.error


def test_embeddings_can_be_submitted(llm: LLM):
    llm.submit([5, 6], task=Task.EMBED)
    np.testing.assert_allclose(drain(llm)[-1].output.hidden, llm.embed([[5, 6]], normalize=False)[0], atol=1e-5)


@pytest.mark.slow
def test_prefill_without_chunks(folder: Path, alone):
    engine = LLM(
        folder,
        num_kv_blocks=128,
        **(OPTIONS | {"max_num_batched_tokens": 132}),
        max_model_len=128,
        enable_chunked_prefill=False,
    )
    short = dataclasses.replace(GREEDY, max_tokens=20)
    assert tokens(engine.generate(prompts(12), short)) == [answer[:20] for answer in alone]


def test_dummy_weights_need_no_files(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(toy.CASES[CASE]["config"]))
    engine = LLM(tmp_path, load_format="dummy", num_kv_blocks=64, **OPTIONS)
    assert len(tokens(engine.generate([1, 2], GREEDY))[0]) == 64


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_narrow_floats_stay_close(folder: Path, golden, dtype: str):
    engine = LLM(folder, num_kv_blocks=128, dtype=dtype, **OPTIONS)
    ids = golden["prompt_token_ids"].tolist()
    output = engine.generate(ids, dataclasses.replace(GREEDY, prompt_logprobs=1, max_tokens=4))[0]
    logits = golden["logits"].astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    errors = [abs(t[ids[i + 1]].logprob - logprobs[i, ids[i + 1]]) for i, t in enumerate(output.prompt_logprobs[1:])]
    assert np.median(errors) < 0.1
    assert engine.metrics()["dtype"] == dtype


@pytest.mark.slow
def test_a_float8_pool_takes_a_quarter_and_stays_close():
    options = OPTIONS | {"num_kv_blocks": 64, "max_model_len": 256}
    exact, rounded = (LLM("tiny", kv_cache_dtype=name, **options) for name in ("auto", "fp8"))
    assert rounded.metrics()["kv_cache_dtype"] == "float8_e4m3fn"
    assert rounded.metrics()["attention_backend"] == "xla"
    assert rounded.metrics()["kv_pool_bytes"] * 4 == exact.metrics()["kv_pool_bytes"]
    begin, rest = "def add(a, b):\n    ", '"""Return the sum of both arguments."""\n    return a + b\n'
    logprobs = [engine.score(begin, [rest])[0].token_logprobs for engine in (exact, rounded)]
    errors = np.abs(np.subtract(*logprobs))
    assert 0 < np.median(errors) < 0.1, errors


def test_our_own_kernels_give_the_same_model(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu, "_MIN_WEIGHTS", 0)
    vectors = {}
    for native in (False, True):
        engine = LLM(folder, num_kv_blocks=128, dtype="bfloat16", native_kernels=native, **OPTIONS)
        expected = "cpu" if native and not cpu.refusal() else "xla"
        assert engine.metrics()["matmul_backend"] == engine.metrics()["attention_backend"] == expected
        vectors[native] = engine.embed(prompts(6))
    np.testing.assert_allclose(vectors[True], vectors[False], atol=0.02)


def test_metrics_tell_what_runs(llm: LLM):
    start = time.perf_counter()
    output = llm.generate([5, 6, 7], GREEDY)[0]
    assert start <= output.metrics.arrival_s <= output.metrics.first_token_s <= output.metrics.finished_s
    metrics = llm.metrics()
    float32 = jnp.dtype("float32")
    assert metrics["attention_backend"] == ("xla" if native_attention.refusal(float32, float32, 64) else "cpu")
    assert metrics["matmul_backend"] == "xla"  # ours is for bfloat16
    assert metrics["backend"] == "cpu"
    assert metrics["num_kv_blocks"] == 128
