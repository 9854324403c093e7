"""How much memory there is, by chip, by what the user says, and by what a machine's devices say."""

from types import SimpleNamespace

import pytest

from jaxserve.errors import ConfigError
from jaxserve.memory import room
from jaxserve.memory.room import parse_size, size_text

GIB = 1 << 30


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("24GiB", 24 * GIB),
        ("80GB", 80 * 10**9),
        ("15.75 gib", int(15.75 * GIB)),
        ("512MiB", 512 << 20),
        ("1tb", 10**12),
    ],
)
def test_sizes_are_read(text: str, num_bytes: int):
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize("text", ["24", "", "GiB", "-1GiB", "0GiB", "nanGiB", "infGB", "1e9TiB", "24Gib ram", "24 b"])
def test_what_is_no_size_is_refused(text: str):
    with pytest.raises(ConfigError, match=r"is no amount of memory.*Write it as 24GiB or 80GB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "0.98 KiB"),
        (15.75 * GIB, "15.8 GiB"),
        (1023.9 * GIB, "1.00 TiB"),
        (5000 << 40, "5000 TiB"),
        (-2.5 * GIB, "-2.50 GiB"),
    ],
)
def test_sizes_are_written(num_bytes: float, text: str):
    assert size_text(num_bytes) == text


def test_of_a_gpu_a_process_has_the_share_that_jax_takes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    assert room.of_chip("a100-80gb", 1).device_bytes == 60 * GIB
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".5")
    assert room.of_chip("a100-80gb", 1).device_bytes == 40 * GIB
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "1")
    assert room.of_chip("a100-80gb", 1).device_bytes == 80 * GIB
    assert room.of_chip("h100", 1, device_bytes=94 * GIB).device_bytes == 94 * GIB
    assert room.of_chip("v5e", 1).device_bytes == 15.75 * GIB
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "all")
    with pytest.raises(ConfigError, match="XLA_CLIENT_MEM_FRACTION='all' must be above 0 and at most 1"):
        room.of_chip("h100", 1)


def test_an_unknown_chip_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"'v7' is unknown.*v4, v5e"):
        room.of_chip("v7", 1)


def test_emulated_devices_share_the_hosts_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(room, "free_host_bytes", lambda: 64 * GIB)
    here = room.of_this_machine()
    assert (here.platform, here.num_devices, here.limit(4)) == ("cpu", 8, 16 * GIB)
    assert here.usable(1.0, 4) == 8 * GIB  # half is left to others
    assert here.default_pool(8 * GIB, 4) == GIB // 2
    some = {here.default_pool(int(share * GIB), 1) for share in (1.26, 1.31, 1.4999)}  # free at several starts
    assert some == {5 * GIB // 4}, "one pool, and so one set of programs"
    assert [here.default_pool(free, 1) for free in (0, 5, 7, 9)] == [0, 5, 7, 8]


def fake_devices(monkeypatch: pytest.MonkeyPatch, kind: str, stats: list[dict[str, int] | None]) -> None:
    def device(stats: dict[str, int] | None) -> SimpleNamespace:
        return SimpleNamespace(device_kind=kind, platform="gpu", memory_stats=lambda: stats)

    monkeypatch.setattr("jax.local_devices", lambda: [device(each) for each in stats])
    monkeypatch.setattr("jax.device_count", lambda: 2 * len(stats))  # as many again in another process


def test_the_fullest_device_decides(monkeypatch: pytest.MonkeyPatch):
    fake_devices(
        monkeypatch,
        "a GPU",
        [{"bytes_limit": 60 * GIB, "bytes_in_use": GIB}, {"bytes_limit": 50 * GIB, "bytes_in_use": 4 * GIB}],
    )
    here = room.of_this_machine()
    assert (here.num_devices, here.usable(0.5, 4), here.limit(4)) == (4, 21 * GIB, 46 * GIB)


def test_a_device_that_says_nothing_is_looked_up(monkeypatch: pytest.MonkeyPatch):
    fake_devices(monkeypatch, "NVIDIA L4", [None])
    assert room.of_this_machine().device_bytes == 23_034 << 20
    fake_devices(monkeypatch, "NVIDIA Unheard Of", [None])
    with pytest.raises(ConfigError, match="does not say how much memory it has"):
        room.of_this_machine()
