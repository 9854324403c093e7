"""Trace files: the forms that are read, and the ways in which they can be wrong."""

import gzip
import json
from pathlib import Path

import pytest

from jaxserve.errors import ConfigError
from jaxserve.workload.call import After, Said, Span
from jaxserve.workload.generate import WORKLOADS, generate
from jaxserve.workload.trace import read_trace, save_trace

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
MOONCAKE = {"timestamp": 27482, "input_length": 1000, "output_length": 52, "hash_ids": [46, 47]}


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_azure(tmp_path):
    file = write(
        tmp_path / "a.csv",
        AZURE.strip() + "\r",
        "2023-11-16 18:15:46.6805900,374,44\r",
        "",
        "2023-11-16 18:15:50.9951690,396,0",
    )
    first, second = read_trace(file).calls
    assert (first.prompt, first.output_tokens, first.arrival_s) == ((Span(2, 374),), 44, 0.0)
    assert (second.prompt, second.output_tokens) == ((Span(4, 396),), 1), "an answer has a token at least"
    assert second.arrival_s == pytest.approx(4.314579, abs=1e-6)


def test_mooncake(tmp_path):
    (first,) = read_trace(write(tmp_path / "m.jsonl", MOONCAKE)).calls
    assert first.prompt == (Span(47, 512), Span(48, 488))
    assert (first.output_tokens, first.arrival_s) == (52, 27.482)


def test_ours(tmp_path):
    lines = [
        {"id": "a", "prompt": [["handbook", 300], 20], "output_tokens": 5, "program": "p", "client": "alice"},
        {
            "id": "b",
            "prompt": [["handbook", 300], {"said": "a"}, 7],
            "output_tokens": 6,
            "parents": ["a"],
            "think_s": 2,
        },
        {"prompt": 9, "output_tokens": 1, "priority": -1.5, "deadline_s": 30, "stage": "x", "arrival_s": 4},
    ]
    a, b, c = read_trace(write(tmp_path / "o.jsonl", *lines)).calls
    assert a.prompt[0] == b.prompt[0] == Span(1, 300)
    assert b.prompt[1] == Said("a") and (b.parents, b.think_s) == (("a",), 2.0)
    assert (c.call_id, c.priority, c.deadline_s, c.stage, c.arrival_s) == ("3", -1.5, 30.0, "x", 4.0)
    assert a.prompt[1].token != b.prompt[2].token != c.prompt[0].token


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_workload_written_and_read_is_the_same(name, tmp_path):
    workload = generate(name, count=6, rate=2.0, seed=3)
    save_trace(workload, tmp_path / "w.jsonl")
    again = read_trace(tmp_path / "w.jsonl")
    assert [_shape(call) for call in again.calls] == [_shape(call) for call in workload.calls]
    save_trace(again, tmp_path / "v.jsonl")
    assert (tmp_path / "v.jsonl").read_text().count("after") == (tmp_path / "w.jsonl").read_text().count("after")


def _shape(call):
    lengths = [piece.length if isinstance(piece, Span) else piece for piece in call.prompt]
    return (
        call.call_id,
        lengths,
        call.output_tokens,
        call.arrival_s,
        call.think_s,
        call.parents,
        call.client,
        call.stage,
    )


