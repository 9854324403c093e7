"""Names of models: what each leads to, and what is said of those without weights."""

import json
from pathlib import Path

import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.errors import CheckpointError
from jaxserve.model_source import bundled_folder, config_of, find_folder, find_model, is_published
from jaxserve.models.config import from_hf
from jaxserve.models.published import MODELS


def test_a_published_name_is_a_shape_without_weights():
    assert config_of("qwen3-0.6b").embed_size == 1024
    assert is_published("qwen3-0.6b") and not is_published("tiny")
    assert find_folder("qwen3-0.6b", "dummy") is None
    for find in (find_model, lambda name: find_folder(name, "auto")):
        with pytest.raises(CheckpointError, match=r"only the shape is known here, not the weights\. Give a folder"):
            find("qwen3-0.6b")
    with pytest.raises(CheckpointError, match=r"llama-3\.1-8b"):  # named among the choices
        find_model("llama-9")


def test_a_folder_of_the_same_name_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "yi-34b").mkdir()
    (tmp_path / "yi-34b" / "config.json").write_text((bundled_folder("tiny") / "config.json").read_text())
    monkeypatch.chdir(tmp_path)
    assert config_of("yi-34b").embed_size == 128
    assert find_folder("yi-34b", "dummy") == find_model("yi-34b") == Path("yi-34b")


@pytest.mark.parametrize("name", MODELS)
def test_every_shape_is_one_that_is_served(name: str):
    cfg = from_hf(MODELS[name])
    assert cfg.dtype == "bfloat16"
    assert set(cfg.windows) == {None}


def test_a_shape_runs_with_random_weights(monkeypatch: pytest.MonkeyPatch):
    """The published ones are large, so one more is published for a moment."""
    tiny = json.loads((bundled_folder("tiny") / "config.json").read_text())
    monkeypatch.setitem(MODELS, "smallest", tiny | {"num_hidden_layers": 1})
    sizes = {"max_num_seqs": 1, "max_model_len": 64, "max_num_batched_tokens": 8, "progress": False}
    llm = LLM("smallest", load_format="dummy", **sizes)
    (out,) = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=4, ignore_eos=True))
    assert len(out.outputs[0].token_ids) == 4
    with pytest.raises(CheckpointError, match="only the shape"):
        LLM("smallest", **sizes)
