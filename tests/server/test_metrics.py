"""/metrics against the work that was done."""

import asyncio
import threading

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families as parse

from jaxserve.server.app import create_app
from jaxserve.server.catalogue import ENGINE, TRAFFIC, Reading
from jaxserve.server.config import ServerConfig
from jaxserve.server.metrics import Metrics
from jaxserve.server.traffic import Traffic
from jaxserve.tally import Client, Tally

BODY = {"model": "tiny", "prompt": "def add(a, b):", "max_tokens": 12, "temperature": 0, "ignore_eos": True}


class Scrape:
    """One answer of /metrics, as Prometheus reads it."""

    def __init__(self, url: str):
        response = httpx.get(f"{url}/metrics")
        assert response.headers["content-type"].startswith("text/plain; version=")
        self.families = {family.name: family for family in parse(response.text)}

    def __call__(self, name: str, **labels: str) -> float:
        """The sum of all samples of this name with these labels."""
        samples = [sample for family in self.families.values() for sample in family.samples if sample.name == name]
        return sum(s.value for s in samples if labels.items() <= s.labels.items())


def growth(before: Scrape, after: Scrape):
    return lambda name, **labels: after(name, **labels) - before(name, **labels)


@pytest.fixture(scope="module")
def grown(server):
    """What three requests change: one answer, two answers as a stream, and two prompts at once, 12 tokens each."""
    before = Scrape(server.url)
    usages = []
    with httpx.Client(base_url=server.url, headers={"x-client": "team-a"}) as client:
        usages.append(client.post("/v1/completions", json=BODY).json()["usage"])
        both = BODY | {"n": 2, "temperature": 1, "seed": 1, "stream": True, "stream_options": {"include_usage": True}}
        lines = client.post("/v1/completions", json=both).text.split("\n\n")
        usages.append(httpx.Response(200, text=lines[-3].removeprefix("data: ")).json()["usage"])
        usages.append(client.post("/v1/completions", json=BODY | {"prompt": ["ab", "cd"]}).json()["usage"])
    return growth(before, Scrape(server.url)), usages


def test_tokens_are_those_that_were_charged(grown):
    grew, usages = grown
    assert grew("vllm:prompt_tokens_total") == sum(usage["prompt_tokens"] for usage in usages)
    assert grew("vllm:generation_tokens_total") == sum(usage["completion_tokens"] for usage in usages) == 5 * 12
    assert grew("jaxserve:client_prompt_tokens_total", client="team-a") == grew("vllm:prompt_tokens_total")
    assert grew("jaxserve:client_output_tokens_total", client="team-a") == 60
    assert grew("jaxserve:client_requests_total", client="team-a") == 4


def test_each_answer_ends_once_and_each_request_is_timed_once(grown):
    grew, _ = grown
    assert grew("vllm:request_success_total", finished_reason="length") == grew("vllm:request_success_total") == 5
    for name in ("e2e_request_latency", "request_queue_time", "request_prefill_time", "request_decode_time"):
        assert grew(f"vllm:{name}_seconds_count") == 4
    assert grew("vllm:time_to_first_token_seconds_count") == 4
    assert grew("vllm:inter_token_latency_seconds_count") == 5 * 11
    assert grew("vllm:request_generation_tokens_sum") == 60
    assert grew("vllm:request_params_n_sum") == 5
    assert grew("vllm:request_params_max_tokens_sum") == 4 * 12


def test_phases_of_requests_add_up(grown):
    grew, _ = grown
    phases = ("queue_time", "prefill_time", "decode_time")
    total = sum(grew(f"vllm:request_{phase}_seconds_sum") for phase in phases)
    assert total == pytest.approx(grew("vllm:e2e_request_latency_seconds_sum"), rel=1e-6)
    # The first answer of n=2 ends a step before the second at most, so gaps fill the time between tokens but for that.
    assert grew("vllm:inter_token_latency_seconds_sum") > 0.9 * grew("vllm:request_decode_time_seconds_sum")


def test_steps_and_their_tokens_are_those_of_the_engine(grown):
    grew, _ = grown
    assert grew("vllm:iteration_tokens_total_count") == grew("jaxserve:steps_total") > 12
    assert grew("vllm:iteration_tokens_total_sum") == grew("jaxserve:computed_tokens_total")
    assert grew("jaxserve:step_seconds_count", part="wait") == grew("jaxserve:steps_total")
    assert grew("jaxserve:step_seconds_sum", part="wait") > 0
    assert grew("jaxserve:compiles_after_ready_total") == 0
    assert grew("jaxserve:compiles_total") == 0
    assert grew("jaxserve:http_requests_total", route="/v1/completions", method="POST", status="200") == 3


def test_prompts_from_the_cache_count_as_hits(server):
    long = BODY | {"prompt": list(range(40, 140)), "max_tokens": 1}
    httpx.post(f"{server.url}/v1/completions", json=long)
    before = Scrape(server.url)
    usage = httpx.post(f"{server.url}/v1/completions", json=long).json()["usage"]
    grew = growth(before, Scrape(server.url))
    assert grew("vllm:prefix_cache_hits_total") == usage["prompt_tokens_details"]["cached_tokens"] > 0
    assert grew("vllm:prefix_cache_queries_total") == 100


