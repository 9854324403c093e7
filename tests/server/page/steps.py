"""What is done with the page: the steps that tests are made of."""

import json
from typing import Any

from chromium import Chromium

IDLE = "!document.getElementById('send').hidden && !document.getElementById('send').disabled"
LAST = "document.querySelector('.answer:last-of-type')"


def visit(browser: Chromium, url: str) -> None:
    """Open the page anew, on a desktop, and wait until messages can be sent."""
    browser.open("about:blank")  # so that the page before asks for nothing more
    browser.complaints.clear()
    browser.hosts.clear()
    browser.resize(1280, 800)
    browser.open(f"{url}/")
    browser.until(IDLE)


def forgive(page: Chromium, status: int) -> None:
    """Chromium writes every refused request to the console, whatever the page makes of it."""
    page.run("0")
    expected = [text for text in page.complaints if f"status of {status}" in text]
    assert expected, page.complaints
    for text in expected:
        page.complaints.remove(text)


def say(page: Chromium, text: str) -> None:
    page.run("document.getElementById('prompt').focus()")
    page.type(text)
    page.press("Enter")


def ask(page: Chromium, text: str) -> str:
    """Send a message and wait for the end of its answer."""
    say(page, text)
    page.until(f"{IDLE} && {LAST}")
    return page.text(".answer:last-of-type .blocks")


def fill(page: Chromium, field: str, value: str) -> None:
    page.run(
        f"""(() => {{
          const field = document.getElementById({json.dumps(field)});
          field.value = {json.dumps(value)};
          for (const name of ["input", "change"]) field.dispatchEvent(new Event(name, {{ bubbles: true }}));
        }})()"""
    )


def row(number: int, now_s: float, **changes: Any) -> dict[str, Any]:
    """A request of three seconds: one queued, one of prefill, one of decode."""
    base = {
        "id": f"chatcmpl-{number}", "kind": "chat", "model": "toy", "client": "ada", "arrival_s": now_s - 3,
        "started_s": now_s - 2, "first_token_s": now_s - 1, "finished_s": now_s, "prompt_tokens": 100, "cached_tokens": 64,
        "output_tokens": 20, "finish_reason": "stop", "preemptions": 0,
    }  # fmt: skip
    return base | changes
