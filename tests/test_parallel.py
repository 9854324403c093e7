"""The engine on meshes of emulated devices: the same tokens and log-probabilities as on one device."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.config import SEQUENCE_SCHEMES
from jaxserve.errors import ConfigError
from tests.models import toy

# 8 heads over 2 KV heads, 163 tokens: on most meshes KV heads must be repeated and the vocabulary padded.
CONFIG = toy.CASES["qwen3"]["config"] | {"num_attention_heads": 8, "num_hidden_layers": 2, "vocab_size": 163}
MOE_CONFIG = toy.CASES["qwen2_moe"]["config"] | {"num_attention_heads": 8, "num_hidden_layers": 2, "vocab_size": 163}
RNG = np.random.default_rng(0)
PREFIX = RNG.integers(1, 160, 32).tolist()
PROMPTS = [PREFIX + RNG.integers(1, 160, length).tolist() for length in (3, 5, 19, 8)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, prompt_logprobs=2, logprobs=3)
DRAWN = SamplingParams(
    temperature=1.0, top_p=0.9, top_k=50, seed=5, max_tokens=12, frequency_penalty=0.5, logit_bias={7: 2.0, 150: 3.0}
)
# Two rows at a time, prompts in chunks of 16 tokens, and a pool in which the rows displace each other.
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 96,
    "max_num_seqs": 2,
    "max_num_batched_tokens": 16,
    "num_kv_blocks": 12,
    "block_size": 8,
    "progress": False,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.write_checkpoint(tmp_path_factory.mktemp("qwen3"), CONFIG, seed=3)


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[Any]:
    return answers(checkpoint)


def answers(folder: Path, **sizes: int) -> list[Any]:
    llm = LLM(str(folder), **(OPTIONS | sizes))
    greedy = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], GREEDY)
    drawn = llm.generate([{"prompt_token_ids": p} for p in PROMPTS[:2]], DRAWN)
    metrics = llm.metrics()
    assert metrics["compiles_after_ready"] == 0
    assert metrics["cached_tokens"] > 0
    assert metrics["preemptions"] > 0 or sizes.get("data_parallel_size", 1) > 1
    return [*greedy, *drawn]


def of_size(**sizes: int) -> Any:
    name = "x".join(f"{axis}{size}" for axis, size in sizes.items())
    return pytest.param({f"{axis}_parallel_size": size for axis, size in sizes.items()}, id=name)


FAST = [of_size(tensor=2), of_size(data=2, sequence=2, tensor=2)]
SLOW = [of_size(tensor=8), of_size(sequence=8), of_size(data=8), of_size(sequence=2, tensor=4)]


@pytest.mark.parametrize("sizes", FAST)
def test_answers_do_not_depend_on_the_mesh(sizes: dict[str, int], checkpoint: Path, expected: list[Any]):
    assert_same(answers(checkpoint, **sizes), expected)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", SLOW)
def test_answers_do_not_depend_on_any_mesh(sizes: dict[str, int], checkpoint: Path, expected: list[Any]):
    assert_same(answers(checkpoint, **sizes), expected)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [of_size(data=2, tensor=4)])
def test_the_bundled_model_says_the_same(sizes: dict[str, int]):
    prompts, params = ["def add(a, b):", "class Stack:", "import os\n"], SamplingParams(temperature=0.0, max_tokens=24)
    options = {"dtype": "float32", "max_num_seqs": 2, "max_num_batched_tokens": 64, "progress": False}
    alone, shared = (LLM("tiny", **options, **more).generate(prompts, params) for more in ({}, sizes))
    assert [o.outputs[0].text for o in shared] == [o.outputs[0].text for o in alone]


@pytest.fixture(scope="module")
def moe_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.write_checkpoint(tmp_path_factory.mktemp("qwen2_moe"), MOE_CONFIG, seed=3)


@pytest.fixture(scope="module")
def moe_expected(moe_checkpoint: Path) -> list[Any]:
    return answers(moe_checkpoint)


@pytest.mark.parametrize("sizes", [of_size(expert=4, tensor=2)])
def test_experts_may_be_shared_and_moved(sizes: dict[str, int], moe_checkpoint: Path, moe_expected: list[Any]):
    llm = LLM(str(moe_checkpoint), **OPTIONS, **sizes, num_redundant_experts=4, expert_rebalance_steps=8)
    assert_same(llm.generate([{"prompt_token_ids": p} for p in PROMPTS], GREEDY), moe_expected[: len(PROMPTS)])
    metrics = llm.metrics()
    assert metrics["compiles_after_ready"] == 0
    assert metrics["expert_moves"] > 0
    # Every computed token but those of a last layer that only its row's end needs (none here: all are scored).
    assert np.sum(metrics["expert_tokens"][0]) == MOE_CONFIG["num_experts_per_tok"] * metrics["computed_tokens"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [of_size(expert=8), of_size(data=2, expert=2, tensor=2), of_size(sequence=8)],
)
def test_experts_on_any_mesh(sizes: dict[str, int], moe_checkpoint: Path, moe_expected: list[Any]):
    assert_same(answers(moe_checkpoint, **sizes), moe_expected)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [scheme for scheme in SEQUENCE_SCHEMES if scheme not in ("auto", "ulysses")])
def test_a_prompt_alone_may_be_shared_by_any_scheme(scheme: str, checkpoint: Path, expected: list[Any]):
    options = OPTIONS | {"max_num_seqs": 1, "max_num_batched_tokens": 64, "sequence_parallel_scheme": scheme}
    llm = LLM(str(checkpoint), **options, sequence_parallel_size=4, tensor_parallel_size=2)
    assert_same(llm.generate([{"prompt_token_ids": p} for p in PROMPTS], GREEDY), expected[: len(PROMPTS)])
    metrics = llm.metrics()
    assert metrics["compiles_after_ready"] == 0
    assert metrics["steps_by_scheme"][scheme] >= len(PROMPTS)


def assert_same(actual: list[Any], expected: list[Any]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
        (tokens, values), (expected_tokens, expected_values) = log_probs(one), log_probs(other)
        assert tokens == expected_tokens
        np.testing.assert_allclose(values, expected_values, atol=2e-5)


def log_probs(output: Any) -> tuple[list[int], list[float]]:
    tables = [*(output.prompt_logprobs or ()), *(output.outputs[0].logprobs or ())]
    entries = [item for table in tables if table for item in table.items()]
    return [token for token, _ in entries], [entry.logprob for _, entry in entries]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tensor": 3}, r"8 heads .* cannot be shared evenly by 3 devices.*from 1, 2, 4, 8"),
        ({"tensor": 16}, r"cannot be shared evenly by 16"),
        ({"data": 16}, r"data=16 needs 16 devices, but there are 8"),
        ({"tensor": 0}, r"tensor_parallel_size=0 must be a positive whole number"),
    ],
)
def test_sizes_that_cannot_be(sizes: dict[str, int], message: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("jaxserve.models.weights.load", functools.partial(pytest.fail, "weights were read"))
    with pytest.raises(ConfigError, match=message):
        LLM(str(checkpoint), **OPTIONS, **{f"{axis}_parallel_size": size for axis, size in sizes.items()})
