"""Damage to a file by chance, and by its format: the same seed gives the same bytes."""

import io
import json
import random
import re
import zipfile
from collections.abc import Callable

DIGITS, DEEP = "@5000 digits@", "@deep@"  # json.dumps can't write them: see dumped
ODD = (None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**30, 10**400, 0.5, -0.5, 1e308,
       float("nan"), float("inf"), DIGITS, DEEP, "", "x", "0", "\0", "\ud800", "../../x",
       "/etc/passwd", "é\u202e\x1b[2J\n", 10**5 * "a", [], {}, [[]], [None], {"": None},
       {"a": {"a": {"a": 1}}}, [0, 1, 2])  # fmt: skip
EXTREME = (b"0", b"-1", b"1", b"2147483648", b"9223372036854775807", b"9223372036854775808",
           b"18446744073709551616", b"1e308", b"1e999", b"-1e999", b"0.1", b"NaN", b"Infinity",
           b"9" * 5000, b"null", b'"7"', b"00", b"[7]")  # fmt: skip
LENGTHS = (0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**64 - 1)
INSERTED = (b"\0", b"\xff", b"\n", b"\r\n", b"{", b"]", b'"', b"\\", b"\xed\xa0\x80", b"\x80\x02",
            b"PK\x03\x04", b"[" * 10_000, b'{"a":' * 10_000, b"\0" * 5000,
            b"\xef\xbb\xbf")  # fmt: skip

Change = Callable[[bytes, random.Random], bytes]


def mutated(content: bytes, rng: random.Random, *, kind: str = "bytes") -> bytes:
    """The content with one or two changes. kind: bytes, json, lines (of json), safetensors, zip"""
    for _ in range(1 if rng.random() < 0.8 else 2):
        by_format = BY_FORMAT.get(kind)
        change = by_format if by_format and rng.random() < 0.6 else rng.choice(OF_BYTES)
        content = change(content, rng)
    return content


# --- whatever the format ---


def span(content: bytes, rng: random.Random) -> tuple[int, int]:
    start = rng.randrange(len(content) + 1)
    return start, min(len(content), start + rng.choice((1, 2, 4, 8, 64, 1000)))


def flip_bits(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 8)) if content else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncate(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.choice((0, 1, 7, 8, len(content) - 1, rng.randrange(len(content) + 1)))]


def delete(content: bytes, rng: random.Random) -> bytes:
    start, stop = span(content, rng)
    return content[:start] + content[stop:]


def double(content: bytes, rng: random.Random) -> bytes:
    start, stop = span(content, rng)
    return content[:stop] + content[start:stop] * rng.choice((1, 1, 100)) + content[stop:]


def insert(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content) + 1)
    return content[:at] + rng.choice(INSERTED) + content[at:]


def extreme_number(content: bytes, rng: random.Random) -> bytes:
    found = list(re.finditer(rb"-?\d+(\.\d+)?", content))
    if not found:
        return insert(content, rng)
    place = rng.choice(found)
    return content[: place.start()] + rng.choice(EXTREME) + content[place.end() :]


def huge_length(content: bytes, rng: random.Random) -> bytes:
    """Four or eight bytes become a number, as lengths in headers are."""
    size, order = rng.choice((4, 8)), rng.choice(("little", "little", "big"))
    at = rng.choice((0, 0, rng.randrange(len(content) + 1)))
    number = (rng.choice(LENGTHS) % 256**size).to_bytes(size, order)
    return content[:at] + number + content[at + size :]


OF_BYTES: tuple[Change, ...] = (
    flip_bits, flip_bits, truncate, delete, double, insert, extreme_number, huge_length,
)  # fmt: skip


# --- by the format ---


def places(value: object) -> list[tuple[dict | list, str | int]]:
    """(container, key) of everything in it."""
    keys = value.keys() if isinstance(value, dict) else range(len(value))
    found = [(value, key) for key in keys]
    for key in keys:
        if isinstance(value[key], (dict, list)):
            found += places(value[key])
    return found


def dumped(value: object) -> str:
    text = json.dumps(value).replace(json.dumps(DIGITS), "7" * 5000)
    return text.replace(json.dumps(DEEP), "[" * 3000 + "]" * 3000)


def change_json(content: bytes, rng: random.Random) -> bytes:
    """A value, key or entry of a JSON text changes."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):  # by the change before this one
        return flip_bits(content, rng)
    found = places(value) if isinstance(value, (dict, list)) else []
    if not found or rng.random() < 0.03:
        return dumped(rng.choice(ODD)).encode()
    container, key = rng.choice(found)
    inner, how = container[key], rng.random()
    if isinstance(inner, str) and inner[:1] == "{" and how < 0.8:  # JSON in JSON
        container[key] = change_json(inner.encode(), rng).decode("utf-8", "surrogatepass")
    elif how < 0.7:
        container[key] = rng.choice(ODD)
    elif how < 0.85 or isinstance(container, list):
        del container[key]
    else:
        container[rng.choice((key + "x", key.upper(), "", "metadata", "a" * 1000))] = container.pop(
            key
        )
    return dumped(value).encode()


def change_line(content: bytes, rng: random.Random) -> bytes:
    lines = content.split(b"\n")
    at = rng.randrange(len(lines))
    lines[at] = change_json(lines[at], rng)
    return b"\n".join(lines)


def change_safetensors(content: bytes, rng: random.Random) -> bytes:
    """Its header, with the right length before it."""
    size = int.from_bytes(content[:8], "little")
    if size > len(content):
        return flip_bits(content, rng)
    header = change_json(content[8 : 8 + size], rng)
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def change_zip(content: bytes, rng: random.Random) -> bytes:
    """A part of it, with the right sums."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
    except Exception:  # by the change before this one
        return flip_bits(content, rng)
    pickles = [name for name in parts if name.endswith(".pkl")]
    name = rng.choice(pickles if pickles and rng.random() < 0.6 else list(parts))
    parts[name] = rng.choice(OF_BYTES)(parts[name], rng)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for part, data in parts.items():
            archive.writestr(part, data)
    return buffer.getvalue()


BY_FORMAT: dict[str, Change] = {
    "json": change_json,
    "lines": change_line,
    "safetensors": change_safetensors,
    "zip": change_zip,
}
