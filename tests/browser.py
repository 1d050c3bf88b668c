"""A page in headless Chromium, driven over the DevTools protocol through two pipes; needs no package."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import itertools
import json
import os
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "chrome-headless-shell", "google-chrome")
CHROMIUM = next((found for name in NAMES if (found := shutil.which(name))), None)
_FLAGS = (
    "--headless=new --remote-debugging-pipe --disable-gpu --disable-dev-shm-usage --no-first-run --hide-scrollbars "
    "--disable-background-networking --disable-component-update --disable-sync --disable-extensions"
).split()
_PATIENCE = 60.0
"""Seconds to wait for an answer, on a busy machine."""


@dataclass
class Browser:
    """One tab."""

    to: int
    back: int
    session: str = ""
    events: list[dict[str, Any]] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    _rest: bytes = b""

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a command; events that come before it are kept."""
        number = next(self._numbers)
        request = {"id": number, "method": method, "params": parameters}
        request |= {"sessionId": self.session} if self.session else {}
        os.write(self.to, json.dumps(request).encode() + b"\0")
        while (message := self._message()).get("id") != number:
            self.events.append(message)
        assert "error" not in message, (method, message["error"])
        return message["result"]

    def open(self, page: Path) -> None:
        self.ask("Page.navigate", url=page.resolve().as_uri())
        deadline = time.monotonic() + _PATIENCE
        while self.value("document.readyState") != "complete" or self.value("location.href") == "about:blank":
            assert time.monotonic() < deadline, "the page does not come up"
            time.sleep(0.02)

    def value(self, expression: str) -> Any:
        """The value of an expression of JavaScript."""
        result = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def appear(self, width: int, scheme: str = "light") -> None:
        """Set the width of the window, and "light" or "dark"."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def picture(self) -> bytes:
        """All of the page as PNG."""
        shot = self.ask("Page.captureScreenshot", captureBeyondViewport=True, clip=self._extent())
        return base64.b64decode(shot["data"])

    def complaints(self) -> list[str]:
        """Errors and warnings of the console, and exceptions."""
        found = []
        for event in self.events:
            told = event.get("params", {})
            if event.get("method") == "Runtime.exceptionThrown":
                found.append(str(told["exceptionDetails"]))
            elif event.get("method") == "Log.entryAdded" or (
                event.get("method") == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert")
            ):
                found.append(str(told.get("entry", told)))
        return found

    def requests(self) -> list[str]:
        """The addresses that were asked for."""
        return [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]

    def _extent(self) -> dict[str, float]:
        size = self.ask("Page.getLayoutMetrics")["cssContentSize"]
        return {**size, "scale": 1}

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self.back], [], [], _PATIENCE)
            assert ready, "Chromium does not answer"
            data = os.read(self.back, 1 << 16)
            assert data, "Chromium has ended"
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        return message


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A browser with an empty tab; it ends with the block."""
    assert CHROMIUM is not None
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    high_in, high_out = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (theirs_in, theirs_out))
    os.close(theirs_in)
    os.close(theirs_out)
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses to run as root with it
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        places = [
            (os.POSIX_SPAWN_DUP2, high_in, 3),  # where the protocol is spoken
            (os.POSIX_SPAWN_DUP2, high_out, 4),
            *((os.POSIX_SPAWN_OPEN, stream, os.devnull, os.O_WRONLY, 0) for stream in (1, 2)),
        ]
        command = [CHROMIUM, *_FLAGS, *sandbox, f"--user-data-dir={profile}", "about:blank"]
        process = os.posix_spawn(CHROMIUM, command, os.environ, file_actions=places)
        os.close(high_in)
        os.close(high_out)
        try:
            yield _tab(Browser(ours_out, ours_in))
        finally:
            os.close(ours_out)
            os.close(ours_in)
            with contextlib.suppress(ProcessLookupError):  # it ends by itself when its pipe is closed
                os.kill(process, signal.SIGTERM)
            os.waitpid(process, 0)


def _tab(opened: Browser) -> Browser:
    target = opened.ask("Target.createTarget", url="about:blank")["targetId"]
    opened.session = opened.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    for domain in ("Page", "Runtime", "Log", "Network"):
        opened.ask(f"{domain}.enable")
    return opened
