"""The files of the page, and what goes along with them."""

import re
from pathlib import Path

import pytest
from starlette.testclient import TestClient

import jaxserve.server
from jaxserve.server.app import create_app
from jaxserve.server.config import ServerConfig

FOLDER = Path(jaxserve.server.__file__).parent / "page"
FILES = sorted(path.name for path in FOLDER.iterdir())


@pytest.fixture(scope="module")
def client():
    """No engine: the page is there while the model is being loaded."""
    return TestClient(create_app(ServerConfig(), ("toy",)), raise_server_exceptions=False)


def test_the_page_is_html_under_a_strict_policy(client):
    response = client.get("/")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = response.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_served_as_it_is(client, name):
    response = client.get(f"/page/{name}")
    assert response.content == (FOLDER / name).read_bytes()
    kind = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    assert response.headers["content-type"].startswith(kind[name.rpartition(".")[2]])
    assert "default-src 'self'" in response.headers["content-security-policy"]


def test_who_has_a_file_already_is_not_sent_it_again(client):
    tag = client.get("/page/main.js").headers["etag"]
    for known in (tag, f'"other", W/{tag}'):
        again = client.get("/page/main.js", headers={"if-none-match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert client.get("/page/main.js", headers={"if-none-match": '"other"'}).status_code == 200
    assert client.get("/page/chat.js").headers["etag"] != tag


@pytest.mark.parametrize(
    "path", ["/page/nothing.js", "/page/..%2fapp.py", "/page/%2e%2e/app.py", "/page//etc/passwd", "/page/"]
)
def test_nothing_else_can_be_reached(client, path):
    response = client.get(path)
    assert response.status_code == 404
    assert "error" in response.json()
    assert "APIRouter" not in response.text


@pytest.mark.parametrize("name", FILES)
def test_no_file_names_a_resource_elsewhere_or_writes_mark_up(name):
    text = (FOLDER / name).read_text().replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://|//[a-z]+\.[a-z]|@import|url\(", text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", text)
    assert not re.search(r"\son[a-z]+=|style=\"|<style|javascript:", text)


def test_all_files_that_files_name_are_there():
    named = set()
    for name in FILES:
        text = (FOLDER / name).read_text()
        named |= set(re.findall(r'from "\./([a-z.]+)"', text)) | set(re.findall(r'(?:src|href)="page/([a-z.]+)"', text))
    assert named <= set(FILES)
    assert set(FILES) - named == {"index.html"}
