"""Gauges, the list of requests, and the key that both need."""

import time

import pytest

from tests.server.page.steps import IDLE, ask, fill, forgive, row

pytestmark = pytest.mark.browser


def test_gauges_move_and_the_line_grows(page, fake):
    page.until("document.getElementById('rate').textContent !== '–'")
    seen = {page.text("#rate")}
    points = "document.querySelector('#spark .line').getAttribute('d').split(/[ML]/).length"
    before = page.run(points)
    end_s = time.monotonic() + 20
    while len(seen) < 3 and time.monotonic() < end_s:
        time.sleep(0.2)
        seen.add(page.text("#rate"))
    assert len(seen) >= 3
    assert page.run(points) > before
    assert page.text("#hits") == "38 %"
    assert page.run("document.getElementById('hits-bar').getAttribute('aria-valuenow')") == "38"


def test_nothing_is_read_while_nobody_looks(page, fake):
    hide = """(isHidden) => {
      Object.defineProperty(document, "hidden", { value: isHidden, configurable: true });
      document.dispatchEvent(new Event("visibilitychange"));
    }"""
    page.run(f"({hide})(true)")
    page.run("fetch('stats').then((answer) => answer.text())")  # a reading under way has ended by then
    before = fake.num_stats
    time.sleep(1.5)
    assert fake.num_stats == before
    page.run(f"({hide})(false)")
    end_s = time.monotonic() + 10
    while fake.num_stats == before and time.monotonic() < end_s:
        time.sleep(0.02)
    assert fake.num_stats > before


def test_requests_are_listed_with_their_times(page, fake):
    now_s = time.perf_counter()
    fake.rows = [row(2, now_s, finish_reason=None, finished_s=None, client="<b>eve</b>"), row(1, now_s, preemptions=2)]
    page.until("document.querySelectorAll('#requests li').length === 2")
    bars = "[...document.querySelectorAll('#requests li:last-child .timeline i')]"
    queued, prefill, decode = page.run(f"{bars}.map((bar) => bar.getBoundingClientRect().width)")
    assert queued == pytest.approx(prefill, rel=0.02) == pytest.approx(decode, rel=0.02)
    assert queued > 5
    words = page.text("#requests li:last-child .words")
    for part in ("100 (64 cached) → 20 tokens", "3.00 s", "first 2.00 s", "preempted 2×"):
        assert part in words
    assert page.text("#requests li:first-child .finish") == "running"
    assert page.text("#requests li:first-child .what") == "chat · <b>eve</b>"
    fake.rows = [row(2, now_s, finish_reason="abort")]
    page.until("document.querySelectorAll('#requests li').length === 1")
    assert page.text("#requests .finish") == "abort"


def test_a_key_is_asked_for_and_kept_for_this_tab_only(page, browser, fake):
    fake.key = "secret"
    page.open(f"{fake.url}/")
    page.until("document.getElementById('health').textContent.includes('API key')")
    assert page.run("document.getElementById('send').disabled")
    forgive(page, 401)
    fill(page, "key", "secret")
    page.until(IDLE)
    assert ask(page, "hello") == "You said: hello"
    assert page.run("JSON.stringify(localStorage) + document.cookie") == "{}"
    assert page.run("Object.values(sessionStorage)") == ["secret"]
    fill(page, "key", "wrong")
    page.until("document.getElementById('health').textContent.includes('unknown')")
    forgive(page, 401)
