"""A Hugging Face Hub on the loopback: what huggingface_hub and hf_xet ask of it to upload a model
repository, and hf_hub_download to fetch from it, with faults on order.

Files beyond text go through Git LFS's batch API or through Xet's storage, as the client chooses. An
LFS file is refused in a commit unless bytes of its sha256 have arrived: those of Xet are put
together from their chunks (formats: huggingface.co/docs/xet).
"""

import base64
import contextlib
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow

TOKEN, XET_TOKEN = "hf_" + "Secret" * 6, "xet" + "Secret" * 6
TEXT = (".md", ".csv", ".json")
LAST = b"\xff" * 32  # ends a section of a shard
FORBIDDEN = "nobody"  # an owner for whom the login may not write


@dataclass
class Repository:
    """What is in it: contents by path, messages of its commits, whether it is private."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)


@dataclass
class Fault:
    """What happens to the next n requests whose "METHOD /path" the pattern finds.

    kind: "500"; "cut": the connection ends within the body; "lost": it is done, but the connection
        ends before the answer; "hold": nothing is done, and the connection ends, when released
    """

    pattern: str
    kind: str
    n: int = 1
    met: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)


class Hub(ThreadingHTTPServer):
    """The server: start it with served()."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # by sha256
        self.xorbs: dict[str, list[bytes]] = {}  # chunks, by the hash of the xorb
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self.seen_in_argv = False
        self.lock = threading.Lock()

    def log_in(self, home: Path, token: str = TOKEN) -> None:
        """As `hf auth login` leaves it."""
        home.mkdir(exist_ok=True)
        (home / "token").write_text(token)

    def environment(self, home: Path, *, xet: bool = True) -> dict[str, str]:
        """For a client that knows this hub alone, and keeps its caches and login below home."""
        known = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}
        return known | {"HF_HUB_DISABLE_XET": "" if xet else "1"}

    def patch(self, home: Path, *, xet: bool = True) -> dict[str, object]:
        """The same for a process that has imported huggingface_hub: see Server.start. It needs the
        environment, too."""
        known = {"ENDPOINT": self.url, "HF_HOME": str(home), "HF_TOKEN_PATH": str(home / "token")}
        known |= {"HF_STORED_TOKENS_PATH": str(home / "stored"), "HF_HUB_DISABLE_XET": not xet}
        return {f"huggingface_hub.constants.{name}": value for name, value in known.items()}

    def fault(self, pattern: str, kind: str, n: int = 1) -> Fault:
        self.faults.append(Fault(pattern, kind, n))
        return self.faults[-1]

    def take_fault(self, request: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.n and re.search(fault.pattern, request):
                    fault.n -= 1
                    return fault
        return None

    def counted(self, pattern: str) -> int:
        """Requests so far that it finds."""
        return sum(bool(re.search(pattern, request)) for request in self.requests)

    # --- what files are ---

    def modes(self, repository: Repository, files: list[dict]) -> list[dict]:
        return [
            {
                "path": file["path"],
                "uploadMode": mode_of(file["path"]),
                "shouldIgnore": False,
                "oid": oid_of(file["path"], repository.files.get(file["path"])),
            }
            for file in files
        ]

    def batch(self, objects: list[dict]) -> list[dict]:
        """Git LFS's answer: where to put those that have not arrived."""
        answer = []
        for one in objects:
            upload = {"href": f"{self.url}/lfs/{one['oid']}", "header": {}}
            more = {} if one["oid"] in self.objects else {"actions": {"upload": upload}}
            answer.append({"oid": one["oid"], "size": one["size"], **more})
        return answer

    def commit(self, repository: Repository, lines: list[dict]) -> str | None:
        """Does it whole, or says what is wrong."""
        files = dict(repository.files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile" and value["oid"] in self.objects:
                files[value["path"]] = self.objects[value["oid"]]
            else:
                return f"no bytes for {value['path']}"
        repository.files = files
        repository.commits.append(lines[0]["value"]["summary"])
        return None

    # --- Xet ---

    def add_xorb(self, name: str, body: bytes) -> None:
        self.xorbs[name] = list(chunks_of(body))

    def add_shard(self, body: bytes) -> None:
        """Puts the files that it describes together from the chunks that have arrived."""
        for parts in files_of_shard(body):
            chunks = [c for name, start, end in parts for c in self.xorbs[name][start:end]]
            content = b"".join(chunks)
            self.objects[hashlib.sha256(content).hexdigest()] = content


def mode_of(path: str) -> str:
    return "regular" if path.endswith(TEXT) else "lfs"


def oid_of(path: str, content: bytes | None) -> str | None:
    if content is None:
        return None
    if mode_of(path) == "lfs":
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def chunks_of(xorb: bytes) -> Iterator[bytes]:
    """Each has a header: version, 3 bytes of its size here, its compression (0: none, 1: LZ4, 2:
    LZ4 of its bytes in four groups), 3 bytes of its size."""
    at = 0
    while at < len(xorb) and xorb[at] == 0:
        stored = int.from_bytes(xorb[at + 1 : at + 4], "little")
        scheme, size = xorb[at + 4], int.from_bytes(xorb[at + 5 : at + 8], "little")
        data = xorb[at + 8 : at + 8 + stored]
        if scheme:
            data = pyarrow.decompress(data, size, codec="lz4", asbytes=True)
        if scheme == 2:
            groups = np.array_split(np.frombuffer(data, np.uint8), 4)
            whole = np.empty(size, np.uint8)
            for i, group in enumerate(groups):
                whole[i::4] = group
            data = whole.tobytes()
        yield data
        at += 8 + stored


def files_of_shard(shard: bytes) -> Iterator[list[tuple[str, int, int]]]:
    """Of each file the runs of chunks that it consists of: (xorb, first chunk, end)."""
    at = 48  # behind the header
    while shard[at : at + 32] != LAST:
        flags, n = struct.unpack_from("<II", shard, at + 32)
        at += 48
        parts = []
        for _ in range(n):
            hashed, (start, end) = shard[at : at + 32], struct.unpack_from("<II", shard, at + 40)
            name = b"".join(hashed[i : i + 8][::-1] for i in range(0, 32, 8)).hex()
            parts.append((name, start, end))
            at += 48
        at += 48 * n * bool(flags & 1 << 31)  # hashes to verify the runs
        at += 48 * bool(flags & 1 << 30)  # sha256
        yield parts


class Handler(BaseHTTPRequestHandler):
    """One request. Answers to what is not known are 404."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""

    def do_GET(self) -> None:
        self.answer()

    do_POST = do_PUT = do_HEAD = do_GET  # noqa: N815

    def answer(self) -> None:
        hub, path = self.server, self.path.split("?")[0]
        request = f"{self.command} {path}"
        hub.requests.append(request)
        hub.seen_in_argv |= any(secret in argv() for secret in (TOKEN, XET_TOKEN))
        fault = hub.take_fault(request)
        if fault and fault.kind == "cut":
            self.rfile.read(min(1000, int(self.headers.get("Content-Length") or 0)))
            fault.met.set()
            return self.hang_up()
        body = self.body()
        if fault:
            fault.met.set()
            if fault.kind == "500":
                return self.reply(500, {"error": "a fault on order"})
            if fault.kind == "hold":
                fault.released.wait(60)
                return self.hang_up()
        bearer = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        known = XET_TOKEN if path.startswith("/v1/") or path.startswith("/v2/") else TOKEN
        if bearer != known and not path.startswith("/lfs/"):
            return self.reply(401, {"error": "Invalid username or password."})
        for method, pattern, handle in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split():
                with hub.lock:
                    status, content, *more = handle(hub, match.groups(), body)
                lost = fault and fault.kind == "lost"
                return self.hang_up() if lost else self.reply(status, content, *more)
        return self.reply(404, {"error": "not found"}, {"X-Error-Code": "EntryNotFound"})

    def hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):  # the client was killed
            self.connection.shutdown(socket.SHUT_RDWR)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def reply(self, status: int, content: dict | bytes, headers: dict | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        with contextlib.suppress(ConnectionError):  # the client was killed
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)


def argv() -> str:
    """Of all processes."""
    texts = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            texts.append(path.read_bytes().decode(errors="replace"))
    return "\n".join(texts)


# --- what is answered: (status, JSON or bytes[, headers]) ---


def create(hub: Hub, _: tuple, body: bytes) -> tuple:
    asked = json.loads(body)
    name = f"{asked['organization']}/{asked['name']}"
    if asked["organization"] == FORBIDDEN:
        return 403, {"error": "You don't have the rights to create a model under this namespace"}
    answer = {"url": f"{hub.url}/{name}"}
    if name in hub.repositories:
        return 409, answer | {"error": "You already created this model repo"}
    hub.repositories[name] = Repository(private=asked.get("visibility") == "private")
    return 200, answer


def info(hub: Hub, names: tuple, _: bytes) -> tuple:
    if names[0] not in hub.repositories:
        return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
    repository = hub.repositories[names[0]]
    sha = f"{len(repository.commits):040x}"
    return 200, {"id": names[0], "sha": sha, "private": repository.private, "siblings": []}


def validate(_hub: Hub, _: tuple, body: bytes) -> tuple:
    card = json.loads(body)["content"]
    good = re.match(r"---\n(.+\n)+---\n", card)
    return (200 if good else 400), {"warnings": [], "errors": [] if good else [{"message": "bad"}]}


def preupload(hub: Hub, names: tuple, body: bytes) -> tuple:
    return 200, {"files": hub.modes(hub.repositories[names[0]], json.loads(body)["files"])}


def batch(hub: Hub, _: tuple, body: bytes) -> tuple:
    return 200, {"transfer": "basic", "objects": hub.batch(json.loads(body)["objects"])}


def put(hub: Hub, names: tuple, body: bytes) -> tuple:
    if hashlib.sha256(body).hexdigest() != names[0]:
        return 400, {"error": "other bytes"}
    hub.objects[names[0]] = body
    return 200, b""


def commit(hub: Hub, names: tuple, body: bytes) -> tuple:
    lines = [json.loads(line) for line in body.splitlines()]
    if problem := hub.commit(hub.repositories[names[0]], lines):
        return 400, {"error": problem}
    return 200, {"commitUrl": f"{hub.url}/{names[0]}/commit/1", "commitOid": "1" * 40}


def settings(hub: Hub, names: tuple, body: bytes) -> tuple:
    hub.repositories[names[0]].private = json.loads(body)["visibility"] == "private"
    return 200, {}


def xet_token(hub: Hub, _: tuple, __: bytes) -> tuple:
    until = int(time.time()) + 3600
    known = {"casUrl": hub.url, "accessToken": XET_TOKEN, "exp": until}
    headers = {"X-Xet-Cas-Url": hub.url, "X-Xet-Access-Token": XET_TOKEN}
    return 200, known, headers | {"X-Xet-Token-Expiration": str(until)}


def xorb(hub: Hub, names: tuple, body: bytes) -> tuple:
    hub.add_xorb(names[0], body)
    return 200, {"was_inserted": True}


def shard(hub: Hub, _: tuple, body: bytes) -> tuple:
    hub.add_shard(body)
    return 200, {"result": 1}


def resolve(hub: Hub, names: tuple, _: bytes) -> tuple:
    repository = hub.repositories[names[0]]
    if names[1] not in repository.files:
        return 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"}
    content = repository.files[names[1]]
    etag = f'"{oid_of(names[1], content)}"'
    return 200, content, {"ETag": etag, "X-Repo-Commit": f"{len(repository.commits):040x}"}


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = (
    ("POST", r"/api/repos/create", create),
    ("GET", rf"/api/models/{NAME}(?:/revision/main)?", info),
    ("POST", r"/api/validate-yaml", validate),
    ("POST", rf"/api/models/{NAME}/preupload/main", preupload),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", batch),
    ("PUT", r"/lfs/([0-9a-f]{64})", put),
    ("POST", rf"/api/models/{NAME}/commit/main", commit),
    ("PUT", rf"/api/models/{NAME}/settings", settings),
    ("GET", rf"/api/models/{NAME}/xet-write-token/main", xet_token),
    ("POST", r"/v1/xorbs/default/([0-9a-f]{64})", xorb),
    ("POST", r"/v1/shards", shard),
    ("GET HEAD", rf"/{NAME}/resolve/\w+/(.+)", resolve),
)


@contextlib.contextmanager
def served_hub() -> Iterator[Hub]:
    hub = Hub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    yield hub
    for fault in hub.faults:
        fault.released.set()
    hub.shutdown()
    hub.server_close()
