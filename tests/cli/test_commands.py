"""generate, chat, bench and models, on a stand-in for the engine."""

import io
import json

import pytest

from jaxserve.cli import chat
from jaxserve.errors import DeviceError
from jaxserve.request import SamplingParams


@pytest.fixture(autouse=True)
def _fake(fake_llm):
    """No command here loads jax."""


def test_generate_prints_the_answer_and_then_the_speed(cli, checkpoint):
    done = cli("generate", checkpoint, "hello", "--max-tokens", "4")
    assert done.out == "HELL\n"
    assert done.err.startswith("[4 tokens, ")
    assert all(part in done.err for part in ("import", "load", "warm-up", "prefill", "decode"))


def test_generate_can_echo_and_be_quiet(cli, checkpoint):
    done = cli("generate", checkpoint, "ab", "--echo", "--no-stats")
    assert (done.out, done.err) == ("abAB\n", "")


def test_generate_answers_several_prompts_as_a_batch(cli, checkpoint, tmp_path):
    (tmp_path / "prompt.txt").write_text("from a file")
    done = cli("generate", checkpoint, "one", "two", "--file", tmp_path / "prompt.txt", "--n", "2")
    assert done.out.count("--- prompt") == 6
    assert "--- prompt 3 of 3, answer 2 of 2\nFROM A FILE" in done.out


def test_generate_reads_standard_input(cli, checkpoint, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("piped"))
    assert cli("generate", checkpoint).out == "PIPED\n"


def test_generate_gives_json_lines(cli, checkpoint):
    done = cli("generate", checkpoint, "a", "b", "--json", "--logprobs", "1")
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert [(row["prompt"], row["outputs"][0]["text"]) for row in rows] == [("a", "A"), ("b", "B")]


def test_generate_takes_token_ids(cli, checkpoint):
    assert cli("generate", checkpoint, "97, 98", "--token-ids").out == "0 0 \n"
    done = cli("generate", checkpoint, "ninety", "--token-ids")
    assert done.code == 2
    assert "is not a list of token ids" in done.err


def test_generate_sends_options_to_engine_and_sampler(cli, checkpoint, fake_llm):
    cli("generate", checkpoint, "a", "--max-num-seqs", "3", "--no-enable-prefix-caching", "--seed", "5")
    config = fake_llm.last.config
    assert (config.max_num_seqs, config.enable_prefix_caching, config.seed) == (3, False, 5)


def test_generate_says_who_asks(cli, checkpoint, fake_llm):
    flags = ["--client=c", "--program=p", "--stage=s", "--priority=-2", "--deadline-ms=250"]
    for prompts in (["a"], ["a", "b"]):
        cli("generate", checkpoint, *prompts, *flags)
        request = fake_llm.last.submitted[-1]
        assert (request.client, request.program, request.stage) == ("c", "p", "s")
        assert (request.priority, request.deadline_s) == (-2, 0.25)
    assert cli("generate", checkpoint, "a", "--deadline-ms=0").code == 2
    assert cli("generate", checkpoint, "a", "--priority=nan").code == 2


def test_generate_sizes_the_engine_for_its_prompts_unless_told(cli, checkpoint, fake_llm):
    def sizes(*arguments):
        cli("generate", checkpoint, *arguments)
        return fake_llm.last.config.max_num_seqs, fake_llm.last.config.max_num_batched_tokens

    assert sizes("short") == (1, 64)
    assert sizes("x" * 90, "--n", "3") == (3, 256)
    assert sizes("x" * 90, "y" * 90, "z" * 90) == (3, None)
    assert sizes("short", "--no-enable-chunked-prefill") == (1, None)
    assert sizes("short", "--chat") == (1, None)
    assert sizes("short", "--max-num-seqs", "9", "--max-num-batched-tokens", "512") == (9, 512)


def talk(llm, lines, monkeypatch):
    """A chat in which the user types `lines`; an exception among them is raised instead of typed."""
    typed = iter([*lines, EOFError()])

    def read(prompt=""):
        line = next(typed)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    chat.talk(llm, SamplingParams(max_tokens=None), "")


def test_chat_keeps_the_conversation_until_reset(fake_llm, checkpoint, capsys, monkeypatch):
    talk(fake_llm(checkpoint), ["hi", "yo", "/reset", "ok"], monkeypatch)
    assert capsys.readouterr().out.split("\n")[:3] == [
        "<USER>HI",
        "<USER>HI<ASSISTANT><USER>HI<USER>YO",
        "<USER>OK",
    ]


def test_chat_takes_a_system_message_and_long_lines(fake_llm, checkpoint, capsys, monkeypatch):
    talk(fake_llm(checkpoint), ["/system be brief", "one \\", "two", "/system", "x", "/quit", "never"], monkeypatch)
    assert capsys.readouterr().out.split("\n")[:-1] == ["<SYSTEM>BE BRIEF<USER>ONE ", "TWO", "<USER>X"]


