"""Headless Chromium over its DevTools pipe (two file descriptors, JSON messages that end in NUL): no driver, no library."""

import base64
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_FLAGS = (
    "--headless",
    "--no-sandbox",  # containers lack what the sandbox needs; only pages of our own are opened
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--no-first-run",
    "--no-default-browser-check",
    "--remote-debugging-pipe",
)


def find() -> str | None:
    """Where a Chromium is installed, if any."""
    return next((path for path in map(shutil.which, _NAMES) if path), None)


class PageError(AssertionError):
    """Something was wrong on the page, or never came."""


class Chromium:
    """One browser with one page. `with Chromium() as page: page.open(url)`."""

    def __init__(self, timeout_s: float = 30.0):
        self.timeout_s = timeout_s
        self.complaints: list[str] = []  # errors and warnings of the console, exceptions, what CSP has stopped
        self.hosts: set[str] = set()  # who was asked for anything, as "scheme://host:port"
        self._ids = itertools.count(1)
        self._session = ""
        self._events: deque[dict[str, Any]] = deque()
        self._buffer = b""

    def __enter__(self) -> Self:
        binary = find()
        assert binary is not None, "there is no Chromium"
        self._folder = tempfile.mkdtemp(prefix="chromium-")
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        # Chromium wants the pipe at 3 and 4, and a shell is the simple way to put it there.
        command = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self._process = subprocess.Popen(
            ["/bin/bash", "-c", command, binary, *_FLAGS, f"--user-data-dir={self._folder}", "about:blank"],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            target = self.call("Target.createTarget", url="about:blank")["targetId"]
            self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.call(f"{domain}.enable")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        os.close(self._out)  # it leaves when its pipe is closed
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        os.close(self._in)
        shutil.rmtree(self._folder, ignore_errors=True)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One DevTools command; what it returns.

        Raises:
          PageError: the browser refused it, or did not answer in time.
        """
        number = next(self._ids)
        message = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        end_s = time.monotonic() + self.timeout_s
        while True:
            answer = self._read(end_s, f"{method} was not answered")
            if answer.get("id") == number:
                if "error" in answer:
                    raise PageError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self._note(answer)

    def open(self, url: str) -> None:
        """Go to a page; returns when it is loaded, modules and all."""
        self._events.clear()
        self.call("Page.navigate", url=url)
        end_s = time.monotonic() + self.timeout_s
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._note(self._read(end_s, f"{url} was not loaded"))

    def run(self, script: str) -> Any:
        """The JSON value of an expression, awaited if it is a promise."""
        result = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True
        )
        if "exceptionDetails" in result:
            details = result["exceptionDetails"]
            raise PageError(details.get("exception", {}).get("description") or details["text"])
        return result["result"].get("value")

    def until(self, script: str, timeout_s: float = 20.0) -> None:
        """Wait until an expression is true, as JavaScript sees it."""
        end_s = time.monotonic() + timeout_s
        while not self.run(f"Boolean({script})"):
            if time.monotonic() > end_s:
                raise PageError(f"never came true: {script}\n{self.run('document.body.innerText')}")
            time.sleep(0.03)

    def text(self, selector: str) -> str:
        """What stands in the first element of a CSS selector. Blanks are blanks, whether lines break there or not."""
        return self.run(f"document.querySelector({json.dumps(selector)}).textContent").replace("\xa0", " ")

    def click(self, selector: str) -> None:
        """A real click on the middle of an element, which must be visible there."""
        where = self.run(
            f"""(() => {{
              const element = document.querySelector({json.dumps(selector)});
              element.scrollIntoView({{ block: "center" }});
              const box = element.getBoundingClientRect();
              const x = box.x + box.width / 2, y = box.y + box.height / 2;
              return {{ x, y, isHit: element.contains(document.elementFromPoint(x, y)) }};
            }})()"""
        )
        if not where["isHit"]:
            raise PageError(f"{selector} cannot be clicked: something else is there, or it is hidden")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=where["x"], y=where["y"], button="left", clickCount=1)

    def type(self, text: str) -> None:
        """Text into whatever has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, modifiers: int = 0) -> None:
        """A key by its DOM name, such as "Enter"; modifiers: 8 is Shift."""
        codes = {"Enter": (13, "\r"), "Escape": (27, ""), "Tab": (9, "")}
        code, text = codes[key]
        common = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def resize(self, width: int, height: int, *, is_phone: bool = False, scale: float = 1) -> None:
        """The size of the window's inside, in CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=is_phone,
        )

    def prefer(self, scheme: str) -> None:
        """Wear "light" or "dark"."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def screenshot(self, path: Path) -> None:
        """What is to be seen, as PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def _read(self, end_s: float, what: str) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            left_s = end_s - time.monotonic()
            if left_s <= 0 or not select.select([self._in], [], [], left_s)[0]:
                raise PageError(f"{what} within {self.timeout_s:g} s")
            data = os.read(self._in, 1 << 16)
            if not data:
                raise PageError("the browser has ended")
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        method, params = event.get("method", ""), event.get("params", {})
        self._events.append(event)
        look: dict[str, Callable[[], None]] = {
            "Runtime.exceptionThrown": lambda: self._complain(params["exceptionDetails"]),
            "Runtime.consoleAPICalled": lambda: (
                self._complain(params) if params["type"] in ("error", "warning") else None
            ),
            "Log.entryAdded": lambda: self._complain(params["entry"]) if params["entry"]["level"] != "info" else None,
            "Network.requestWillBeSent": lambda: self._note_host(params["request"]["url"]),
        }
        look.get(method, lambda: None)()

    def _complain(self, what: dict[str, Any]) -> None:
        self.complaints.append(json.dumps(what))

    def _note_host(self, url: str) -> None:
        if not url.startswith(("about:", "data:", "blob:")):
            self.hosts.add("/".join(url.split("/", 3)[:3]))
