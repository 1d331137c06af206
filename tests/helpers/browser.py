"""A page in a real browser, headless, by the DevTools protocol over pipes: no driver, no further package."""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass, field


def browser():
    """The program, or None."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return os.environ.get("CVA_TEST_BROWSER") or next(filter(None, map(shutil.which, names)), None)


@dataclass
class Browsed:
    """What a page did: errors and console messages of that kind, addresses it asked for beside itself, its title, a picture,
    and the PDF that it prints as."""

    errors: list = field(default_factory=list)
    requests: list = field(default_factory=list)
    title: str = ""
    picture: bytes = b""
    paper: bytes = b""


def browse(file, width=1200, script="", height=900, media=""):
    """Open a page, run ``script`` in it after it has loaded, and look at it; ``media="print"``: as on paper."""
    found = Browsed()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, _Session(profile) as session:
        target = session.ask("Target.createTarget", url="about:blank")["targetId"]
        session.id = session.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Runtime", "Network", "Page", "Log"):
            session.ask(f"{domain}.enable")
        session.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        session.ask("Emulation.setEmulatedMedia", media=media)
        session.ask("Page.navigate", url=f"file://{file}")
        session.wait("Page.loadEventFired")
        if script:
            answer = session.ask("Runtime.evaluate", expression=f"(() => {{ {script} }})()", awaitPromise=True)
            if "exceptionDetails" in answer:
                found.errors.append(str(answer["exceptionDetails"]))
        found.title = session.ask("Runtime.evaluate", expression="document.title")["result"]["value"]
        if media == "print":
            found.paper = base64.b64decode(session.ask("Page.printToPDF", printBackground=True)["data"])
        found.picture = base64.b64decode(session.ask("Page.captureScreenshot", captureBeyondViewport=True)["data"])
        for event in session.events:
            method, values = event["method"], event["params"]
            if method == "Runtime.exceptionThrown" or (method == "Runtime.consoleAPICalled" and values["type"] == "error"):
                found.errors.append(str(values))
            if method == "Log.entryAdded" and values["entry"]["level"] == "error":
                found.errors.append(str(values))
            if method == "Network.requestWillBeSent":
                url = values["request"]["url"]
                if not url.startswith(("data:", f"file://{file}")):
                    found.requests.append(url)
    return found


class _Session:
    """Messages to and from the browser, each ended by a zero byte, over its file descriptors 3 and 4."""

    def __init__(self, profile):
        self.events, self.id, self._number, self._rest = [], None, 0, b""
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()

        def connect():
            a, b = os.dup(to_read), os.dup(to_write)
            os.dup2(a, 3)
            os.dup2(b, 4)

        options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe")
        self._process = subprocess.Popen(
            [browser(), *options, f"--user-data-dir={profile}", "about:blank"],
            preexec_fn=connect,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.wait()
        os.close(self._read)
        os.close(self._write)

    def ask(self, method, **parameters):
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self.id is not None and not method.startswith("Target."):
            message["sessionId"] = self.id
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def wait(self, method):
        while not any(e.get("method") == method for e in self.events):
            self.events.append(self._next())

    def _next(self):
        end = time.monotonic() + 120
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], max(0, end - time.monotonic()))
            assert ready, "the browser does not answer"
            part = os.read(self._read, 1 << 20)
            assert part, "the browser has ended"
            self._rest += part
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)
