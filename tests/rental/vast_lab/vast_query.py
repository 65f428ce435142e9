"""The service's query language: filters with operators, order, and pages by token."""

import base64
import binascii
import functools
import json
from collections.abc import Callable

PAGE = 25  # rows of /api/v1/instances/ at most, and by default


class BadQuery(Exception):
    """The request is answered with 400."""

    def __init__(self, msg: str, error: str = "invalid_request"):
        super().__init__(msg)
        self.error = error


def like(value: object, example: object) -> object:
    """The query's value as the type of the row's: string queries send numbers as strings."""
    if isinstance(value, list):
        return [like(item, example) for item in value]
    if isinstance(example, bool) and isinstance(value, str):
        return value.lower() == "true"
    if isinstance(example, int | float) and isinstance(value, str):
        try:
            return float(value)
        except ValueError as error:
            raise BadQuery(f"{value!r} is not a number") from error
    return value


OPERATORS: dict[str, Callable] = {
    "eq": lambda a, b: a == b or (a is None and b is False),  # external is null when false
    "neq": lambda a, b: a != b,
    "gt": lambda a, b: a is not None and a > b,
    "gte": lambda a, b: a is not None and a >= b,
    "lt": lambda a, b: a is not None and a < b,
    "lte": lambda a, b: a is not None and a <= b,
    "in": lambda a, b: a in b,
    "notin": lambda a, b: a not in b,
}


def matches(row: dict, filters: dict, searchable: set[str]) -> bool:
    """Whether the row passes every {field: {operator: value}}; unknown names are errors."""
    for name, tests in filters.items():
        if name not in searchable:
            raise BadQuery(f"Error in query parameters: {name} is not a valid search key")
        for operator, value in (tests if isinstance(tests, dict) else {"eq": tests}).items():
            if operator not in OPERATORS:
                raise BadQuery(f"Error in query parameters: {operator} is not a valid operator")
            if not OPERATORS[operator](row[name], like(value, row[name])):
                return False
    return True


def compare(a: dict, b: dict, order: list[tuple[str, str]]) -> int:
    """Row order by columns; nulls last; -1, 0 or 1."""
    for name, direction in order:
        x, y = a.get(name), b.get(name)
        if x == y:
            continue
        if x is None or y is None:
            return 1 if x is None else -1
        return (1 if x > y else -1) * (-1 if direction == "desc" else 1)
    return 0


def ordered(rows: list[dict], order: list[tuple[str, str]]) -> list[dict]:
    return sorted(rows, key=functools.cmp_to_key(lambda a, b: compare(a, b, order)))


def page_of(rows: list[dict], query: dict[str, str], searchable: set[str]) -> tuple:
    """(all matches, this page, next token or None) of GET /api/v1/instances/."""
    filters = json_value(query.get("select_filters") or "{}")
    order = [(o["col"], o.get("dir", "asc")) for o in json_value(query.get("order_by") or "[]")]
    for name, _ in order:
        if name not in searchable:
            raise BadQuery(f"Error in query parameters: {name} is not a valid order column")
    order.append(("id", "asc"))
    found = ordered([row for row in rows if matches(row, filters, searchable)], order)
    rest = found
    if token := query.get("after_token"):
        try:
            last = json.loads(base64.b64decode(token, validate=True))["values"]
        except (binascii.Error, ValueError, KeyError, TypeError) as error:
            raise BadQuery("Invalid pagination token", "invalid_token") from error
        rest = [row for row in found if compare(row, last, order) > 0]
    limit = int(query.get("limit") or PAGE)
    page = rest[: min(limit, PAGE) if limit > 0 else 5]
    if len(page) == len(rest):
        return found, page, None
    values = {name: page[-1].get(name) for name, _ in order}
    return found, page, base64.b64encode(json.dumps({"values": values}).encode()).decode()


def json_value(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError as error:
        raise BadQuery(f"invalid json: {text[:80]}") from error
