"""The result file of a batch loses nothing and doubles nothing, wherever a run was killed."""

import json

import pytest

from jaxserve.batch.results import append, open_results
from jaxserve.errors import RequestError


def result(custom_id, error=None):
    return {"id": "batch_req_1", "custom_id": custom_id, "response": None, "error": error}


def write(path, results):
    file, _ = open_results(path)
    with file:
        for item in results:
            append(file, item)


def test_a_fresh_file_has_no_answers(tmp_path):
    file, answered = open_results(tmp_path / "out.jsonl")
    file.close()
    assert answered == set()


def test_answers_are_found_again_by_id_and_nameless_lines_by_number(tmp_path):
    path = tmp_path / "out.jsonl"
    nameless = {"code": "invalid_json", "message": "", "line": 3}
    doubled = {"code": "duplicate_custom_id", "message": "", "line": 9}
    faulty = {"code": "unknown_field", "message": "", "line": 4}
    write(path, [result("a"), result(None, nameless), result("a", doubled), result("b", faulty)])
    file, answered = open_results(path)
    file.close()
    assert answered == {"a", 3, 9, "b"}


@pytest.mark.parametrize("cut", range(1, 40))
def test_a_torn_last_line_is_dropped_and_the_rest_kept(tmp_path, cut):
    path = tmp_path / "out.jsonl"
    write(path, [result("ä"), result("b")])
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    file, answered = open_results(path)
    with file:
        assert answered == {"ä"}
        append(file, result("b"))
    assert path.read_bytes() == whole


@pytest.mark.parametrize("line", [b"hello\n", b"[]\n", b'{"custom_id": "a"}\n', b"\n", b"\xff\n"])
def test_a_foreign_file_is_left_alone(tmp_path, line):
    path = tmp_path / "notes.txt"
    path.write_bytes(line)
    with pytest.raises(RequestError, match="line 1 is not the result of a batch"):
        open_results(path)
    assert path.read_bytes() == line


def test_a_foreign_file_without_a_newline_is_left_alone(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_bytes(b"my only copy")
    with pytest.raises(RequestError, match="not the result of a batch"):
        open_results(path)
    assert path.read_bytes() == b"my only copy"


def test_two_runs_cannot_write_one_file(tmp_path):
    path = tmp_path / "out.jsonl"
    first, _ = open_results(path)
    with first, pytest.raises(RequestError, match="another run is writing"):
        open_results(path)


def test_lines_are_one_line_each_and_valid_json(tmp_path):
    path = tmp_path / "out.jsonl"
    write(path, [result("new\nline\u2028 and é")])
    (line,) = path.read_bytes().split(b"\n")[:-1]
    assert json.loads(line)["custom_id"] == "new\nline\u2028 and é"
