"""What is kept of batches: as long as it is said, and no more of a client than there is room for."""

import pytest

from jaxserve.server import batch_state
from jaxserve.server.batch_state import Batch, BatchStore


@pytest.fixture
def store(tmp_path):
    return BatchStore(tmp_path / "batches", ttl_s=3600)


def add(store, tmp_path, client: str, *moves: str) -> Batch:
    (tmp_path / "input").touch()
    facts = {"endpoint": "/v1/completions", "input_file_id": "file-1", "completion_window": "24h"}
    batch = store.add(tmp_path / "input", client=client, expires_at=2e9, meta={}, **facts)
    for status in moves:
        assert store.move(batch, batch.status, to=status)
    return batch


def test_of_what_has_ended_the_last_ones_of_each_client_are_kept(store, tmp_path, monkeypatch):
    monkeypatch.setattr(batch_state, "_MOST_ENDED", 2)
    runs = add(store, tmp_path, "ada", "in_progress")
    ended = [add(store, tmp_path, "ada", "failed") for _ in range(4)]
    bobs = add(store, tmp_path, "bob", "completed")
    store.sweep()
    for known in (store, BatchStore(tmp_path / "batches", ttl_s=3600)):
        assert [batch.batch_id for batch in known.of("ada")] == [runs.batch_id, *(each.batch_id for each in ended[2:])]
        assert [batch.batch_id for batch in known.of("bob")] == [bobs.batch_id]


def test_what_ended_long_ago_is_forgotten(store, tmp_path, monkeypatch):
    add(store, tmp_path, "ada", "failed")
    runs = add(store, tmp_path, "ada", "in_progress")
    monkeypatch.setattr(store, "_ttl_s", -1.0)
    store.sweep()
    assert store.of("ada") == [runs]
