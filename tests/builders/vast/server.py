"""A loopback server that speaks vast.ai's documented API, for tests: nothing leaves this machine.

with FakeVast(tmp_path, offers=[{}]) as lab:
    VastAI(api_key=lab.api_key, server_url=lab.url, retry=1).search_offers({})
"""

import contextlib
import http.server
import json
import secrets
import socket
import struct
import sys
import threading
import time
import traceback
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from builders.vast.api import Api, Request
from builders.vast.faults import Rule, send_signal, spoil
from builders.vast.market import Market, Refused


class FakeVast:
    """The service, what a test arranges in it, and what it may read.

    Args:
        root: a folder for the instances
        offers: arguments of add_offer
        rate_limits: scale of the documented least intervals between calls, 429 where they are not
            kept; 0: none
        sandboxes: False: instances without files and processes, for the API alone
    """

    def __init__(self, root: Path, *, offers: list[dict], api_key: str = "",
                 rate_limits: float = 0.0, sandboxes: bool = True):  # fmt: skip
        self.root, self.api_key = root, api_key or secrets.token_hex(32)
        (root / "bin").mkdir(parents=True)  # on the PATH of all instances
        self.stopping, self.lock = threading.Event(), threading.Lock()
        self.rules: list[Rule] = []
        self.log: list[dict] = []
        self.http = Server(("127.0.0.1", 0), Handler)
        self.http.lab = self
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.market = Market(root, self.url, sandboxes=sandboxes)
        self.api = Api(self.market, rate_limits)
        self.add_offer, self.behave = self.market.add_offer, self.market.behave
        for offer in offers:
            self.add_offer(**offer)

    def __enter__(self) -> "FakeVast":
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Ends every instance; the lab's own errors are the test's, or its result means nothing."""
        self.stopping.set()
        self.market.shut()
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()
        if self.market.errors and error is None:
            raise RuntimeError("the lab itself failed:\n" + "\n".join(self.market.errors))

    # --- to arrange ---

    def fault(self, **rule) -> None:
        """Spoils requests; the arguments are those of faults.Rule. The first that hits decides."""
        with self.lock:
            self.rules.append(Rule(**rule))

    def clear_faults(self) -> None:
        """From now on all goes well."""
        with self.lock:
            self.rules = []

    def act(self, number: int, what: str) -> None:
        """Something happens to an instance now: outbid, stop, recover, exited, offline, vanish."""
        contract = self.market.find(number)
        if what in ("exited", "offline", "unknown"):
            self.market.turn(contract, what)
        elif what == "vanish":
            self.market.end(contract, "vanished")
        else:
            {"outbid": self.market.outbid, "stop": self.market.stop,
             "recover": self.market.recover}[what](contract)  # fmt: skip

    # --- to read ---

    def offers(self) -> list[dict]:
        return list(self.market.offers.values())

    def ledger(self) -> list[dict]:
        """A row per instance ever created, with its cost so far."""
        contracts = list(self.market.contracts.values())
        for contract in contracts:
            self.market.measure(contract)
        return [contract.entry(time.time()) for contract in contracts]

    def live(self) -> list[int]:
        """Instances that cost something now."""
        return [c.number for c in list(self.market.contracts.values()) if not c.ended]

    def home(self, number: int) -> Path:
        """The instance's HOME, to look at, corrupt or delete files."""
        return self.root / f"i{number}" / "home"

    def requests(self) -> list[dict]:
        """Every request of the API so far: method, path, query, body, caller, status."""
        return list(self.log)

    def fired(self) -> list[int]:
        """How often each fault struck."""
        return [rule.fired for rule in self.rules]

    # --- what the handler asks ---

    def caller_of(self, key: str | None) -> tuple[str, int | None]:
        """("account" | "instance" | "nobody" | "stranger", the instance whose key it is)."""
        if not key:
            return "nobody", None
        if key == self.api_key:
            return "account", None
        own = [c for c in list(self.market.contracts.values()) if c.key == key and not c.ended]
        return ("instance", own[0].number) if own else ("stranger", None)

    def rule_for(self, request: Request) -> Rule | None:
        """The fault that strikes the request."""
        with self.lock:
            hits = [r for r in self.rules if r.hits(request.method, request.path, request.caller)]
        return hits[0] if hits else None

    def carry_out(self, request: Request, raw: str) -> tuple[int, str]:
        """(status, body) of the API itself."""
        try:
            request.body = json.loads(raw) if raw else {}
            return 200, json.dumps(self.api.answer(request))
        except Refused as no:
            if no.error == "too_frequent":
                return no.status, no.msg
            return no.status, json.dumps({"success": False, "error": no.error, "msg": no.msg})
        except Exception:  # a fault of the lab, not one that a test ordered
            self.market.errors.append(traceback.format_exc())
            return 500, json.dumps({"success": False, "error": "lab", "msg": "the lab failed"})


