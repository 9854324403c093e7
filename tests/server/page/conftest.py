"""One browser for all tests of a worker, a pretend server for odd cases, and the real one for the plain case."""

import chromium
import pytest

from tests.server.conftest import serving
from tests.server.page.fake_openai import FakeOpenAI
from tests.server.page.steps import visit


@pytest.fixture(scope="session")
def browser():
    if chromium.find() is None:
        pytest.skip("no Chromium is installed")
    try:
        started = chromium.Chromium().__enter__()
    except chromium.PageError as error:
        pytest.skip(f"Chromium does not start here: {error}")
    yield started
    started.__exit__()


@pytest.fixture(scope="session")
def fake():
    made = FakeOpenAI()
    with serving(made.app) as running:
        made.url = running.url
        yield made


@pytest.fixture
def page(browser, fake):
    """The page, fresh and ready. Afterwards: the console is clean, and nobody else was asked for anything."""
    fake.key, fake.rows, fake.num_left = "", [], 0
    fake.bodies.clear()
    visit(browser, fake.url)
    browser.run("sessionStorage.clear()")
    yield browser
    browser.run("0")  # what the console has said until now is here
    assert browser.complaints == []
    assert browser.hosts == {fake.url}


@pytest.fixture
def real(browser, server):
    """The page of a real server, with the bundled model. Afterwards its engine is idle."""
    visit(browser, server.url)
    yield browser
    browser.until("document.getElementById('running').textContent === '0'")
    assert browser.complaints == []
    assert browser.hosts == {server.url}
