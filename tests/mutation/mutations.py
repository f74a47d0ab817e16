"""Broken versions of a file: field-aware for JSON, header-aware for safetensors, and bytes for everything.

Everything is a function of the file's content and a seed.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

# Replaced in the encoded text, because Python's encoder has no form for them.
_RAW = {
    "5,000 digits": "9" * 5000,
    "5,000 brackets": "[" * 5000 + "]" * 5000,
    "5,000 objects": '{"a":' * 5000 + "1" + "}" * 5000,
    "NaN": "NaN",
    "Infinity": "-Infinity",
    "1e999": "1e999",
    "a lone surrogate": '"\\ud800"',
    "an unquoted word": "word",
    "nothing": "",
}
# Values of every type and at every bound.
VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    5,
    2**31,
    2**63,
    2**64,
    10**30,
    0.5,
    -1.5,
    1e308,
    "",
    "x",
    "\u0000",
    "\u202e\u001b[31m",
    "x" * 100_000,
    "../../../etc/passwd",
    [],
    [[]],
    [None],
    [1, "x"],
    {},
    {"": None},
    {"x": {"y": [1]}},
)
_MARK = "\ue000mutated\ue001"
MAX_ITEMS = 4  # of a list or an object: the others are like them


class Mutation(NamedTuple):
    """A broken file. label: what was done to it."""

    label: str
    content: bytes


Mutate = Callable[[bytes, random.Random], Mutation]


def paths(value: Any, parents: tuple = ()) -> Iterator[tuple]:
    """The path of every value of a JSON document, the document's own () first; of long lists only the first items."""
    yield parents
    if isinstance(value, dict):
        for name in list(value)[:40]:
            yield from paths(value[name], (*parents, name))
    elif isinstance(value, list):
        for index in range(min(len(value), MAX_ITEMS)):
            yield from paths(value[index], (*parents, index))


def name_of(path: tuple) -> str:
    return "$" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)


def replaced(document: Any, path: tuple, value: Any) -> Any:
    """A copy of the document with another value at a path."""
    if not path:
        return value
    document = copy.deepcopy(document)
    parent = document
    for part in path[:-1]:
        parent = parent[part]
    parent[path[-1]] = value
    return document


def without(document: Any, path: tuple) -> Any:
    document = copy.deepcopy(document)
    parent = document
    for part in path[:-1]:
        parent = parent[part]
    del parent[path[-1]]
    return document


def encoded(document: Any) -> bytes:
    return json.dumps(document).encode()


def with_raw(document: Any, path: tuple, raw: str) -> bytes:
    """The document with a text that is no value of Python's at a path."""
    return encoded(replaced(document, path, _MARK)).replace(json.dumps(_MARK).encode(), raw.encode())


def with_repeated(document: Any, path: tuple, value: Any) -> bytes:
    """The document with the name of a field twice, the second time with another value."""
    *parents, name = path
    parent = document
    for part in parents:
        parent = parent[part]
    raw = json.dumps(parent)[:-1] + f", {json.dumps(name)}: {json.dumps(value)}}}"
    return with_raw(document, tuple(parents), raw)


def all_json(content: bytes) -> Iterator[Mutation]:
    """Every value of a JSON document with every replacement, and missing, renamed, repeated and extra fields."""
    document = json.loads(content)
    for path in paths(document):
        where = name_of(path)
        for value in VALUES:
            yield Mutation(f"{where} = {json.dumps(value)[:40]}", encoded(replaced(document, path, value)))
        for label, raw in _RAW.items():
            yield Mutation(f"{where} is {label}", with_raw(document, path, raw))
        if not path:
            continue
        yield Mutation(f"{where} is missing", encoded(without(document, path)))
        if isinstance(path[-1], str):
            value = "again"
            yield Mutation(f"{where} is repeated", with_repeated(document, path, value))
            parent = document
            for part in path[:-1]:
                parent = parent[part]
            renamed = without(document, path)
            target = renamed
            for part in path[:-1]:
                target = target[part]
            target[path[-1] + "_"] = parent[path[-1]]
            yield Mutation(f"{where} is renamed", encoded(renamed))
    if isinstance(document, dict):
        for value in VALUES:
            label = f"an extra field = {json.dumps(value)[:40]}"
            yield Mutation(label, encoded(document | {"a_field_of_others": value}))


