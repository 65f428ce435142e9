"""A loopback server that speaks vast.ai's documented API, for tests: nothing leaves this machine.

In a test's own process:            with FakeVast() as lab: VastAI(lab.api_key, lab.url) ...
as a process that a test controls:  with lab_process({...}) as lab: the same calls by HTTP
by hand:                            python vast_server.py --config lab.json

What a test may call on either is in Control; README.md has examples.
"""

import argparse
import contextlib
import http.server
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from vast_api import Refused, Request
from vast_faults import Rule, send_signal, spoil
from vast_instance import HERE
from vast_lab import Control
from vast_query import BadQuery


class Handler(http.server.BaseHTTPRequestHandler):
    """One request: who calls, which fault strikes, what the API says."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args) -> None:  # the lab keeps its own log
        pass

    def answer(self) -> None:
        lab: FakeVast = self.server.lab
        length = int(self.headers.get("Content-Length") or 0)
        raw = self.rfile.read(length).decode(errors="replace")
        url = urlsplit(self.path)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if lab.stopping.is_set():
                self.close_connection = True
            elif url.path.startswith("/lab/"):
                self.send(*lab.control_call(url.path.removeprefix("/lab/"), raw))
            elif url.path.startswith("/instance_logs/"):
                self.send(*lab.result_file(url.path))
            else:
                self.serve(lab, url.path, dict(parse_qsl(url.query)), raw)

    do_GET = do_POST = do_PUT = do_DELETE = answer  # noqa: N815

    def serve(self, lab: "FakeVast", path: str, query: dict, raw: str) -> None:
        """A request of the API, with whatever fault is ordered for it."""
        key = self.headers.get("Authorization", "").removeprefix("Bearer ") or query.get("api_key")
        caller, own = lab.caller_of(key)
        if caller == "instance" and lab.is_cut_off(own):
            self.close_connection = True
            return
        request = Request(self.command, path, query, {}, caller, own, key)
        rule = lab.faults.hit(self.command, path, caller)
        entry = lab.note(request, raw, rule)
        status, body = (200, "") if rule and not rule.acts else lab.act_on(request, raw)
        entry["status"] = status
        if rule is None:
            kind = "application/json" if body[:1] in ("[", "{", "n") else "text/plain"
            self.send(status, body, kind)
            return
        answer = self.strike(rule, status, body)
        entry["status"] = answer and answer[0]
        if answer:
            missing = len(body) - len(answer[1]) if rule.what == "short" else 0
            self.send(*answer, rule.headers, missing)

    def strike(self, rule: Rule, status: int, body: str) -> tuple[int, str, str] | None:
        """The spoiled answer, or None where the client gets none."""
        what, _, detail = rule.what.partition(":")
        self.close_connection = True
        if what == "delay":
            self.server.lab.stopping.wait(float(detail))
        if what == "signal":
            send_signal(detail, self.client_address[1], rule.group)
        if what == "hang":
            self.wait_for_the_client()
        if what == "drop":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if what in ("drop", "close", "hang") or (what == "signal" and not rule.acts):
            return None
        return spoil(rule, status, body)

    def wait_for_the_client(self) -> None:
        """Says nothing until the client gives up or the lab ends."""
        self.connection.settimeout(0.05)
        while not self.server.lab.stopping.is_set():
            with contextlib.suppress(TimeoutError):
                if not self.connection.recv(1):
                    return

    def send(self, status: int, body: str, kind="application/json", more=(), missing=0) -> None:
        """An answer; `missing` bytes of it are promised and never come."""
        data = body.encode()
        self.send_response(status)
        for name, value in dict(more).items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data) + missing))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)


class Server(http.server.ThreadingHTTPServer):
    daemon_threads, block_on_close, request_queue_size = True, False, 128

    def server_bind(self) -> None:
        socket.socket.setsockopt(self.socket, socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)  # without the base class's look-up of our name
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = self.server_address[:2]

    def handle_error(self, request, client_address) -> None:
        """A client that went away is everyday; anything else is a fault of the lab."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            self.lab.market.clock.errors.append(traceback.format_exc())


