"""Headless Chromium, and what tests do with an open page of features."""

import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)

# Chromium wants its pipe at file descriptors 3 and 4.
LAUNCHER = """
import fcntl, os, sys
pipe = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3]]
os.dup2(pipe[0], 3), os.dup2(pipe[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
FLAGS = (
    "headless",
    "no-sandbox",  # it has none as root, in a container
    "disable-gpu",
    "disable-dev-shm-usage",
    "no-first-run",
    "disable-background-networking",
    "remote-debugging-pipe",
)


WAIT_S = 90  # a crowded machine opens 16 MB in 10 s or more


class Browser:
    """Headless Chromium, steered through its debugging pipe: JSON messages that end in a zero."""

    def __init__(self, profile: Path):
        (read_there, self.write_here), (self.read_here, write_there) = os.pipe(), os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, str(read_there), str(write_there), CHROMIUM]
            + [f"--{flag}" for flag in FLAGS]
            + [f"--user-data-dir={profile}"],
            pass_fds=(read_there, write_there),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_there)
        os.close(write_there)
        self.buffer, self.n_sent, self.events, self.session = b"", 0, [], None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Runtime", "Log", "Network", "Page"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters) -> dict:
        answer = self._ask(method, parameters)
        assert "error" not in answer, answer
        return answer["result"]

    def _ask(self, method: str, parameters: dict) -> dict:
        self.n_sent += 1
        message = {"id": self.n_sent, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.write_here, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self.n_sent:
            self.events.append(answer)
        return answer

    def _read(self, timeout_s: float = WAIT_S) -> dict:
        end = time.monotonic() + timeout_s
        while b"\0" not in self.buffer:
            ready = select.select([self.read_here], [], [], max(0, end - time.monotonic()))[0]
            assert ready, "no answer from chromium"
            data = os.read(self.read_here, 1 << 20)
            assert data, "chromium has ended"
            self.buffer += data
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def run(self, script: str) -> object:
        """The value of a JavaScript expression, awaited."""
        answer = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def open(self, path: Path, address: str = "", *, width: int = 1200, height: int = 900) -> None:
        """Opens the page afresh and waits until it is unpacked or says that it cannot be."""
        size = dict(width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.call("Page.navigate", url="about:blank")
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri() + address)
        self.wait("document.readyState === 'complete' && "
                  "!document.getElementById('status')?.textContent.startsWith('Unpacking')"
                  " || document.querySelector('main')?.hidden === false")  # fmt: skip

    def cpu_seconds(self) -> float:
        """Of all its processes that live: what the clock would show if nobody else were there."""
        seconds, waiting = 0.0, [self.process.pid]
        while waiting:
            here = Path(f"/proc/{waiting.pop()}")
            times = (here / "stat").read_text().rpartition(")")[2].split()[11:13]
            seconds += sum(map(int, times)) / os.sysconf("SC_CLK_TCK")
            for children in here.glob("task/*/children"):
                waiting += children.read_text().split()
        return seconds

    def wait(self, condition: str) -> None:
        """Until it holds, on this page or the one that it is turning to."""
        end = time.monotonic() + WAIT_S
        asked = {"expression": f"Boolean({condition})", "returnByValue": True}
        while True:
            answer = self._ask("Runtime.evaluate", asked)
            if answer.get("result", {}).get("result", {}).get("value") is True:
                return
            assert time.monotonic() < end, condition
            time.sleep(0.01)

    def frame(self) -> None:
        """Waits for the next frame: what was scrolled has told the page so by then."""
        self.run("new Promise(requestAnimationFrame)")

    def key(self, name: str) -> None:
        """A character is written where text is, as by a keyboard."""
        text = {"Enter": "\r"}.get(name, name if len(name) == 1 else "")
        self.call("Input.dispatchKeyEvent", type="keyDown", key=name, code=name, text=text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=name, code=name)

    def type(self, text: str) -> None:
        """Into what has the focus."""
        self.call("Input.insertText", text=text)

    def mouse(self, selector: str, *, click: bool = False) -> None:
        """Moves the mouse to the middle of the element, and clicks."""
        element = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{element}.scrollIntoView({{block: 'nearest'}})")
        self.frame()
        x, y = self.run(f"""(() => {{ const box = {element}.getClientRects()[0];
            return [box.x + box.width / 2, box.y + box.height / 2]; }})()""")
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for kind in ("mousePressed", "mouseReleased") if click else ():
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def complaints(self) -> list[dict]:
        """Exceptions and console messages since the page was opened, and what it asked for other
        than pages of this machine."""
        self.run("new Promise(resolve => setTimeout(resolve, 20))")
        bad = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        asked = [e for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        asked = [
            e
            for e in asked
            if e["params"].get("type") != "Document"
            or not e["params"]["request"]["url"].startswith(("file:", "about:"))
        ]
        return [event for event in self.events if event.get("method") in bad] + asked

    def close(self) -> None:
        self.session = None
        self.call("Browser.close")
        self.process.wait(20)
        os.close(self.write_here)
        os.close(self.read_here)


class Page:
    """What the tests do with an open features.html."""

    def __init__(self, browser: Browser):
        self.browser = browser

    def text(self, selector: str) -> str:
        return self.browser.run(f"document.querySelector({json.dumps(selector)}).textContent")

    def texts(self, selector: str) -> list[str]:
        elements = f"document.querySelectorAll({json.dumps(selector)})"
        return self.browser.run(f"Array.from({elements}, element => element.textContent)")

    def features(self) -> list[int]:
        """The list's features, in its order: all of them, not only the rows in view."""
        return self.browser.run("shown")

    def filter(self, query: str) -> list[int]:
        self.browser.run("filter.focus(); filter.select()")
        self.browser.call("Input.insertText", text=query or " ")
        return self.features()

    def sort(self, order: str) -> list[int]:
        self.browser.run(f"""(() => {{ const sort = document.getElementById("sort");
            sort.value = {json.dumps(order)}; sort.dispatchEvent(new Event("input")); }})()""")
        return self.features()

    def selected(self) -> int:
        name = self.text("#name").removeprefix("Feature ")
        rows = self.texts(".option[aria-selected=true] > :first-child")
        assert rows in ([], [name])
        return int(name)
