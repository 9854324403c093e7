"""/v1/files: what comes back is what was sent, to whom it belongs and to nobody else."""

import io
import json
import urllib.parse
from pathlib import Path

import httpx
import openai
import pytest

from jaxserve.openai.errors import ApiError
from jaxserve.server.app import create_app
from jaxserve.server.config import ServerConfig
from jaxserve.server.files import FileStore
from tests.server.archive import KEYS, client_of, serving_files, upload
from tests.server.conftest import serving


@pytest.fixture(scope="module")
def server(engine, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    with serving_files(engine, folder, max_file_bytes=3 << 20, max_client_file_bytes=8 << 20) as running:
        yield running


@pytest.fixture
def alice(server):
    with client_of(server) as client:
        yield client
        for file in client.files.list():
            client.files.delete(file.id)


@pytest.fixture(scope="module")
def bob(server):
    with client_of(server, "bob") as client:
        yield client


def test_a_file_comes_back_as_it_was_sent(alice, server):
    content = bytes(range(256)) * 9000  # more than is held in memory
    made = upload(alice, content, "ünï.jsonl")
    assert (made.bytes, made.filename, made.purpose, made.status) == (len(content), "ünï.jsonl", "batch", "processed")
    assert alice.files.retrieve(made.id) == made
    assert alice.files.content(made.id).read() == content
    assert alice.files.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        alice.files.content(made.id)
    assert not list(folder_of(server).glob(f"{made.id}*"))


@pytest.mark.parametrize("name", ["plain.jsonl", "ünï.jsonl", "a; filename=b", "a b"])
def test_a_name_stays_a_name_in_the_header(alice, name):
    made = upload(alice, b"content", name)
    answer = alice.files.with_raw_response.content(made.id)
    told = answer.headers["content-disposition"]
    value = told.removeprefix("attachment; ").partition("=")[2]
    assert urllib.parse.unquote(value.removeprefix("utf-8''").strip('"')) == made.filename
    assert (answer.headers["content-length"], answer.headers["content-type"]) == ("7", "application/octet-stream")


def test_a_file_that_is_deleted_before_it_is_opened_is_not_there(alice, server, monkeypatch):
    made = upload(alice, b"content")
    known = server.app.state.archive._files.get("alice", made.id)
    alice.files.delete(made.id)
    monkeypatch.setattr(FileStore, "get", lambda *args: known)
    with pytest.raises(openai.NotFoundError, match="there is no file"):
        alice.files.content(made.id)


def test_files_are_listed_page_by_page_newest_first(alice):
    names = [upload(alice, b"{}", f"{number}.jsonl").filename for number in range(5)]
    page = alice.files.list(limit=2)
    assert [file.filename for file in page.data] == names[:2:-1]
    assert [file.filename for file in page] == names[::-1], "the client goes from page to page by itself"
    assert [file.filename for file in alice.files.list(order="asc", limit=3)] == names
    assert list(alice.files.list(purpose="batch_output")) == []
    for wrong in ({"limit": 0}, {"limit": 10**30}, {"order": "up"}):
        with pytest.raises(openai.BadRequestError):
            alice.files.list(**wrong)
    with pytest.raises(openai.NotFoundError):
        alice.files.list(after="file-nowhere")


def test_nobody_sees_reads_or_deletes_the_file_of_another(alice, bob):
    made = upload(alice, b"secret")
    assert list(bob.files.list()) == []
    for call in (bob.files.retrieve, bob.files.content, bob.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(made.id)
    assert alice.files.content(made.id).text == "secret"


HOSTILE = [
    "../../etc/passwd",
    "..",
    "%2e%2e",
    "%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    "file-\0",
    "file-" + "0" * 32,
    "x" * 10_000,
    "file-" + "a" * 32 + "/../x",
    "\ud7ff\u202e",
]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("route", ["/v1/files/{}", "/v1/files/{}/content", "/v1/batches/{}", "/v1/batches/{}/cancel"])
def test_path_names_in_ids_are_harmless(server, alice, name, route):
    upload(alice, b"{}")
    for written in (name, urllib.parse.quote(name, safe="")):
        url = server.url + route.format(urllib.parse.quote(written, safe="%/."))
        method = "POST" if route.endswith("cancel") else "GET"
        answer = httpx.request(method, url, headers={"authorization": f"Bearer {KEYS['alice']}"})
        # httpx resolves "..", so that another route may be meant: one that tells a list of our own files at most.
        assert answer.status_code in (404, 405) or answer.json()["object"] == "list"
        assert "root:" not in answer.text


@pytest.mark.parametrize("name", ["../../x.jsonl", "/etc/passwd", "..\\..\\x", "a\0b", "", "." * 300, "x" * 5000])
def test_the_name_of_a_file_is_told_and_never_used(server, alice, name):
    made = httpx.post(
        f"{server.url}/v1/files",
        headers={"authorization": f"Bearer {KEYS['alice']}"},
        data={"purpose": "batch"},
        files={"file": (name or "x", b"{}")},
    )
    if made.status_code == 200:
        assert "/" not in made.json()["filename"] and len(made.json()["filename"]) <= 255
        assert alice.files.content(made.json()["id"]).text == "{}"
    else:
        assert made.status_code == 400 and made.json()["error"]["message"]
    there = {path.name for path in folder_of(server).iterdir()}
    known = {file.id for file in alice.files.list()}
    assert there == {f"{each}.{end}" for each in known for end in ("json", "data")}


def test_a_file_above_the_limit_is_refused_and_nothing_is_left(server, alice):
    for length in (3 << 20) + 1, 4 << 20:
        with pytest.raises(openai.APIStatusError, match="longer than") as caught:
            upload(alice, b"x" * length)
        assert caught.value.status_code == 413

    def endless():  # without a content-length
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
        for _ in range(64):
            yield b"x" * (1 << 16)

    headers = {"authorization": f"Bearer {KEYS['alice']}", "content-type": "multipart/form-data; boundary=b"}
    answer = httpx.post(f"{server.url}/v1/files", headers=headers, content=endless())
    assert answer.status_code == 413
    assert list(folder_of(server).iterdir()) == []


def test_a_client_has_a_quota_and_others_have_theirs(server, alice, bob):
    for _ in range(2):
        upload(alice, b"x" * (3 << 20))
    with pytest.raises(openai.APIStatusError, match="delete files") as caught:
        upload(alice, b"x" * (3 << 20))
    assert caught.value.code == "quota_exceeded"
    made = upload(bob, b"x" * (3 << 20))
    bob.files.delete(made.id)
    alice.files.delete(next(iter(alice.files.list())).id)
    upload(alice, b"x" * (3 << 20))


@pytest.mark.parametrize(
    ("content_type", "content"),
    [
        ("application/json", b"{}"),
        ("multipart/form-data", b"x"),
        ("multipart/form-data; boundary=b", b"nonsense"),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b--',
        ),
        ("multipart/form-data; boundary=b", b"--b\r\n" + b"x-y: " + b"z" * 100_000 + b"\r\n\r\n--b--"),
        ("multipart/form-data; boundary=" + "b" * 5000, b"x"),
    ],
)
def test_what_is_no_form_is_refused(server, content_type, content):
    headers = {"authorization": f"Bearer {KEYS['bob']}", "content-type": content_type}
    answer = httpx.post(f"{server.url}/v1/files", headers=headers, content=content)
    assert answer.status_code in (400, 415)
    assert answer.json()["error"]["message"]


def test_other_purposes_are_refused_and_times_are_checked(alice):
    with pytest.raises(openai.BadRequestError, match="purpose"):
        alice.files.create(file=io.BytesIO(b"{}"), purpose="fine-tune")
    with pytest.raises(openai.BadRequestError, match="seconds"):
        alice.files.create(
            file=io.BytesIO(b"{}"), purpose="batch", expires_after={"anchor": "created_at", "seconds": 1}
        )
    made = alice.files.create(
        file=io.BytesIO(b"{}"), purpose="batch", expires_after={"anchor": "created_at", "seconds": 7200}
    )
    assert made.expires_at - made.created_at == 7200


def test_another_server_may_not_have_the_same_folder(engine, server, tmp_path):
    archive = folder_of(server).parent
    with serving(create_app(ServerConfig(files_dir=str(archive)), ("tiny",), engine)) as second:
        answer = httpx.get(f"{second.url}/v1/files")
    assert answer.status_code == 503
    assert "--files-dir of its own" in answer.json()["error"]["message"]


def test_a_folder_that_cannot_be_used_is_told_with_what_to_do(engine, tmp_path):
    (tmp_path / "file").touch()
    with serving(create_app(ServerConfig(files_dir=str(tmp_path / "file" / "x")), ("tiny",), engine)) as running:
        answer = httpx.get(f"{running.url}/v1/files")
    assert answer.status_code == 503
    assert "Give --files-dir one that may be written in" in answer.json()["error"]["message"]


def folder_of(server):
    return Path(server.app.state.server.config.files_dir) / "files"


def test_expired_files_are_gone_and_a_killed_upload_leaves_nothing(tmp_path):
    now = [1000.0]

    def store():
        return FileStore(tmp_path / "files", max_bytes=100, max_client_bytes=1000, ttl_s=60, clock=lambda: now[0])

    first = store()
    kept = first.add(io.BytesIO(b"a"), client="c", filename="f", purpose="batch")
    now[0] += 59
    later = first.add(io.BytesIO(b"b"), client="c", filename="f", purpose="batch")
    (tmp_path / "files" / f"{later.file_id}.json").unlink()  # killed before the description was written
    (tmp_path / "files" / f"{later.file_id}.json.part").write_bytes(b"torn")
    (tmp_path / "files" / "thesis.txt").write_bytes(b"only copy")  # not ours
    second = store()
    assert second.of("c") == [kept]
    there = {path.name for path in (tmp_path / "files").iterdir()}
    assert there == {f"{kept.file_id}.data", f"{kept.file_id}.json", "thesis.txt"}
    now[0] += 2
    with pytest.raises(ApiError, match="no file"):
        second.get("c", kept.file_id)
    second.sweep()
    assert [path.name for path in (tmp_path / "files").iterdir()] == ["thesis.txt"]


def test_what_is_on_disk_is_json_that_people_can_read(server, alice):
    made = upload(alice, b"{}", "mine.jsonl")
    known = json.loads((folder_of(server) / f"{made.id}.json").read_text())
    assert (known["client"], known["filename"], known["num_bytes"]) == ("alice", "mine.jsonl", 2)