def test_labels_say_which_model_and_how_its_cache_is_made(server):
    scrape = Scrape(server.url)
    assert scrape("vllm:num_requests_running", model_name="tiny", engine="0") == 0
    (info,) = scrape.families["vllm:cache_config_info"].samples
    assert info.labels["block_size"] == str(server.engine.counts()["block_size"])
    assert int(info.labels["num_gpu_blocks"]) == server.engine.counts()["num_kv_blocks"]


def test_names_keep_their_colons_whatever_a_scraper_prefers(server):
    accept = "application/openmetrics-text;version=1.0.0;escaping=underscores,text/plain;version=1.0.0;q=0.5"
    response = httpx.get(f"{server.url}/metrics", headers={"accept": accept})
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "\nvllm:prompt_tokens_total{" in response.text


def test_an_aborted_answer_is_counted_but_not_timed(server):
    before = Scrape(server.url)
    with httpx.stream(
        "POST", f"{server.url}/v1/completions", json=BODY | {"max_tokens": 200, "stream": True}
    ) as stream:
        next(stream.iter_lines())
    for _ in range(200):
        grew = growth(before, Scrape(server.url))
        if grew("vllm:request_success_total"):
            break
    assert grew("vllm:request_success_total", finished_reason="abort") == 1
    assert grew("vllm:e2e_request_latency_seconds_count") == 0
    assert grew("jaxserve:http_requests_total", status="499") == 1


def test_while_work_is_under_way_it_shows_and_afterwards_nothing_is_left(server):
    async def look(scrapes):
        long = BODY | {"max_tokens": 150, "stream": True}
        url = f"{server.url}/v1/completions"
        async with httpx.AsyncClient() as client, client.stream("POST", url, json=long) as stream:
            lines = stream.aiter_lines()
            await anext(lines)
            scrapes.append(await asyncio.to_thread(Scrape, server.url))
            async for _ in lines:
                pass

    scrapes: list[Scrape] = []
    asyncio.run(look(scrapes))
    busy, idle = scrapes[0], Scrape(server.url)
    gauges = ("vllm:num_requests_running", "vllm:kv_cache_usage_perc", "jaxserve:unfinished_requests")
    for name in (*gauges, "jaxserve:http_streams_open", "jaxserve:client_running"):
        assert (busy(name) > 0, idle(name)) == (True, 0), name
    assert busy("vllm:gpu_cache_usage_perc") == busy("vllm:kv_cache_usage_perc") < 1


def test_paths_and_methods_from_outside_are_no_labels(server):
    before = Scrape(server.url)
    for number in range(6):
        httpx.request("PROPFIND" if number % 2 else "GET", f"{server.url}/no-such-path-{number}")
    after = Scrape(server.url)
    assert growth(before, after)("jaxserve:http_requests_total", route="none") == 6
    samples = after.families["jaxserve:http_requests"].samples
    assert {sample.labels["method"] for sample in samples} <= {"DELETE", "GET", "POST", "other"}
    assert not any("no-such" in sample.labels["route"] for sample in samples)


def test_two_apps_in_one_process_do_not_mix(engine):
    first, second = (create_app(ServerConfig(), (name,), engine).state.server for name in ("one", "two"))
    first.traffic.ended("/x", "GET", 200)
    one, two = (state.metrics.exposed().decode() for state in (first, second))
    assert 'route="/x"' in one and 'route="/x"' not in two
    assert 'model_name="one"' in one and 'model_name="one"' not in two
    listeners = len(engine.listeners)
    first.release()
    second.release()
    assert len(engine.listeners) == listeners - 2 * 3


def test_before_the_engine_is_loaded_there_is_something_to_see():
    exposed = Metrics("tiny", Traffic()).exposed().decode()
    names = {family.name for family in parse(exposed)}
    assert "jaxserve:http_requests_open" in names
    assert not any(name.startswith("vllm:") for name in names)


def test_reading_and_counting_at_once_fails_nobody():
    """Reads come from another thread than counts."""
    tally, is_over = Tally(100), threading.Event()
    entries = [entry for entry in ENGINE if entry.labels == ("client",) and entry.name.endswith("_total")]
    number = 0

    def count() -> None:
        nonlocal number
        while not is_over.is_set():
            tally._count(f"name-{number}", Client(requests=1))
            number += 1

    thread = threading.Thread(target=count)
    thread.start()
    try:
        for _ in range(300):
            for entry in entries:
                assert len(entry.read(Reading(None, {}, tally))) <= 101
    finally:
        is_over.set()
        thread.join()
    assert number > 300


def test_names_are_unique_and_counters_end_in_total():
    entries = (*ENGINE, *TRAFFIC)
    assert len({entry.name for entry in entries}) == len(entries)
    for entry in entries:
        assert entry.name.endswith("_total") or entry.kind != "counter"
        assert entry.text and entry.text[0].isupper() and not entry.text.endswith(".")
