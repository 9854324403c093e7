"""Measuring for the cost model: what is noted of steps, and that the scripts run."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import agreement
import calibrate
from calibrate import Notes, Times

from jaxserve.cost import files
from jaxserve.cost.work import decode_work, prompt_work
from jaxserve.step import Capacity

SMALL = ["--max-num-seqs", "4", "--max-model-len", "128", "--max-num-batched-tokens", "32", "--no-progress"]


def test_steps_are_filed_by_what_they_are():
    """Contexts of decodes apart; the host's time and the device's from steps alone, periods from overlapping ones."""
    first, second, chunk = decode_work(2, 20), decode_work(2, 22), prompt_work(5)
    alone = [Times(first, 0.0, 0.1, 1.0), Times(second, 1.5, 1.6, 3.0), Times(chunk, 3.25, 3.3, 5.0)]
    stream = [Times(first, 0.0, 0.1, 2.0), Times(second, 1.0, 1.1, 3.0), Times(chunk, 3.5, 3.6, 9.0)]
    notes: dict[Any, Notes] = {}
    calibrate.note(notes, alone, overlap=False)
    calibrate.note(notes, stream, overlap=True)
    decodes, chunks = notes.values()
    assert decodes == Notes([second, second], [1.5], [0.5], [1.0])
    assert chunks == Notes([chunk, chunk], [1.75], [0.25], [])  # when it came, nothing was under way
    assert not chunks.is_enough()


def test_equal_steps_count_as_their_mean_without_a_tenth_at_either_end():
    taken = Notes([decode_work(1, kv) for kv in (5, 9, 7)], [3.0, 1.0, 2.0], [1.0] * 3, [4.0, 5.0, 9.0])
    assert taken.sample() == (decode_work(1, 7), 2.0, 1.0, 6.0)
    assert calibrate.trimmed_mean([1e9, *[3.0] * 9, *[1.0] * 9, -1e9]) == 2.0


@pytest.mark.parametrize(
    "capacity", [(64, 16, 8, (16, 64), 512), (4, 32, 2, (16,), 64), (1000, 16, 256, (2048,), 4096)]
)
def test_scenes_fit_the_engine(capacity: tuple[Any, ...]):
    sizes = Capacity(*capacity)
    built: Any = types.SimpleNamespace(
        executor=types.SimpleNamespace(capacity=lambda: sizes), max_model_len=sizes.max_model_len
    )
    made = calibrate.scenes(50, 0, built)
    assert made == calibrate.scenes(50, 0, built) != calibrate.scenes(50, 1, built)
    for scene in made:
        answers = 2 * calibrate.DECODES + 16
        assert scene.num_rows < sizes.num_slots
        assert max(scene.context, scene.chunk) + answers <= sizes.max_model_len
        assert (scene.num_rows + 1) * scene.context <= sizes.num_blocks * sizes.block_size


def test_cpu_time_does_not_pass_in_sleep(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(calibrate, "clock", agreement.time.process_time)
    clock = agreement.Clock()
    clock.wait(100.0)
    assert 100.0 <= clock.now_s() < 101.0
    assert clock.instants[0] < 1.0 < clock.instants[-1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["tiny", "--scenes", "3"], "--scenes 3 must be at least 8"),
        (["tiny", "--data-parallel-size", "2"], "data_parallel_size must be 1"),
        (["no-such-model"], "there is no folder 'no-such-model'"),
    ],
)
def test_a_mistake_is_one_sentence(
    arguments: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert calibrate.main([*arguments, "-o", str(tmp_path / "model.json")]) == 2
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_scripts_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """How good the fit is depends on what else the machine does; that it is one does not."""
    for name, value in (("TURNS", 2), ("LEAST", 2), ("DECODES", 4)):
        monkeypatch.setattr(calibrate, name, value)
    path = tmp_path / "model.json"
    assert calibrate.main(["tiny", *SMALL, "--scenes", "8", "-o", str(path)]) == 0
    assert "told, not fitted to:" in capsys.readouterr().out
    model = files.load(path)
    assert model.block_bytes == 2 * 4 * 2 * 32 * 4 * 32
    assert model.swap_bytes_per_s == 4e9
    assert 0 < model.step_s(decode_work(1, 10)) < model.step_s(prompt_work(32, 64)) < 10
    told = tmp_path / "told.json"
    options = ["--scenes", "8", "--requests", "20", "--policies", "fcfs", "-o", str(told)]
    assert agreement.main(["tiny", *SMALL, *options]) == 0
    assert "given their instants: 3 of 3" in capsys.readouterr().out
    for real, simulated in json.loads(told.read_text()).values():
        assert real["requests_per_s"] > 0 and simulated["calls_ended"] == 20
        assert real["output_tokens"] == simulated["output_tokens"]