class FakeVast(Control):
    """The server, its market, and a folder for the instances that goes away with it."""

    def __init__(self, **config):
        """Starts at once. `config` holds vast_lab.Config's fields."""
        self.stopping = threading.Event()
        self.server = Server(("127.0.0.1", config.pop("port", 0)), Handler)
        self.server.lab = self
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.root = Path(tempfile.mkdtemp(prefix="vastlab-"))
        (self.root / "bin").mkdir()
        self.janitor = subprocess.Popen(
            [sys.executable, "-I", "-S", HERE / "vast_janitor.py", self.root],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        try:
            self.set_up(config, self.root, self.url)
        except BaseException:
            self.stop()
            raise
        thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        self.thread = thread

    def stop(self) -> None:
        """Ends every instance, and leaves no process, mount or folder."""
        if self.stopping.is_set():
            return
        self.stopping.set()
        closing = threading.Thread(target=self.close_server)  # it takes a moment: meanwhile ...
        closing.start()
        if hasattr(self, "market"):
            self.market.shut()
        self.janitor.stdin.close()
        self.janitor.wait()
        closing.join()

    def close_server(self) -> None:
        if hasattr(self, "thread"):
            self.server.shutdown()
            self.thread.join()
        self.server.server_close()

    def __enter__(self) -> "FakeVast":
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.stop()
        if self.errors() and error is None:
            raise RuntimeError("the lab itself failed:\n" + "\n".join(self.errors()))

    # --- what the handler asks ---

    def act_on(self, request: Request, raw: str) -> tuple[int, str]:
        """(status, body) of the API itself."""
        try:
            route, request.ids = self.allowed(request)
            request.body = json.loads(raw) if raw else {}
            return 200, json.dumps(getattr(self.api, route.name)(request))
        except Refused as no:
            if no.error == "too_frequent":
                return no.status, no.msg
            return no.status, json.dumps({"success": False, "error": no.error, "msg": no.msg})
        except BadQuery as bad:
            return 400, json.dumps({"success": False, "error": bad.error, "msg": str(bad)})
        except json.JSONDecodeError as error:
            msg = f"Invalid json body: {error}"
            return 400, json.dumps({"error": "invalid_request", "msg": msg})
        except Exception:  # a fault of the lab, not one that a test ordered
            self.market.clock.errors.append(traceback.format_exc())
            return 500, json.dumps({"success": False, "error": "lab", "msg": "the lab failed"})

    def result_file(self, path: str) -> tuple[int, str, str]:
        """A log behind a result URL; 404 until it has been uploaded."""
        ready, text = self.api.files.get(Path(path).stem, (float("inf"), ""))
        return (200, text, "text/plain") if time.monotonic() >= ready else (404, "", "text/plain")

    def control_call(self, name: str, raw: str) -> tuple[int, str]:
        """A call of one of Control's public methods by HTTP."""
        try:
            if name not in Control.PUBLIC:
                raise ValueError(f"the lab has no {name}; it has {', '.join(Control.PUBLIC)}")
            return 200, json.dumps(getattr(self, name)(**(json.loads(raw) if raw else {})))
        except (ValueError, TypeError, KeyError, Refused) as error:
            return 400, json.dumps({"error": f"{type(error).__name__}: {error}"})


class Remote:
    """A lab in another process: Control's methods, by HTTP."""

    def __init__(self, hello: dict):
        self.url, self.api_key, self.root = hello["url"], hello["api_key"], Path(hello["root"])
        self.pid = hello["pid"]

    def __getattr__(self, name: str):
        def call(**arguments):
            data = json.dumps(arguments).encode()
            request = urllib.request.Request(f"{self.url}/lab/{name}", data, method="POST")
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            try:
                with opener.open(request, timeout=60) as answer:
                    return json.loads(answer.read())
            except urllib.error.HTTPError as error:
                raise ValueError(json.loads(error.read())["error"]) from error

        return call


@contextlib.contextmanager
def lab_process(config: dict | None = None) -> Iterator[Remote]:
    """A lab in a process of its own, which ends with this block or with this process."""
    command = [sys.executable, HERE / "vast_server.py", "--config", "-"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                          start_new_session=True) as process:  # fmt: skip
        try:
            process.stdin.write(json.dumps(config or {}) + "\n")
            process.stdin.flush()
            if not (hello := process.stdout.readline()):
                raise RuntimeError("the lab did not start; it says why above")
            yield Remote(json.loads(hello))
        finally:
            process.stdin.close()  # the lab reads that as the order to end
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", help="JSON of vast_lab.Config's fields; - is a line of stdin")
    args = parser.parse_args()
    text = "{}"
    if args.config:
        text = sys.stdin.readline() if args.config == "-" else Path(args.config).read_text()
    with FakeVast(**json.loads(text)) as lab:
        hello = {"url": lab.url, "api_key": lab.api_key, "root": str(lab.root), "pid": os.getpid()}
        print(json.dumps(hello | {"namespaces": lab.market.namespaces}), flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            while sys.stdin.read(1):  # until the other end closes, or dies
                pass


if __name__ == "__main__":
    main()
