"""The cost model that an engine gets: by its device, or from the file it is given."""

from pathlib import Path

import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.cost import files
from jaxserve.cost.here import of_device
from jaxserve.cost.roofline import of_chip, reference
from jaxserve.cost.work import decode_work, prompt_work
from jaxserve.errors import ConfigError
from jaxserve.models.config import from_hf
from jaxserve.models.published import MODELS

LLAMA = from_hf(MODELS["llama-3.1-8b"])


def test_by_the_kind_of_device():
    on_tpu = of_device("TPU v5 lite", "tpu", LLAMA, tensor=4, itemsize=2)
    assert on_tpu == of_chip("v5e", LLAMA, tensor=4)
    unknown = of_device("NVIDIA GeForce", "gpu", LLAMA)
    assert unknown.step_s(decode_work(1, 1)) > on_tpu.step_s(decode_work(1, 1))
    here = of_device("cpu", "cpu", LLAMA, itemsize=4, kv_itemsize=4)
    assert here.step_s(prompt_work(64)) > 100 * on_tpu.step_s(prompt_work(64))
    assert here.block_bytes == 4 * on_tpu.block_bytes * 4 / 2
    assert of_device("cpu", "cpu", LLAMA, itemsize=4, tensor=2).device_s(decode_work(1, 1)) >= here.device_s(
        decode_work(1, 1)
    )  # two devices of one machine are no faster than one


def test_from_a_file(tmp_path: Path):
    path = tmp_path / "model.json"
    files.save(reference(), path)
    assert of_device("cpu", "cpu", LLAMA, choice=str(path)) == reference()
    with pytest.raises(ConfigError, match=r"cost_model='missing\.json' cannot be read"):
        of_device("cpu", "cpu", LLAMA, choice="missing.json")


def test_a_mistake_is_told_before_weights_are_read():
    with pytest.raises(ConfigError, match=r"cost_model='missing\.json' cannot be read"):
        LLM("tiny", cost_model="missing.json")
    for value in ("", 3):
        with pytest.raises(ConfigError, match="must be a file, or 'auto'"):
            LLM("tiny", cost_model=value)


@pytest.mark.slow
def test_the_engine_sizes_its_steps_by_it(tmp_path: Path):
    """Steps are said to take 3 ms and more, and 1 ms is wanted: beside decodes prompts go in the smallest pieces. The last
    of three prompts waits for the first answer's 24 tokens, takes 300 / 15 steps beside the second, and has 90 tokens to
    go; with whole budgets it would take 300 / 63."""
    path = tmp_path / "model.json"
    files.save(reference(), path)
    sizes = {"max_num_seqs": 2, "max_model_len": 400, "max_num_batched_tokens": 64, "progress": False}
    options = {"tbt_s": 0.001}
    llm = LLM("tiny", **sizes, scheduling_policy="sarathi", scheduling_options=options, cost_model=str(path))
    params = [SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True) for count in (24, 60, 90)]
    llm.generate([[3] * 5, [4] * 100, [5] * 300], params)
    assert 24 + 300 / 15 + 90 <= llm.metrics()["steps"] + 1 < 24 + 300 / 15 + 90 + 10
