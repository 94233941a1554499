"""A headless Chromium, driven over its debugging pipe: one start serves every page, size and colour scheme."""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-extensions")
PATIENCE = 60  # seconds
CONNECT = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
"""Puts the pipes where --remote-debugging-pipe looks for them: it reads from descriptor 3 and writes to 4."""


def find() -> str | None:
    """The browser's program, if there is one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Chromium:
    """One browser with one tab. Events since the last `go` are kept in `events`."""

    def __init__(self, program: str, profile: Path) -> None:
        (child_in, out), (back, child_out) = os.pipe(), os.pipe()
        child_in, child_out = (fcntl.fcntl(pipe, fcntl.F_DUPFD, 10) for pipe in (child_in, child_out))
        words = [program, *FLAGS, f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"]
        self.process = subprocess.Popen(
            [sys.executable, "-c", CONNECT, str(child_in), str(child_out), *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(child_in, child_out),
            start_new_session=True,
        )
        os.close(child_in)
        os.close(child_out)
        self.sink, self.source, self.heard = os.fdopen(out, "wb"), back, b""
        self.count, self.session, self.events = 0, "", list[dict[str, Any]]()
        target = next(info for info in self.ask("Target.getTargets")["targetInfos"] if info["type"] == "page")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the DevTools protocol."""
        self.count += 1
        call = {"id": self.count, "method": method, "params": parameters} | ({"sessionId": self.session} if self.session else {})
        self.sink.write(json.dumps(call).encode() + b"\0")
        self.sink.flush()
        while (message := self._next()).get("id") != self.count:
            self.events.append(message)
        assert "error" not in message, message
        return dict(message["result"])

    def go(self, path: Path, width: int, dark: bool) -> None:
        """Open a file in a window of that width and colour scheme, until it has loaded."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.events.clear()
        self.ask("Page.navigate", url=path.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        result = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def press(self, element: str, how: str) -> None:
        """Press an element as people do, by mouse (`click`) or by a key once the element has the focus."""
        if how == "click":
            self.evaluate(f"{element}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
            box = self.evaluate(f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])({element}.getBoundingClientRect())")
            for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
                self.ask("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=int(kind != "mouseMoved"))
            return
        self.evaluate(f"{element}.focus()")
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r" if how == "Enter" else how} if kind == "keyDown" else {}
            self.ask("Input.dispatchKeyEvent", type=kind, key=how, windowsVirtualKeyCode=13 if how == "Enter" else 32, **text)

    def rest(self) -> None:
        """Move the mouse out of the way."""
        self.ask("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)

    def complaints(self) -> list[dict[str, Any]]:
        """What the page wrote to the console, threw, or had reported about it."""
        told = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [event for event in self.events if event.get("method") in told]

    def requests(self) -> list[str]:
        """Every address that was asked for."""
        return [event["params"]["request"]["url"] for event in self.events if event.get("method") == "Network.requestWillBeSent"]

    def close(self) -> None:
        """End the browser and all of its processes."""
        self.sink.close()
        os.close(self.source)
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=30)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.heard:
            ready, _, _ = select.select([self.source], [], [], PATIENCE)
            part = os.read(self.source, 1 << 16) if ready else b""
            assert part, "the browser is gone" if ready else f"the browser said nothing for {PATIENCE} seconds"
            self.heard += part
        text, _, self.heard = self.heard.partition(b"\0")
        return dict(json.loads(text))
