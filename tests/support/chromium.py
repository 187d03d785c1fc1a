"""A headless Chromium that tests look at pages with, by its DevTools protocol over two pipes; nothing else is needed.

The protocol: JSON messages that end with a zero byte; file descriptor 3 of the browser reads, 4 writes.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_OPTIONS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions"),
    *("--no-default-browser-check", "--disable-dev-shm-usage", "--hide-scrollbars", "--mute-audio"),
)


def find_chromium() -> str | None:
    """Return the path of a Chromium; None without one."""
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


class Chromium:
    """A browser. ``open_page`` gives pages; the process ends with the context."""

    def __init__(self, profile: Path) -> None:
        """Start the browser with its profile in a new folder."""
        program = find_chromium()
        assert program is not None, "find_chromium says whether there is one"
        self._in, browser_writes = os.pipe()
        browser_reads, self._out = os.pipe()
        # The shell gives the pipes their numbers; a function in the child would have to fork a process with threads.
        line = f'exec "$@" 3<&{browser_reads} 4>&{browser_writes}'
        self._process = subprocess.Popen(
            ["bash", "-c", line, "chromium", program, *_OPTIONS, f"--user-data-dir={profile}", "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(browser_reads, browser_writes),
        )
        os.close(browser_writes)
        os.close(browser_reads)
        self._buffer = b""
        self._number = 0
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.call("Browser.close")
            self._process.wait(10)
        except (BrokenPipeError, EOFError, TimeoutError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def call(self, method: str, session: str | None = None, timeout: float = 60, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result; events that arrive meanwhile are kept.

        Raises: AssertionError with the browser's message, TimeoutError, EOFError if the browser has ended.
        """
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {} if session is None else {"sessionId": session}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + timeout
        while True:
            answer = self._read(deadline)
            if answer is None:
                raise TimeoutError(f"{method}: no answer in {timeout} s")
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.events.append(answer)

    def collect_events(self, seconds: float) -> None:
        """Read events for some time."""
        deadline = time.monotonic() + seconds
        while (event := self._read(deadline)) is not None:
            self.events.append(event)

    @contextmanager
    def open_page(self, url: str, *, width: int = 1400, height: int = 1000, dark: bool = False) -> Iterator["Page"]:
        """Open a page in a tab of its own, wait until it is loaded, and close it at the end."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        page.set_dark(dark)
        page.set_size(width, height)
        page.call("Page.navigate", url=url)
        page.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'")
        try:
            yield page
        finally:
            self.call("Target.closeTarget", targetId=target)

    def _read(self, deadline: float) -> dict[str, Any] | None:
        """Return the next message; None at the deadline. Raises: EOFError."""
        while b"\0" not in self._buffer:
            if not select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return None
            chunk = os.read(self._in, 1 << 20)
            if not chunk:
                raise EOFError("Chromium has ended")
            self._buffer += chunk
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)


class Page:
    """A tab of a browser."""

    def __init__(self, browser: Chromium, session: str) -> None:
        self._browser, self._session = browser, session

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol in this tab."""
        return self._browser.call(method, self._session, **parameters)

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression. Raises: AssertionError if it throws."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, condition: str, seconds: float = 60) -> None:
        """Wait until a JavaScript condition holds. Raises: TimeoutError."""
        deadline = time.monotonic() + seconds
        while not self.evaluate(condition):
            if time.monotonic() > deadline:
                raise TimeoutError(condition)
            time.sleep(0.05)

    def set_dark(self, dark: bool, *, media: str = "") -> None:
        """Emulate a preference for dark or light, and a medium such as ``print``."""
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", media=media, features=features)

    def set_size(self, width: int, height: int) -> None:
        """Set the size of the window in CSS pixels."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def screenshot(self, file: Path, *, max_height: int = 16000) -> None:
        """Write the whole page as PNG."""
        height = min(max_height, int(self.evaluate("document.documentElement.scrollHeight")))
        width = int(self.evaluate("document.documentElement.clientWidth"))
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        shot = self.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))

    def print_to_pdf(self) -> bytes:
        """Return the page as the printer would get it."""
        return base64.b64decode(self.call("Page.printToPDF", printBackground=False)["data"])

    def complaints(self) -> list[str]:
        """Return what the page said on its console: errors, warnings, exceptions, refused resources."""
        return [text for event in self._own_events() if (text := _complaint(event))]

    def requests(self, ignore: Callable[[str], bool] = lambda url: url.startswith("data:")) -> list[str]:
        """Return the addresses that the page asked for."""
        urls = [
            event["params"]["request"]["url"]
            for event in self._own_events()
            if event["method"] == "Network.requestWillBeSent"
        ]
        return [url for url in urls if not ignore(url)]

    def _own_events(self) -> list[dict[str, Any]]:
        self._browser.collect_events(0.05)
        return [event for event in self._browser.events if event.get("sessionId") == self._session]


def _complaint(event: dict[str, Any]) -> str:
    parameters = event.get("params", {})
    if event["method"] == "Runtime.exceptionThrown":
        return json.dumps(parameters["exceptionDetails"])[:500]
    if event["method"] == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
        return f"{parameters['entry']['level']}: {parameters['entry']['text']}"
    if event["method"] == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
        return f"{parameters['type']}: {json.dumps(parameters['args'])[:500]}"
    return ""
