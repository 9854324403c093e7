"""docs/grafana.json and docs/metrics.md against what /metrics says."""

import json
import re
import sys
from pathlib import Path

import httpx
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import metrics_table

ROOT = Path(__file__).resolve().parents[2]
NAME = re.compile(r"\b(?:vllm|jaxserve):\w+|\bprocess_\w+")
DASHBOARD = json.loads((ROOT / "docs" / "grafana.json").read_text())
# What vLLM's own dashboards (examples/online_serving of its repository) and routers read, as far as it is known here.
READ_BY_OTHERS = [
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:gpu_cache_usage_perc",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:num_preemptions_total",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:request_success_total",
    "vllm:cache_config_info",
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:time_to_first_token_seconds_sum",
    "vllm:time_to_first_token_seconds_count",
    "vllm:time_per_output_token_seconds_bucket",
    "vllm:inter_token_latency_seconds_bucket",
    "vllm:e2e_request_latency_seconds_bucket",
    "vllm:e2e_request_latency_seconds_sum",
    "vllm:request_queue_time_seconds_sum",
    "vllm:request_prefill_time_seconds_sum",
    "vllm:request_decode_time_seconds_sum",
    "vllm:request_inference_time_seconds_sum",
    "vllm:request_prompt_tokens_bucket",
    "vllm:request_generation_tokens_bucket",
    "vllm:request_params_n_bucket",
    "vllm:request_params_max_tokens_bucket",
    "vllm:request_max_num_generation_tokens_bucket",
    "vllm:iteration_tokens_total_bucket",
    "vllm:request_time_per_output_token_seconds_bucket",
]


@pytest.fixture(scope="module")
def exposed(server):
    """Name of each sample -> its labels."""
    body = {"prompt": "ab", "max_tokens": 2, "client": "team-a"}
    assert httpx.post(f"{server.url}/v1/completions", json=body).status_code == 200
    text = httpx.get(f"{server.url}/metrics").text
    samples = re.findall(r"^([\w:]+)(?:\{(.*)\})? ", text, re.MULTILINE)
    return {name: set(re.findall(r'(\w+)="', labels)) for name, labels in samples}


def expressions():
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]
    for variable in DASHBOARD["templating"]["list"]:
        yield variable["name"], variable["query"]


def test_each_expression_reads_what_is_there(exposed):
    read = {name for _, text in expressions() for name in NAME.findall(text)}
    assert len(read) > 40
    assert not read - exposed.keys()


def test_each_selector_names_labels_that_are_there(exposed):
    for title, text in expressions():
        for name, selector in re.findall(r"((?:vllm|jaxserve):\w+)\{([^}]*)\}", text):
            labels = set(re.findall(r'(\w+)(?:=~|!=|=)"', selector)) - {"job"}  # which the scraper adds
            assert labels <= exposed[name], (title, name)
        for by in re.findall(r"by \(([\w, ]+)\)", text):
            names = [name for name in NAME.findall(text) if name.startswith(("vllm", "jaxserve"))]
            assert all(set(by.replace(" ", "").split(",")) <= exposed[name] for name in names), (title, text)


def test_brackets_are_balanced_and_panels_do_not_overlap():
    for title, text in expressions():
        for opening, closing in ("()", "[]", "{}"):
            assert text.count(opening) == text.count(closing), title
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in DASHBOARD["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_what_dashboards_and_routers_of_vllm_read_is_there(exposed):
    assert not set(READ_BY_OTHERS) - exposed.keys()


def test_the_table_is_of_these_metrics(exposed):
    text = (ROOT / "docs" / "metrics.md").read_text()
    assert text == metrics_table.document(), "run scripts/metrics_table.py --write"
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in exposed if ":" in name}
    assert families == set(re.findall(r"^\| `([\w:]+)`", text, re.MULTILINE))
