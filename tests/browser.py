"""Headless Chromium for tests: opens pages from disk, and records everything that a page does.

Driven over the DevTools protocol by aiohttp's client, so the tests need Debian's chromium and nothing else. Every name on
the network is answered by a trap on this machine that writes down who called and hangs up."""

import asyncio
import base64
import json
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import aiohttp
import pytest

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync "
    "--disable-default-apps --disable-extensions --mute-audio --force-color-profile=srgb --hide-scrollbars --remote-debugging-port=0 "
    "--disable-features=Translate,OptimizationHints,MediaRouter,IsolateOrigins,site-per-process --disable-domain-reliability --no-pings"
).split()
OWN = ("accounts.google.com", "android.clients.google.com", "clients2.google.com", "update.googleapis.com", "redirector.gvt1.com", "optimizationguide-pa.googleapis.com", "www.google.com")  # asked by the browser itself, pages or none
KEYS = {"Tab": 9, "Enter": 13, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Escape": 27}
HOOK = "window.planted = what => window.plantedCall(String(what));"  # what planted code calls, in every frame


def chromium() -> str:
    "Path of the browser; a skipped test where there is none."
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not found:
        pytest.skip("chromium is not installed (Debian: apt-get install chromium)")
    return found


def axe() -> str:
    "Source of axe-core; empty where it is not at hand: npm pack axe-core, and name axe.min.js in VALUECOT_AXE."
    places = [os.environ.get("VALUECOT_AXE"), "/tmp/axe/package/axe.min.js", "/tmp/node_modules/axe-core/axe.min.js"]
    for place in filter(None, places):
        if Path(place).is_file():
            return Path(place).read_text(encoding="utf-8")
    return ""


class Trap:
    "A listener that every host name leads to: first lines of what was said to it."

    def __init__(self):
        self.calls, self.server = [], socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self.listen, daemon=True).start()

    @property
    def port(self) -> int:
        return self.server.getsockname()[1]

    def listen(self):
        while True:
            try:
                caller, _ = self.server.accept()
            except OSError:
                return
            with caller:
                caller.settimeout(1)
                try:
                    said = caller.recv(300).decode("latin-1")
                except OSError:
                    said = ""
                self.calls.append(said.split("\r\n")[0])