def test_chat_survives_mistakes_and_interrupts(fake_llm, checkpoint, capsys, monkeypatch):
    llm = fake_llm(checkpoint)
    talk(llm, [KeyboardInterrupt(), "", "/nonsense", "/help", "x" * 200, "hi"], monkeypatch)
    captured = capsys.readouterr()
    assert captured.out.strip().endswith("<USER>HI")
    assert "no command /nonsense" in captured.err
    assert "the prompt has 206 tokens (/reset forgets the conversation)" in captured.err


def test_a_failed_step_does_not_end_the_chat(fake_llm, checkpoint, capsys, monkeypatch):
    llm = fake_llm(checkpoint)
    monkeypatch.setattr(llm, "stream_events", failing)
    messages = []
    chat.answer(llm, SamplingParams(max_tokens=None), messages, "hi")
    assert messages == []
    assert "out of memory (/reset forgets the conversation)" in capsys.readouterr().err


def failing(prompt, params):
    raise DeviceError("out of memory")


def test_an_interrupted_answer_stays_in_the_conversation(fake_llm, checkpoint, capsys, monkeypatch):
    llm = fake_llm(checkpoint)
    real = llm.stream_events

    def interrupted(prompt, params):
        for number, event in enumerate(real(prompt, params)):
            if number == 3:
                raise KeyboardInterrupt
            yield event

    monkeypatch.setattr(llm, "stream_events", interrupted)
    messages = []
    chat.answer(llm, SamplingParams(max_tokens=None), messages, "hi")
    assert messages[1] == {"role": "assistant", "content": "<US"}
    assert capsys.readouterr().out == "<US [stopped]\n"
    assert llm._engine.running == {}


def test_bench_throughput_counts_tokens(cli, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxserve.cli.bench_throughput.random_prompts", lambda n, length, *_, **__: [[97] * length] * n)
    options = ["--num-prompts", "3", "--input-len", "8", "--output-len", "4", "--json", tmp_path / "result.json"]
    done = cli("bench", "throughput", "--model", checkpoint, *options)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["total_tokens_per_s"] == pytest.approx(3 * result["output_tokens_per_s"])
    assert {"ttft_ms_p50", "tpot_ms_p99", "requests_per_s", "warm_up_s"} <= set(result)
    assert "output_tokens_per_s" in done.out


def test_bench_latency_gives_percentiles(cli, checkpoint, monkeypatch):
    monkeypatch.setattr("jaxserve.cli.bench_latency.random_prompts", lambda n, length, *_, **__: [[97] * length] * n)
    done = cli("bench", "latency", "--model", checkpoint, "--num-iters", "3", "--input-len", "4", "--output-len", "2")
    assert all(f"latency_ms_{name}" in done.out for name in ("mean", "p50", "p90", "p99"))


def test_random_prompts_share_only_the_prefix():
    from jaxserve.cli.bench_offline import random_prompts

    first, second = random_prompts(2, 50, 20, vocab_size=1000, seed=1)
    assert len(first) == len(second) == 50
    assert first[:20] == second[:20]
    assert first[20:] != second[20:]
    assert random_prompts(2, 50, 20, vocab_size=1000, seed=1) == [first, second]


def test_models_describes_a_checkpoint(cli, checkpoint):
    done = cli("models", checkpoint, "--max-num-seqs", "4")
    facts = dict(line.split(maxsplit=1) for line in done.out.splitlines() if not line.startswith(("KV", "chat")))
    assert facts["architecture"] == "LlamaForCausalLM"
    assert facts["parameters"] == "138 K in float32"
    assert "4 x 512 tokens" in facts["memory"]
    assert json.loads(cli("models", checkpoint, "--json").out)["tokenizer"] == "yes"
    assert "max_model_len=513 is beyond the 512 positions" in cli("models", checkpoint, "--max-model-len", "513").err
    assert "max_num_seqs=0 must be a positive whole number" in cli("models", checkpoint, "--max-num-seqs", "0").err


def test_models_lists_the_folders_below_this_one(cli, checkpoint, monkeypatch):
    monkeypatch.chdir(checkpoint.parent)
    listing = json.loads(cli("models", "--json").out)
    assert listing["folders here"] == ["toy"]
    assert "tiny" in listing["bundled"]


@pytest.mark.parametrize("damage", [b"", b"\xff" * 8, b"\x02" + bytes(7) + b"{}"[:1], b"\x02" + bytes(7) + b"[]"])
def test_models_refuses_damaged_weights(cli, checkpoint, tmp_path, damage):
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(damage)
    done = cli("models", tmp_path)
    assert done.code == 2
    assert "is not a whole safetensors file" in done.err
