"""`jaxserve plan`, as somebody would use it who has a config.json and an idea of some chips."""

import json
from pathlib import Path

import pytest

from jaxserve.models.published import MODELS


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A config without weights."""
    path = tmp_path / "llama.json"
    path.write_text(json.dumps(MODELS["llama-3.1-8b"]))
    return path


def test_a_config_alone_is_enough(cli, llama: Path, tmp_path: Path):
    done = cli("plan", llama, "--chip", "v5e", "--devices", "8", "--tensor-parallel-size", "8")
    assert done.code == 0
    assert "sizes: tensor=8\n" in done.out
    assert "  weights         1.87 GiB\n" in done.out
    assert "  length             2,048     8,192    32,768   131,072\n" in done.out
    (tmp_path / "config.json").write_text(llama.read_text())
    assert cli("plan", tmp_path, "--chip", "v5e", "--devices", "8").code == 0


def test_a_published_name_is_enough(cli, llama: Path):
    done = cli("plan", "llama-3.1-8b", "--chip", "v5e", "--devices", "8")
    assert done.code == 0
    assert done.out.partition("\n")[2] == cli("plan", llama, "--chip", "v5e", "--devices", "8").out.partition("\n")[2]
    done = cli("generate", "llama-3.1-8b", "hello")
    assert done.code == 2
    assert "of 'llama-3.1-8b' only the shape is known here" in done.err


def test_sizes_are_chosen_where_none_are_given(cli, llama: Path):
    done = cli("plan", llama, "--chip", "v5e", "--devices", "8")
    assert "sizes: tensor_parallel_size=4, data_parallel_size=2 (chosen: " in done.out
    assert "others that fit, the best first:\n  tensor_parallel_size=8 " in done.out
    assert "  all replicas " in done.out


def test_what_does_not_fit_is_code_1_and_says_what_would(cli, llama: Path):
    done = cli("plan", llama, "--chip", "v5e", "--devices", "8", "--tensor-parallel-size", "1")
    assert done.code == 1
    assert "does not fit: the weights need 15.0 GiB" in done.out
    assert "7 devices are idle" in done.out
    assert "sizes that fit, the best first:\n  tensor_parallel_size=4, data_parallel_size=2 " in done.out
    assert "2 such devices are enough: tensor_parallel_size=2 (" in cli("plan", llama, "--memory", "10GiB").out
    done = cli("plan", llama, "--memory", "100MiB")
    assert done.code == 1
    assert done.out.endswith("or more memory.\n")


def test_json_has_the_same_numbers(cli, llama: Path):
    facts = json.loads(cli("plan", llama, "--chip", "v5e", "--devices", "8", "--json").out)
    assert (facts["fits"], facts["num_devices"], facts["sizes"]["tensor_parallel_size"]) == (True, 8, 4)
    parts = [facts[f"{part}_bytes"] for part in ("weight", "sampler", "activation", "kv_pool", "left")]
    assert sum(parts) == facts["usable_bytes"]
    assert list(facts["sequences"]) == ["2048", "8192", "32768", "131072"]
    assert len(facts["others"]) == 5
    facts = json.loads(cli("plan", llama, "--memory", "10GiB", "--json").out)
    assert (facts["fits"], facts["more_devices"]["num_devices"]) == (False, 2)


def test_a_plan_for_this_machine_is_what_the_engine_would_do(cli):
    facts = json.loads(cli("plan", "tiny", "--json", "--tensor-parallel-size", "1", "--max-num-seqs", "2").out)
    assert (facts["device"], facts["num_devices"], facts["max_num_batched_tokens"]) == ("cpu", 8, 512)
    assert facts["num_kv_blocks"] == 2 * 2048 // 32


def test_every_option_that_is_taken_counts(cli, llama: Path):
    def numbers(*options: str) -> str:
        return cli("plan", llama, "--chip", "v5p", "--devices", "8", "--json", *options).out

    for options in (
        ("--dtype", "float32"),
        ("--kv-cache-dtype", "fp8"),
        ("--max-model-len", "4096"),
        ("--max-num-seqs", "7"),
        ("--max-num-batched-tokens", "100"),
        ("--block-size", "16"),
        ("--num-kv-blocks", "5000"),
        ("--memory-utilization", "0.5"),
        ("--no-enable-chunked-prefill",),
        ("--tensor-parallel-size", "2"),
        ("--data-parallel-size", "2"),
        ("--sequence-parallel-size", "2"),
        ("--memory", "80GiB"),
    ):
        assert numbers(*options) != numbers(), options


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--devices", "0"], "--devices 0 must be a positive whole number"),
        (["--devices", "many"], "invalid int value"),
        (["--chip", "v7"], "invalid choice: 'v7' (choose from"),
        (["--memory", "24"], "'24' is no amount of memory. Write it as 24GiB or 80GB."),
        (
            ["--chip", "v5e", "--tensor-parallel-size", "3"],
            "Choose tensor * expert * sequence from 1, 2, 4, 8, 16, 32.",
        ),
        (
            ["--chip", "v5e", "--devices", "8", "--tensor-parallel-size", "16"],
            "tensor=16 needs 16 devices, but there are 8",
        ),
        (["--tensor-parallel-size", "0"], "tensor_parallel_size=0 must be a positive whole number"),
        (["--chip", "v5e", "--expert-parallel-size", "2"], "LlamaForCausalLM has no experts"),
        (["--load-format", "dummy"], "unknown option --load-format"),
    ],
)
def test_a_mistake_is_one_sentence_and_code_2(cli, llama: Path, arguments: list[str], sentence: str):
    done = cli("plan", llama, *arguments)
    assert (done.code, done.out) == (2, "")
    assert sentence in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("model", "sentence"),
    [("no-such-model", "there is no folder 'no-such-model'"), ("", "the model name is empty")],
)
def test_a_model_that_is_not_there(cli, model: str, sentence: str):
    done = cli("plan", model, "--chip", "v5e")
    assert done.code == 2
    assert sentence in done.err


def test_a_file_that_is_no_config(cli, tmp_path: Path):
    (tmp_path / "model.bin").write_bytes(b"\xff\x00")
    assert "model.bin cannot be read as JSON" in cli("plan", tmp_path / "model.bin").err
    assert "config.json is missing" in cli("plan", tmp_path).err
