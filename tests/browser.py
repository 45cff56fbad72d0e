"""Pages in headless Chromium, which is told what to do by the protocol of its own tools."""

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "chromium-headless-shell")
_DRAWN = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"


class Browser:
    """One browser with one tab.

    Attributes:
        requested: the addresses that pages asked for since the last one was opened.
        errors: what went wrong in scripts since then.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", send: IO[bytes], told: IO[bytes]):
        self._process, self._send, self._told = process, send, told
        self._session: str | None = None
        self._count = 0
        self.requested: list[str] = []
        self.errors: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime"):
            self.call(f"{domain}.enable")
        self.call(
            "Network.emulateNetworkConditions",
            offline=True, latency=0, downloadThroughput=-1, uploadThroughput=-1,
        )  # fmt: skip

    def call(self, method: str, **params: Any) -> Any:
        """Call a method of the protocol, and wait for what it returns."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        self._send.write(json.dumps(message).encode() + b"\0")
        self._send.flush()
        while (answer := self._next()).get("id") != self._count:
            self._note(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def open(self, page: Path, *, width: int = 1200, dark: bool = False) -> None:
        """Open a file, on a screen of so many pixels, and wait until it is drawn."""
        self.requested, self.errors = [], []
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=900, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=page.absolute().as_uri())
        self.read("new Promise((done) => document.readyState === 'complete' ? done() : "
                  "addEventListener('load', done))")  # fmt: skip
        self.read(_DRAWN)

    def read(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page; a promise's, when it has one."""
        result = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def do(self, statement: str) -> None:
        """Run JavaScript in the page, and wait until what it changes is drawn."""
        self.read(f"{{ {statement} }}; 0")
        self.read(_DRAWN)

    def point(self, x: float, y: float) -> None:
        """Move the mouse there."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        self.read(_DRAWN)

    def picture(self, path: Path) -> Path:
        """Write a PNG of the whole page."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))
        return path

    def _next(self) -> Any:
        text = bytearray()
        while (byte := self._told.read(1)) != b"\0":
            assert byte, f"the browser has ended: {self._process.poll()}"
            text += byte
        return json.loads(text)

    def _note(self, event: Any) -> None:
        params = event.get("params", {})
        if event.get("method") == "Network.requestWillBeSent":
            self.requested.append(params["request"]["url"])
        elif event.get("method") == "Runtime.exceptionThrown":
            self.errors.append(params["exceptionDetails"]["text"])


@contextmanager
def browsing(folder: Path) -> Iterator[Browser]:
    """A browser; where there is none, the test is skipped.

    Args:
        folder: for what the browser keeps.
    """
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        pytest.skip(f"no browser to open a page in: none of {', '.join(_NAMES)} is installed")
    (theirs, send), (told, ours) = os.pipe(), os.pipe()
    # The browser reads from descriptor 3 and writes to 4.
    pipes = f'exec "$@" 3<&{theirs} 4>&{ours} {theirs}<&- {ours}>&-'
    command = [
        "bash", "-c", pipes, "browser", found, "--headless", "--no-sandbox", "--disable-gpu",
        "--disable-dev-shm-usage", "--remote-debugging-pipe", f"--user-data-dir={folder}",
    ]  # fmt: skip
    process = subprocess.Popen(command, pass_fds=(theirs, ours), stderr=subprocess.DEVNULL)
    os.close(theirs)
    os.close(ours)
    try:
        with os.fdopen(send, "wb") as to_it, os.fdopen(told, "rb") as from_it:
            yield Browser(process, to_it, from_it)
    finally:
        process.terminate()
        process.wait(timeout=30)
