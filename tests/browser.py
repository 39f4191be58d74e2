"""Chromium without a window, as a test drives it: through its own pipe, without a driver or a port."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")
SECONDS = 60  # in which it says something


def find() -> str | None:
    return next((found for name in NAMES if (found := shutil.which(name))), None)


@dataclass
class Opened:
    """A page as it was shown: what it asked for beside itself, what it complained of, and how to ask it more."""

    browser: Browser
    requests: list[str]
    errors: list[str]

    def says(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self.browser.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"]["value"]


@dataclass
class Browser:
    """One tab of a running Chromium."""

    to: int
    back: int
    session: str = ""
    heard: bytes = b""
    numbers: Iterator[int] = field(default_factory=itertools.count)
    events: list[dict[str, Any]] = field(default_factory=list)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The answer of a method of the DevTools protocol; what happens meanwhile is kept in `events`."""
        number = next(self.numbers)
        at = {"sessionId": self.session} if self.session else {}
        os.write(self.to, json.dumps({"id": number, "method": method, "params": params, **at}).encode() + b"\0")
        while (said := self._next()).get("id") != number:
            self.events.append(said)
        assert "error" not in said, said
        return said["result"]

    def open(self, path: Path, *, width: int, scheme: str) -> Opened:
        """The page at `path`, that many pixels wide; `scheme` is light or dark."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        while not any(e["method"] == "Page.loadEventFired" for e in self.events):
            self.events.append(self._next())
        asked = [e["params"]["request"]["url"] for e in self._of("Network.requestWillBeSent")]
        own = [e["params"]["entry"]["text"] for e in self._of("Log.entryAdded")]
        thrown = [json.dumps(e["params"]) for e in self._of("Runtime.exceptionThrown", "Runtime.consoleAPICalled")]
        return Opened(self, [url for url in asked if url != path.as_uri()], own + thrown)

    def _of(self, *methods: str) -> list[dict[str, Any]]:
        return [e for e in self.events if e["method"] in methods]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.heard:
            assert select.select([self.back], [], [], SECONDS)[0], f"Chromium says nothing for {SECONDS} seconds"
            said = os.read(self.back, 1 << 16)
            assert said, "Chromium ended"
            self.heard += said
        text, _, self.heard = self.heard.partition(b"\0")
        return json.loads(text)


@contextlib.contextmanager
def chromium(program: str, home: Path) -> Iterator[Browser]:
    """A Chromium that keeps what it keeps in `home`."""
    (reads, to), (back, writes) = os.pipe(), os.pipe()

    def give() -> None:
        # Copies first, as either may be 3 or 4.
        for source, target in [(fcntl.fcntl(fd, fcntl.F_DUPFD, 10), i) for fd, i in ((reads, 3), (writes, 4))]:
            os.dup2(source, target)

    flags = ["--remote-debugging-pipe", "--disable-gpu", "--no-first-run", f"--user-data-dir={home}"]
    # Its sandbox does not start as root.
    flags += ["--no-sandbox"] if os.geteuid() == 0 else []
    with open(home / "log", "wb") as log:
        process = subprocess.Popen(
            [program, "--headless", *flags], close_fds=False, preexec_fn=give, stdout=log, stderr=log
        )
    os.close(reads)
    os.close(writes)
    try:
        browser = Browser(to, back)
        target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        browser.session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            browser.call(f"{domain}.enable")
        yield browser
    finally:
        process.kill()
        process.wait()
        os.close(to)
        os.close(back)