class Handler(http.server.BaseHTTPRequestHandler):
    """One request: who calls, which fault strikes, what the API says."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args) -> None:  # the lab keeps its own log
        pass

    def answer(self) -> None:
        lab: FakeVast = self.server.lab
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode(errors="replace")
        url = urlsplit(self.path)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if not lab.stopping.is_set():
                self.serve(lab, url.path, dict(parse_qsl(url.query)), raw)
        self.close_connection = True

    do_GET = do_POST = do_PUT = do_DELETE = answer  # noqa: N815

    def serve(self, lab: FakeVast, path: str, query: dict, raw: str) -> None:
        """A request of the API, with whatever fault is ordered for it."""
        key = self.headers.get("Authorization", "").removeprefix("Bearer ") or query.get("api_key")
        caller, own = lab.caller_of(key)
        if own and lab.market.contracts[own].status == "offline":
            return  # its host has lost its connection: what it sends does not arrive
        request = Request(self.command, path, query, {}, caller, own)
        rule = lab.rule_for(request)
        entry = {"method": self.command, "path": path, "query": query, "body": raw,
                 "caller": caller, "status": None}  # fmt: skip
        lab.log.append(entry)
        status, body = (200, "") if rule and not rule.acts else lab.carry_out(request, raw)
        if rule is None:
            entry["status"] = status
            self.send(status, body, "application/json" if body[:1] in "[{n" else "text/plain")
        elif answer := self.strike(rule, status, body):
            entry["status"] = answer[0]
            self.send(*answer, len(body) - len(answer[1]) if rule.what == "short" else 0)

    def strike(self, rule: Rule, status: int, body: str) -> tuple[int, str, str] | None:
        """The spoiled answer, or None where the client gets none."""
        what, _, detail = rule.what.partition(":")
        if what == "delay":
            self.server.lab.stopping.wait(float(detail))
        if what == "signal":
            send_signal(detail, self.client_address[1])
        if what == "hang":
            self.wait_for_the_client()
        if what == "drop":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if what in ("drop", "hang") or (what == "signal" and not rule.acts):
            return None
        return spoil(rule, status, body)

    def wait_for_the_client(self) -> None:
        """Says nothing until the client gives up or the lab ends."""
        self.connection.settimeout(0.05)
        while not self.server.lab.stopping.is_set():
            with contextlib.suppress(TimeoutError):
                if not self.connection.recv(1):
                    return

    def send(self, status: int, body: str, kind: str, missing: int = 0) -> None:
        """An answer; `missing` bytes of it are promised and never come."""
        data = body.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data) + missing))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)


class Server(http.server.ThreadingHTTPServer):
    """Quick to start; what goes wrong in a handler is the lab's fault."""

    daemon_threads, block_on_close, request_queue_size = True, False, 128

    def server_bind(self) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)  # without the base class's look-up of our name
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = self.server_address[:2]

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            self.lab.market.errors.append(traceback.format_exc())
