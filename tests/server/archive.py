"""Servers with a folder of files, and clients of them."""

import contextlib
import io
import json
import time
from collections.abc import Iterator

import openai

from jaxserve.server.app import create_app
from jaxserve.server.config import ServerConfig
from tests.server.conftest import Server, serving

KEYS = {"alice": "key-of-alice-123456", "bob": "key-of-bob-1234567"}


@contextlib.contextmanager
def serving_files(engine, folder, **options) -> Iterator[Server]:
    """A server for alice and bob, whose files are in `folder`."""
    folder.mkdir(exist_ok=True)
    keys = folder / "keys.json"
    keys.write_text(json.dumps(KEYS))
    config = ServerConfig(files_dir=str(folder / "archive"), api_key_file=str(keys), **options)
    with serving(create_app(config, ("tiny",), engine)) as running:
        yield running


def client_of(server: Server, name: str = "alice") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEYS[name], max_retries=0)


def line(custom_id: str, url: str = "/v1/completions", **body) -> str:
    body = {"prompt": f"# {custom_id}\n", "max_tokens": 4, "temperature": 0} | body
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body})


def upload(client: openai.OpenAI, lines: list[str] | bytes, name: str = "requests.jsonl"):
    content = lines if isinstance(lines, bytes) else "\n".join(lines).encode()
    return client.files.create(file=(name, io.BytesIO(content)), purpose="batch")


def begin(client: openai.OpenAI, lines: list[str] | bytes, **options):
    """Upload lines, and make a batch of them."""
    options = {"endpoint": "/v1/completions", "completion_window": "24h"} | options
    return client.batches.create(input_file_id=upload(client, lines).id, **options)


def end(client: openai.OpenAI, batch, within_s: float = 30):
    """Wait until a batch has ended."""
    last_s = time.monotonic() + within_s
    while batch.status not in ("completed", "failed", "expired", "cancelled"):
        assert time.monotonic() < last_s, batch
        time.sleep(0.01)
        batch = client.batches.retrieve(batch.id)
    return batch


def rows(client: openai.OpenAI, file_id: str | None) -> dict[str, dict]:
    """Lines of a result file by custom_id; each is there once."""
    if file_id is None:
        return {}
    found = [json.loads(text) for text in client.files.content(file_id).text.splitlines()]
    by_id = {row["custom_id"]: row for row in found}
    assert len(by_id) == len(found)
    return by_id
