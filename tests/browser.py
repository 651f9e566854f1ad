"""A headless Chromium on a pipe: opens a page, tells what it asked for and said, presses keys, takes pictures. Standard library only.

`--remote-debugging-pipe` speaks the DevTools protocol on descriptors 3 and 4, one JSON message up to each zero byte; no port is opened.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PATIENCE = 30.0  # seconds for one answer: a start on a loaded machine takes several

FLAGS = (
    "--headless",
    "--remote-debugging-pipe",
    "--no-sandbox",  # root, as in most containers, may not have one; the pages are our own
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--no-default-browser-check",
    "--force-color-profile=srgb",
    "--hide-scrollbars",
)


def chromium() -> str | None:
    """The browser of this machine, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One browser and one page in it; a context manager, for it is a process."""

    def __init__(self, program: str, profile: Path) -> None:
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        for descriptor in (theirs_in, theirs_out):
            os.set_inheritable(descriptor, True)
        # The shell puts the two ends where the protocol wants them, then becomes the browser.
        line = f'exec 3<&{theirs_in} 4>&{theirs_out}; exec "$@"'
        flags = [*FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen(
            ["/bin/bash", "-c", line, "bash", program, *flags],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._in, self._out = ours_in, ours_out
        self._buffer = b""
        self._number = 0
        self.events: list[dict[str, Any]] = []
        self._session: str | None = None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.send(f"{domain}.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._out)  # the browser ends when its pipe does
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self._in)

    def send(self, method: str, **parameters: object) -> dict[str, Any]:
        """One command and its answer; what the browser tells meanwhile is kept in `events`."""
        self._number += 1
        session = {"sessionId": self._session} if self._session else {}
        os.write(self._out, json.dumps({"id": self._number, "method": method, "params": parameters, **session}).encode() + b"\0")
        while True:
            message = self._next()
            if message.get("id") == self._number:
                assert "error" not in message, (method, message["error"])
                result: dict[str, Any] = message["result"]
                return result
            self.events.append(message)

    def open(self, url: str) -> list[dict[str, Any]]:
        """Loads a page to its end; returns what the browser told on the way."""
        self.events = []
        self.send("Page.navigate", url=url)
        while not self.told("Page.loadEventFired"):
            self.events.append(self._next())
        self.value("new Promise(done => requestAnimationFrame(() => setTimeout(done, 0)))")  # laid out, and complaints delivered
        return self.events

    def told(self, method: str) -> list[dict[str, Any]]:
        """The parameters of every event of this name since the page was opened."""
        return [event["params"] for event in self.events if event.get("method") == method]

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives, awaited; the page's own policy does not bind this."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def screen(self, width: int, height: int = 900) -> None:
        """The window's size in CSS pixels."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def scheme(self, name: str) -> None:
        """`light` or `dark`, as the reader's system asks for it."""
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def press_tab(self) -> None:
        key = {"key": "Tab", "code": "Tab", "windowsVirtualKeyCode": 9}
        self.send("Input.dispatchKeyEvent", type="rawKeyDown", **key)
        self.send("Input.dispatchKeyEvent", type="keyUp", **key)

    def picture(self, *, whole: bool = False) -> bytes:
        """A PNG of what the window shows, or of the whole page."""
        return base64.b64decode(self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"])

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE
        while b"\0" not in self._buffer:
            assert select.select([self._in], [], [], max(0.0, end - time.monotonic()))[0], "the browser does not answer"
            more = os.read(self._in, 1 << 20)
            assert more, f"the browser ended: exit code {self.process.wait()}"
            self._buffer += more
        text, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        return message


def main() -> None:
    """`python -m tests.browser FOLDER`: a picture of every sample, light, dark and on a phone, to look at."""
    import tempfile

    from olmodebug.render.html import html
    from tests.test_pages import PAGES

    folder = Path(sys.argv[1])
    program = chromium()
    assert program, "no Chromium is installed"
    with tempfile.TemporaryDirectory() as profile, Browser(program, Path(profile)) as browser:
        for name, report in PAGES.items():
            (folder / f"{name}.html").write_text(html(report), encoding="utf-8")
            for width, scheme in ((1200, "light"), (1200, "dark"), (390, "light")):
                browser.screen(width)
                browser.scheme(scheme)
                browser.open((folder / f"{name}.html").resolve().as_uri())
                browser.screen(width, browser.value("document.documentElement.scrollHeight"))
                (folder / f"{name}-{width}-{scheme}.png").write_bytes(browser.picture())


if __name__ == "__main__":
    main()