def one_json(content: bytes, rng: random.Random) -> Mutation:
    """A random one of `all_json`, without computing the others."""
    document = json.loads(content)
    path = rng.choice(list(paths(document)))
    where, draw = name_of(path), rng.random()
    if draw < 0.6:
        value = rng.choice(VALUES)
        return Mutation(f"{where} = {json.dumps(value)[:40]}", encoded(replaced(document, path, value)))
    if draw < 0.75:
        label, raw = rng.choice(list(_RAW.items()))
        return Mutation(f"{where} is {label}", with_raw(document, path, raw))
    if path and draw < 0.9:
        return Mutation(f"{where} is missing", encoded(without(document, path)))
    if path and isinstance(path[-1], str):
        return Mutation(f"{where} is repeated", with_repeated(document, path, rng.choice(VALUES[:20])))
    if isinstance(document, dict):
        value = rng.choice(VALUES)
        return Mutation("an extra field", encoded(document | {"a_field_of_others": value}))
    return Mutation("the document in a list", encoded([document]))


def one_of_lines(content: bytes, rng: random.Random) -> Mutation:
    """A JSON Lines file with one line mutated as `one_json` does, dropped, repeated or swapped."""
    lines = content.splitlines()
    index, draw = rng.randrange(len(lines)), rng.random()
    if draw < 0.85:
        label, line = one_json(lines[index], rng)
        return Mutation(f"line {index + 1}: {label}", b"\n".join([*lines[:index], line, *lines[index + 1 :], b""]))
    if draw < 0.9:
        return Mutation(f"line {index + 1} is missing", b"\n".join([*lines[:index], *lines[index + 1 :], b""]))
    if draw < 0.95:
        return Mutation(f"line {index + 1} twice", b"\n".join([*lines, lines[index], b""]))
    return Mutation(f"line {index + 1} is torn", b"\n".join([*lines[:index], lines[index][: len(lines[index]) // 2]]))


def fixed_bytes(content: bytes) -> list[Mutation]:
    """What happens to files as a whole, in a fixed order."""
    middle = len(content) // 2
    return [
        Mutation("empty", b""),
        Mutation("one byte", content[:1]),
        Mutation("the first half", content[:middle]),
        Mutation("without its last byte", content[:-1]),
        Mutation("twice", content * 2),
        Mutation("with a BOM", b"\xef\xbb\xbf" + content),
        Mutation("in UTF-16", content.decode("latin-1").encode("utf-16")),
        Mutation("all zero", bytes(len(content))),
        Mutation("with a zero byte", content[:middle] + b"\0" + content[middle:]),
        Mutation("with an invalid byte", content[:middle] + b"\xff" + content[middle + 1 :]),
        Mutation("with a byte too many", content + b"x"),
        Mutation("a page of noise", random.Random(0).randbytes(4096)),
        Mutation("100,000 brackets", b"[" * 100_000),
    ]


def one_bytes(content: bytes, rng: random.Random) -> Mutation:
    """Flipped, removed, inserted or cut bytes at random places."""
    at, draw = rng.randrange(len(content)), rng.random()
    if draw < 0.4:
        bit = 1 << rng.randrange(8)
        return Mutation(f"bit {bit} of byte {at}", content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :])
    if draw < 0.55:
        return Mutation(f"cut at byte {at}", content[:at])
    end = min(len(content), at + rng.randint(1, 40))
    if draw < 0.7:
        return Mutation(f"without bytes {at} to {end}", content[:at] + content[end:])
    if draw < 0.85:
        return Mutation(f"invalid UTF-8 at byte {at}", content[:at] + b"\xc3\x28" + content[at:])
    return Mutation(f"bytes {at} to {end} twice", content[:end] + content[at:])


def one_safetensors(content: bytes, rng: random.Random) -> Mutation:
    """A header that is mutated as JSON, with its length made to fit or not; or mutated bytes."""
    draw, length = rng.random(), int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    if draw < 0.6:
        label, header = one_json(header, rng)
        return Mutation(f"header: {label}", len(header).to_bytes(8, "little") + header + data)
    if draw < 0.75:
        value = rng.choice((0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1))
        return Mutation(f"header length {value}", value.to_bytes(8, "little") + content[8:])
    if draw < 0.9:
        label, header = one_bytes(header, rng)
        return Mutation(f"header: {label}", len(header).to_bytes(8, "little") + header + data)
    return one_bytes(content, rng)