class Browser:
    "One page, and what it did since it was opened."

    def __enter__(self):
        self.folder, self.trap = Path(tempfile.mkdtemp(prefix="browser-")), Trap()
        flags = [*FLAGS, f"--user-data-dir={self.folder}", f"--proxy-server=127.0.0.1:{self.trap.port}", "--proxy-bypass-list=<-loopback>"]
        self.process = subprocess.Popen([chromium(), *flags, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            self.loop, self.count, self.events = asyncio.new_event_loop(), 0, []
            self.loop.run_until_complete(self.attach())
            for domain in ("Page", "Runtime", "Network", "Log"):
                self.call(f"{domain}.enable")
            self.call("Runtime.addBinding", name="plantedCall")
            self.call("Page.addScriptToEvaluateOnNewDocument", source=HOOK)
            self.call("Page.setDownloadBehavior", behavior="deny")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error):
        if hasattr(self, "socket"):
            self.loop.run_until_complete(self.session.close())
        self.process.kill()
        self.process.wait()
        self.trap.server.close()
        self.loop.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    async def attach(self):
        file, end = self.folder / "DevToolsActivePort", time.monotonic() + 60
        while not (file.exists() and file.read_text().count("\n")):
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"chromium did not start (exit status {self.process.poll()})")
            await asyncio.sleep(0.05)
        base = f"http://127.0.0.1:{file.read_text().split()[0]}"
        self.session = aiohttp.ClientSession(trust_env=False)
        async with self.session.get(f"{base}/json/list") as answer:
            tab = next(t for t in await answer.json() if t["type"] == "page")
        self.socket = await self.session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0)

    # ---- the protocol
    async def send(self, method: str, parameters: dict) -> int:
        self.count += 1
        await self.socket.send_str(json.dumps({"id": self.count, "method": method, "params": parameters}))
        return self.count

    async def read(self, timeout: float) -> dict:
        message = json.loads((await asyncio.wait_for(self.socket.receive(), timeout)).data)
        if "method" in message:
            self.events.append(message)
            if message["method"] == "Page.javascriptDialogOpening":  # it would hold the page
                await self.send("Page.handleJavaScriptDialog", {"accept": True})
        return message

    async def ask(self, method: str, parameters: dict) -> dict:
        number = await self.send(method, parameters)
        while (message := await self.read(150)).get("id") != number:
            pass
        if "error" in message:
            raise RuntimeError(f"{method}: {message['error']['message']}")
        return message["result"]

    def call(self, method: str, **parameters) -> dict:
        "One command of the protocol."
        return self.loop.run_until_complete(self.ask(method, parameters))

    def settle(self, quiet: float = 0.3, most: float = 20):
        "Wait until the page has said nothing for `quiet` seconds."
        end = time.monotonic() + most
        while time.monotonic() < end:
            try:
                self.loop.run_until_complete(self.read(quiet))
            except TimeoutError:
                return

    # ---- what a reader does
    def open(self, page: Path | str, quiet: float = 0.3):
        "Open a page and wait until it is loaded and quiet; what was recorded before is forgotten."
        self.settle(0.05)
        self.events.clear()
        self.trap.calls.clear()
        answer = self.call("Page.navigate", url=page if isinstance(page, str) else page.resolve().as_uri())
        assert "errorText" not in answer, (page, answer)
        end = time.monotonic() + 60
        while self.js("document.readyState") != "complete" and time.monotonic() < end:
            self.settle(0.05)
        self.settle(quiet)

    def js(self, expression: str):
        "Value of an expression; promises are awaited."
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True, userGesture=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"].get("exception", {}).get("description") or answer["exceptionDetails"]))
        return answer["result"].get("value")

    def press(self, key: str, shift: bool = False):
        "Press one of `KEYS`."
        about = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key], "modifiers": 8 if shift else 0}
        text = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **about, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def size(self, width: int, height: int = 900, phone: bool = False):
        "Width and height of the window."
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)

    def dress(self, mode: str):
        "Light or dark, as the theme's own button sets it."
        self.js("document.head.append(Object.assign(document.createElement('style'), {textContent: '* { transition: none !important; animation: none !important; }'}))")  # a fading colour has no contrast
        self.js(f"document.documentElement.dataset.mode = document.documentElement.dataset.theme = '{mode}'")
        self.settle(0.4)

    def scroll(self):
        "Once through the page, so that everything that waits to be seen is drawn."
        self.js("(async () => { for (let y = 0; y < document.documentElement.scrollHeight; y += 500) { scrollTo(0, y); await new Promise(r => setTimeout(r, 60)); } scrollTo(0, 0); })()")
        self.settle(0.4)

    def screenshot(self, path: Path, whole: bool = False):
        "A PNG of the window, or of the whole page."
        Path(path).write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]))

    def pdf(self, path: Path):
        "The page as it is printed."
        Path(path).write_bytes(base64.b64decode(self.call("Page.printToPDF", printBackground=False)["data"]))

    # ---- what the page did
    def seen(self, method: str) -> list[dict]:
        "Parameters of all events of one kind."
        return [e["params"] for e in self.events if e["method"] == method]

    @property
    def requests(self) -> list[str]:
        "Addresses that were asked for, without their own data."
        asked = [p["request"]["url"] for p in self.seen("Network.requestWillBeSent")] + [p["url"] for p in self.seen("Network.webSocketCreated")]
        return [u for u in asked if not u.startswith(("data:", "blob:"))]

    @property
    def outside(self) -> list[str]:
        "Requests that left the disk, and callers at the trap."
        return [u for u in self.requests if not u.startswith(("file:", "about:"))] + [c for c in self.trap.calls if not any(f" {host}:" in c or f"/{host}/" in c for host in OWN)]

    @property
    def ran(self) -> list[str]:
        "Planted code that ran, and dialogs that opened."
        return [p["payload"] for p in self.seen("Runtime.bindingCalled")] + [f"dialog: {p['message']}" for p in self.seen("Page.javascriptDialogOpening")]

    @property
    def errors(self) -> list[str]:
        "Errors on the console."
        thrown = [p["exceptionDetails"].get("exception", {}).get("description") or p["exceptionDetails"]["text"] for p in self.seen("Runtime.exceptionThrown")]
        written = [" ".join(str(a.get("value", a.get("description"))) for a in p["args"]) for p in self.seen("Runtime.consoleAPICalled") if p["type"] == "error"]
        logged = [f"{p['entry']['text']} {p['entry'].get('url', '')}" for p in self.seen("Log.entryAdded") if p["entry"]["level"] == "error"]
        return thrown + written + logged
