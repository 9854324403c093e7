"""Cost models as JSON: what is written is read again, and nothing else is taken."""

import json
from pathlib import Path
from typing import Any

import pytest

from jaxserve.cost import files
from jaxserve.cost.forms import Fitted
from jaxserve.cost.model import CostModel, Host
from jaxserve.cost.roofline import of_chip, reference
from jaxserve.cost.work import decode_work, prompt_work
from jaxserve.errors import ConfigError
from jaxserve.models.config import from_hf
from jaxserve.models.published import MODELS

FITTED = CostModel(
    name="here",
    device=Fitted(decode=((1, 1e-3), (8, 2e-3)), mixed=((16, 3e-3),), decode_kv_s=1e-7),
    host=Host(step_s=5e-4),
    hidden=0.5,
)


@pytest.mark.parametrize("model", [FITTED, reference(), of_chip("v5p", from_hf(MODELS["mixtral-8x7b"]), tensor=2)])
def test_round_trip(model: CostModel, tmp_path: Path):
    path = tmp_path / "model.json"
    files.save(model, path)
    assert files.load(path) == files.load(str(path)) == model
    assert files.load(path).step_s(prompt_work(9, 3)) == model.step_s(prompt_work(9, 3))


def changed(path: str, value: Any) -> dict[str, Any]:
    """The fitted model with one entry replaced, or (with ...) removed."""
    whole = json.loads(json.dumps(files.to_json(FITTED)))
    *parents, last = path.split(".")
    part = whole
    for name in parents:
        part = part[name]
    part[last] = value
    if value is ...:
        del part[last]
    return whole


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("format", 2, "no cost model of format 1"),
        ("name", ["a"], "name must be a short text"),
        ("name", "a" * 999, "name must be a short text"),
        ("name", ..., "name is missing"),
        ("device", [], "device must be an object"),
        ("device.form", "cubic", "device.form='cubic' must be one of roofline, fitted"),
        ("device.form", ["roofline"], "must be one of"),
        ("device.form", "roofline", "unknown field 'device.decode'"),
        ("device.decode", [], "device.decode must be a list of 1 to"),
        ("device.decode", [[1, 1.0], [1, 2.0]], "tokens must ascend"),
        ("device.decode", [[1, 2.0], [2, 1.0]], "seconds not fall"),
        ("device.decode", [[1.5, 2.0]], "a point must be"),
        ("device.decode", [[1, 2.0, 3.0]], "a point must be"),
        ("device.decode", [[1, "2"]], "must be a finite number"),
        ("device.decode", ..., "device.decode is missing"),
        ("device.decode_kv_s", -1e-9, "device.decode_kv_s=-1e-09 must be a finite number of at least 0"),
        ("device.decode_kv_s", float("nan"), "must be a finite number"),
        ("device.decode_kv_s", float("inf"), "must be a finite number"),
        ("device.decode_kv_s", 10**400, "must be a finite number"),
        ("device.decode_kv_s", True, "must be a finite number"),
        ("host.step_s", None, "host.step_s=None must be a finite number"),
        ("host.extra", 1, "unknown field 'host.extra'"),
        ("hidden", 1.5, "hidden=1.5 must be at most 1"),
        ("swap_bytes_per_s", 0, "swap_bytes_per_s=0 must be a finite number above 0"),
        ("device", None, "device must be an object"),
    ],
)
def test_what_is_no_model_is_one_sentence(path: str, value: Any, sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        files.from_json(changed(path, value))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "cannot be read"),
        ("[1]", "a cost model must be an object"),
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("\ufffd\0", "cannot be read"),
        (" " * (1 << 23), "is larger than"),
        ('{"format": 1, "device": {"form": "fitted"}}', "device.decode is missing"),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, text: str, sentence: str):
    path = tmp_path / "model.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=sentence) as raised:
        files.load(path)
    assert "Make one with scripts/calibrate.py" in str(raised.value) or "larger" in sentence
    with pytest.raises(ConfigError, match="cannot be read"):
        files.load(tmp_path)


def test_curves_between_and_beyond_their_points():
    device = Fitted(decode=((1, 1.0), (3, 2.0), (7, 6.0)), mixed=((16, 5.0),))
    at = [device.step_s(decode_work(rows, 0)) for rows in (1, 2, 3, 5, 9)]
    assert at == [1.0, 1.5, 2.0, 4.0, 8.0]
    assert device.step_s(prompt_work(2)) == device.step_s(prompt_work(99)) == 5.0