def ours(**fields: object) -> dict[str, object]:
    return {"prompt": 5, "output_tokens": 2} | fields


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "is empty, so there are no calls in it"),
        ([AZURE.strip()], "has no calls"),
        (["a,b,c", "1,2,3"], "is no trace: its first line is 'a,b,c'. Give JSON lines, or a CSV file with the columns TIME"),
        ([AZURE.strip(), "2023-11-16 18:15:46,374"], "line 2: 2 columns instead of 3"),
        ([AZURE.strip(), "yesterday,374,44"], "line 2: TIMESTAMP='yesterday' is no date"),
        ([AZURE.strip(), "2023-11-16 18:15:46,-374,44"], "line 2: ContextTokens='-374' must be a whole number from 1"),
        ([AZURE.strip(), "2023-11-16 18:15:46,374,nan"], "line 2: GeneratedTokens='nan' must be a whole number from 0"),
        ([AZURE.strip(), "2023-11-16 18:15:46,0,4"], "line 2: ContextTokens=0 must be"),
        ([AZURE.strip(), "2023-11-16 18:15:46,1,1", "2023-11-16 18:15:46+00:00,1,1"], "line 3: TIMESTAMP="),
        ([MOONCAKE, MOONCAKE | {"hash_ids": [1]}], "line 2: 1 hash_ids for 1000 tokens; one stands for 512"),
        ([MOONCAKE | {"hash_ids": [1, "x"]}], "line 1: hash_ids must be a list of whole numbers"),
        ([MOONCAKE | {"timestamp": -1}], "line 1: timestamp=-1 must be a number and not negative"),
        ([MOONCAKE, '{"timestamp": NaN, "input_length": 1, "output_length": 1, "hash_ids": [0]}'], "timestamp=nan must be"),
        ([MOONCAKE, ours()], "line 2: timestamp is missing"),
        ([ours(), "{"], "line 2: is not JSON"),
        ([ours(), "[1]"], "line 2: is no JSON object"),
        (["{" + '"a":{' * 100_000], "line 1: is not JSON"),
        ([ours(prompt=int("9" * 4000))], "line 1: prompt=9999"),
        ([ours(output_token=3)], "line 1: unknown key 'output_token'. Did you mean 'output_tokens'"),
        ([{"prompt": 3}], "line 1: output_tokens is missing"),
        ([ours(output_tokens=True)], "line 1: output_tokens=True must be a whole number from 1"),
        ([ours(output_tokens=1.5)], "line 1: output_tokens=1.5 must be"),
        ([ours(arrival_s=-1)], "line 1: arrival_s=-1 must be a number and not negative"),
        (['{"prompt": 5, "output_tokens": 2, "think_s": Infinity}'], "line 1: think_s=inf must be"),
        ([ours(prompt=[])], "line 1: the prompt is empty"),
        ([ours(prompt=[[1, 2]])], r"line 1: \[1, 2\] is no piece of a prompt; write 50"),
        ([ours(prompt=True)], "line 1: prompt=True must be"),
        ([ours(prompt=[{"after": "a", "x": 1}])], "is no piece of a prompt"),
        ([ours(id="a"), ours(id="a")], "line 2: the id 'a' is that of line 1"),
        ([ours(id=7)], "line 1: id=7 must be a text"),
        ([ours(parents="a")], "line 1: parents must be a list of ids"),
        ([ours(), ours(parents=["nobody"])], "line 2: there is no call 'nobody'"),
        ([ours(id="a", parents=["b"]), ours(id="b", parents=["a"])], "line 1: calls wait .* in a circle: a -> b -> a"),
        ([ours(id="a"), ours(id="b", prompt={"after": "a"})], "line 2: the prompt needs 'a'"),
        ([ours(client="x" * 5000)], "line 1: client='xxx"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_with_its_line(lines, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        read_trace(write(tmp_path / "bad", *lines))


def test_files_that_are_no_text(tmp_path):
    bomb = tmp_path / "bomb.gz"
    bomb.write_bytes(gzip.compress(b"0" * 1_000_000))
    with pytest.raises(ConfigError, match=r"is compressed\. Unpack it first: gunzip -k bomb"):
        read_trace(bomb)
    (tmp_path / "binary").write_bytes(b"TIMESTAMP\xff\xfe\x00")
    with pytest.raises(ConfigError, match="line 1: is not text in UTF-8"):
        read_trace(tmp_path / "binary")
    (tmp_path / "long").write_text("x" * 5_000_000)
    with pytest.raises(ConfigError, match="line 1: has more than 4,000,000 characters"):
        read_trace(tmp_path / "long")
    with pytest.raises(OSError, match="irectory"):
        read_trace(tmp_path)


def test_after_is_kept(tmp_path):
    lines = [ours(id="a"), ours(id="b", prompt=[{"after": "a"}, 3], parents=["a"])]
    assert read_trace(write(tmp_path / "o.jsonl", *lines)).calls[1].prompt[0] == After("a")
