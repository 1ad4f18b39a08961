"""Small damage, drawn from a seeded generator: to JSON values, to bytes, to safetensors files."""

import copy
import json
import struct
from collections.abc import Callable
from random import Random
from typing import Any

ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 5, 7, 63, 2**31, 2**63, -(2**63), 2**64, 10**9, 10**400,
    0.0, 0.5, -1.5, 1e-300, 1e308, float("nan"), float("inf"), float("-inf"),
    "", " ", "x", "1", "🙂", "\ud800", "a\x00b", "../../etc", "full_attention", "float32",
    [], [0], [-1], [None], [10**9], [[]], [1, "a"], list(range(300)),
    {}, {"": None}, {"a": {"b": []}}, {"type": "x"},
]  # fmt: skip

HUGE = [10**3, 10**5, 10**9, 2**31, 2**33, 2**62, 10**30]


def mutate_tree(tree: Any, rng: Random) -> Any:
    """A copy of a JSON value with one to three changes, each somewhere in it."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        tree = _changed(tree, rng)
    return tree


def _changed(tree: Any, rng: Random) -> Any:
    holder, key = None, None
    node = tree
    # Down a random path, so that what stands near the top is hit as often as a long list below.
    while isinstance(node, (dict, list)) and node and (holder is None or rng.random() < 0.75):
        holder = node
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        node = node[key]
    if holder is None:
        return rng.choice(ODD)
    how = rng.random()
    if how < 0.15:
        del holder[key]
    elif how < 0.22 and isinstance(holder, dict):
        holder[rng.choice(("x", f"{key}s", str(key).upper()))] = holder.pop(key)
    elif how < 0.27 and isinstance(holder, list):
        holder.insert(rng.randrange(len(holder) + 1), node)
    elif how < 0.33 and isinstance(holder, dict):
        holder[key] = copy.deepcopy(rng.choice(list(holder.values())))
    else:
        holder[key] = _instead(node, rng)
    return tree


def _instead(value: Any, rng: Random) -> Any:
    """Another value: an odd one, or one near by."""
    if rng.random() < 0.5:
        return copy.deepcopy(rng.choice(ODD))
    if isinstance(value, bool) or value is None:
        return rng.choice((not value, "true", 1))
    if isinstance(value, (int, float)):
        half = value / 2 if abs(value) < 2**1000 else 0.5  # longer integers are no floats
        near = (value + 1, value - 1, -value, value * 2, half, str(value), [value])
        return rng.choice((*near, *HUGE))
    if isinstance(value, str):
        text = list(value) or ["x"]
        text[rng.randrange(len(text))] = rng.choice(
            ("", "x", "{", "%", "\n", "\x00", "é", "\ud800")
        )
        return rng.choice(("".join(text), value * 2, value[: len(value) // 2], [value]))
    return rng.choice((json.dumps(value), [value], {"x": value}))


def mutate_bytes(data: bytes, rng: Random) -> bytes:
    """Bytes cut, flipped, doubled or replaced."""
    at = rng.randrange(len(data) + 1)
    bad = rng.choice((b"", b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b"{", b'"', b"," * 3, b"9" * 400))
    choices: list[Callable[[], bytes]] = [
        lambda: data[:at],
        lambda: data[at:],
        lambda: data[:at] + bad + data[at:],
        lambda: data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :],
        lambda: b"",
        lambda: b"\xef\xbb\xbf" + data,
        lambda: data.decode("utf-8", "replace").encode("utf-16"),
        lambda: b"[" * rng.choice((900, 100_000)) + b"]" * 900,
        lambda: b'{"a":' * rng.choice((900, 100_000)) + b"1" + b"}" * 900,
        lambda: rng.choice((b"null", b"[]", b"{}", b"3", b'"x"', b"NaN", b" ")),
    ]
    return rng.choice(choices)()


def mutate_json(data: bytes, rng: Random) -> bytes:
    """A JSON file: mostly still JSON, sometimes not."""
    if rng.random() < 0.15:
        return mutate_bytes(data, rng)
    text = json.dumps(mutate_tree(json.loads(data), rng))
    return text.encode("utf-8", "surrogatepass")


Header = dict[str, Any]


def read_safetensors(data: bytes) -> tuple[Header, bytes]:
    """Header and body of a sound safetensors file."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_safetensors(header: Header, body: bytes) -> bytes:
    """A safetensors file of whatever header."""
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + body


def mutate_safetensors(data: bytes, rng: Random) -> bytes:
    """A safetensors file with a wrong header, wrong bytes, or tensors that do not belong."""
    header, body = read_safetensors(data)
    names = [name for name in header if name != "__metadata__"]
    name, other = rng.choice(names), rng.choice(names)
    entry = header[name]
    how = rng.randrange(12)
    if how == 0:
        return mutate_bytes(data, rng)
    if how == 1:
        return (
            struct.pack("<Q", rng.choice((0, 1, 7, len(data), 2**40, 2**63, 2**64 - 1))) + data[8:]
        )
    if how == 2:
        header = mutate_tree(header, rng)
        return write_safetensors(header, body)
    if how == 3:
        entry["dtype"] = rng.choice(
            ("F16", "F64", "I8", "I64", "U64", "BOOL", "C64", "F8_E4M3", "F4", "X", "", 3, None)
        )
    elif how == 4:
        entry["shape"] = rng.choice(
            ([], [0], entry["shape"][::-1], [*entry["shape"], 1], [1, *entry["shape"]], [-1, -8],
             [2**40, 2**40], [2**32, 0], [2**31], [1.0], ["4"], 7, None)
        )  # fmt: skip
    elif how == 5:
        start, end = entry["data_offsets"]
        entry["data_offsets"] = rng.choice(
            ([start, end - 1], [start + 1, end], [end, start], header[other]["data_offsets"],
             [-8, end], [2**63, 2**63 + 8], [start], [], None, "0", [0, len(body)], [0.0, 4.5])
        )  # fmt: skip
    elif how == 6:
        header[f"{name}.{rng.choice(('weight', 'scales', 'biases', 'bias'))}"] = header.pop(name)
    elif how == 7:
        del header[name]
    elif how == 8:
        header["more.weight"] = dict(entry)
    elif how == 9:
        header[name], header[other] = header[other], header[name]
    elif how == 10:
        # Numbers that are there and make no sense.
        start, end = entry["data_offsets"]
        bad = rng.choice((b"\xff", b"\x7f", b"\x00", b"\x80", bytes([rng.randrange(256)])))
        body = body[:start] + bad * (end - start) + body[end:]
    else:
        header["__metadata__"] = rng.choice(({"format": 3}, {"a": None}, [], "x", None, {"": ""}))
    return write_safetensors(header, body)
