"""Every check of engine options, and what happens with a name that does not exist."""

import dataclasses
import math
import re
from pathlib import Path

import pytest

from jaxserve.config import SCHEDULING_POLICIES, EngineConfig, cache_folder, reject_unknown
from jaxserve.errors import ConfigError

REFUSED = [
    ("dtype", "float64", "dtype='float64' must be one of auto, float32, bfloat16, float16"),
    ("dtype", None, "dtype=None"),
    ("kv_cache_dtype", "int3", "kv_cache_dtype='int3'"),
    ("load_format", "pickle", "load_format='pickle' must be one of auto, dummy"),
    ("scheduling_policy", "sjf", f"scheduling_policy='sjf' must be one of {', '.join(SCHEDULING_POLICIES)}"),
    ("max_model_len", 0, "max_model_len=0 must be a positive whole number"),
    ("max_model_len", "4096", "max_model_len='4096'"),
    ("max_num_seqs", True, "max_num_seqs=True"),
    ("max_num_seqs", None, "max_num_seqs=None"),
    ("max_num_seqs", 5000, "max_num_seqs=5000 must be at most 4096"),
    ("max_num_batched_tokens", -1, "max_num_batched_tokens=-1"),
    ("max_num_batched_tokens", 1.0, "max_num_batched_tokens=1.0"),
    ("num_kv_blocks", 1 << 40, f"num_kv_blocks={1 << 40}"),
    ("block_size", 24, "block_size=24 must be a power of two from 8 to 256"),
    ("block_size", 4, "block_size=4"),
    ("block_size", "32", "block_size='32'"),
    ("memory_utilization", 0, "memory_utilization=0 must be above 0 and at most 1"),
    ("memory_utilization", 90, "memory_utilization=90"),
    ("memory_utilization", math.nan, "memory_utilization=nan"),
    ("memory_utilization", True, "memory_utilization=True"),
    ("memory_utilization", "0.9", "memory_utilization='0.9'"),
    ("enable_prefix_caching", 1, "enable_prefix_caching=1 must be True or False"),
    ("enable_chunked_prefill", "no", "enable_chunked_prefill='no'"),
    ("async_scheduling", None, "async_scheduling=None"),
    ("progress", 0, "progress=0"),
    ("attention_backend", 3, "attention_backend=3 must be a string or None"),
    ("compilation_cache", True, "compilation_cache=True must be a string or None"),
    ("seed", 1.5, "seed=1.5"),
    ("seed", True, "seed=True"),
    ("seed", 1 << 64, f"seed={1 << 64}"),
    ("tensor_parallel_size", 1.5, "tensor_parallel_size=1.5 must be a positive whole number"),
    ("tensor_parallel_size", True, "tensor_parallel_size=True"),
    ("data_parallel_size", 0, "data_parallel_size=0"),
    ("sequence_parallel_size", None, "sequence_parallel_size=None"),
    ("expert_parallel_size", -1, "expert_parallel_size=-1"),
    ("num_redundant_experts", -1, "num_redundant_experts=-1 must be a whole number"),
    ("expert_rebalance_steps", True, "expert_rebalance_steps=True"),
    ("sequence_parallel_scheme", "star", "sequence_parallel_scheme='star' must be one of auto, ulysses"),
    ("quantization", "int8", "quantization='int8' is not supported yet"),
]


@pytest.mark.parametrize(("name", "value", "message"), REFUSED, ids=lambda v: f"{v!s:.20}")
def test_a_wrong_option_is_refused_with_its_name_and_value(name, value, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        EngineConfig(**{name: value})


def test_every_option_has_a_help_text_and_its_default_is_accepted():
    config = EngineConfig()
    for field in dataclasses.fields(config):
        assert field.metadata["help"]
        assert dataclasses.replace(config, **{field.name: getattr(config, field.name)}) == config


@pytest.mark.parametrize("field", dataclasses.fields(EngineConfig), ids=lambda f: f.name)
def test_no_option_accepts_an_object_of_another_kind(field):
    with pytest.raises(ConfigError, match=field.name):
        EngineConfig(**{field.name: [1]})


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("max_model_length", "max_model_len"),
        ("max_num_seq", "max_num_seqs"),
        ("tensor_paralel_size", "tensor_parallel_size"),
        ("dytpe", "dtype"),
    ],
)
def test_a_misspelt_option_suggests_the_right_name(wrong, right):
    with pytest.raises(ConfigError) as caught:
        EngineConfig(**{wrong: 1})
    assert str(caught.value) == f"unknown EngineConfig option '{wrong}'. Did you mean '{right}'?"


def test_a_name_like_no_other_is_answered_with_all_names():
    with pytest.raises(ConfigError, match=r"unknown option 'zzzz'\. Known: alpha, beta"):
        reject_unknown(["alpha", "zzzz"], ["alpha", "beta"], what="option")
    reject_unknown(["beta"], iter(["alpha", "beta"]), what="option")


def test_the_cache_folder_follows_its_variables(monkeypatch):
    monkeypatch.delenv("JAXSERVE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == Path.home() / ".cache" / "jaxserve"
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/jaxserve")
    monkeypatch.setenv("JAXSERVE_CACHE", "/own")
    assert cache_folder() == Path("/own")
