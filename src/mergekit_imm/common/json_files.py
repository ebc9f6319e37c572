"""Parse untrusted JSON; every defect raises ValueError."""

from __future__ import annotations

import errno
import functools
import json
import math
import stat
from collections.abc import Callable, Generator, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

DEPTH = 64  # far deeper than any config; Python's own limit is about a thousand
SIZE = 256 << 20  # bytes; the index of a million tensors takes half of it

Pairs = Callable[[list[tuple[str, Any]]], Any]


def parse_json(content: bytes, pairs: Pairs | None = None) -> Any:
    """Parse JSON; `pairs` builds the objects. Raises ValueError, also for lone surrogates and deep nesting."""
    try:
        parsed = json.loads(content, object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level = [parsed]
    for _ in range(DEPTH + 1):
        objects: list[dict[str, Any]] = [each for each in level if type(each) is dict]
        lists: list[list[Any]] = [each for each in level if type(each) is list]
        level = [*chain.from_iterable(map(dict.values, objects)), *chain.from_iterable(lists)]
    if level:
        raise ValueError(f"it is nested more than {DEPTH} levels deep")
    if rb"\u" in content:
        json.dumps(parsed, ensure_ascii=False).encode()  # a lone surrogate raises UnicodeEncodeError, a ValueError
    return parsed


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a mapping of the pairs. Raises ValueError for a name that appears twice."""
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the name {twice!r} appears twice")
    return content


def indented(value: Any, line: str = "\n") -> Iterator[str]:
    """Yield, in pieces, what json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) returns, in less time.

    `json` has no C code for indents: here it encodes whatever holds no other mapping or list. A generator stands for a
    mapping of its pairs, which then need not be in memory at once. `line` begins the line of the closing bracket.

    >>> "".join(indented({"a": [], "b": {"c": 1}})) == json.dumps({"a": [], "b": {"c": 1}}, indent=2)
    True
    """
    inner = f"{line}  "
    if not isinstance(value, _NESTS):
        yield _compact(inner)(value)
        return
    is_list = isinstance(value, list | tuple)
    members = iter(value.items() if isinstance(value, dict) else value)
    begin, end = "[]" if is_list else "{}"
    first = begin
    if isinstance(value, Generator) or any(
        issubclass(kind, _NESTS) for kind in {*map(type, value.values() if isinstance(value, dict) else value)}
    ):
        for each in members:
            key, member = ("", each) if is_list else (f"{_compact(inner)(each[0])}: ", each[1])
            yield f"{begin}{inner}{key}"
            yield from indented(member, inner)
            begin = ","
    else:
        while block := list(islice(members, 10_000)):
            yield f"{begin}{inner}{_compact(inner)(block if is_list else dict(block))[1:-1]}"
            begin = ","
    yield f"{line}{end}" if begin == "," else f"{first}{end}"


_NESTS = (dict, list, tuple, Generator)


@functools.cache
def _compact(line: str) -> Callable[[Any], str]:
    """Return an encoder that begins a line before each member but the first."""
    return json.JSONEncoder(separators=(f",{line}", ": "), ensure_ascii=False, allow_nan=False).encode


def read_small(path: Path) -> bytes:
    """Return the content of a file. Raises OSError, also for one of more than SIZE bytes or not a plain file."""
    size = plain_size(path)
    if size > SIZE:
        raise OSError(errno.EFBIG, f"it has {size} bytes, more than {SIZE}")
    return path.read_bytes()


def plain_size(path: Path) -> int:
    """Return the size of a plain file. Raises OSError, also for a pipe, which would block whoever opens it."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is not a plain file")
    return status.st_size


def is_utf8(text: str) -> bool:
    """Return whether a string can be encoded; Python decodes file names that are not UTF-8 with lone surrogates.

    >>> is_utf8("modèle"), is_utf8(b"\\xff".decode(errors="surrogateescape"))
    (True, False)
    """
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def numbers_in(content: Any) -> dict[str, float]:
    """Return the numbers in nested JSON objects, named by their path; one too large for a double is infinite.

    >>> numbers_in({"loss": {"new": 5, "old": 6.5}, "of": "run-1"})
    {'loss.new': 5.0, 'loss.old': 6.5}
    """
    found: dict[str, float] = {}

    def collect(value: Any, place: str) -> None:
        if isinstance(value, dict):
            for key, each in value.items():
                collect(each, f"{place}.{key}" if place else str(key))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            try:
                found[place] = float(value)
            except OverflowError:
                found[place] = math.inf

    collect(content, "")
    return found
