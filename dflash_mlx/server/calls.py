"""Tool calls: from what a model wrote to a name and arguments, or to nothing if it is malformed."""

import json
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from dflash_mlx.server.formats import called, parser

_NAME = re.compile(r"[\w.\-/:]+")


@dataclass(frozen=True)
class Call:
    """A call of a tool; `arguments` is a JSON object as text."""

    id: str
    name: str
    arguments: str


def reader(
    tokenizer: TokenizerWrapper, tools: list[dict[str, Any]]
) -> Callable[[str, str], list[Call]]:
    """A function from a call's state and text to the calls in it; none where it is malformed."""
    parse = parser(tokenizer)

    def read(state: str, text: str) -> list[Call]:
        try:
            name = called(state)
            if name is not None:
                found: Any = {"name": name, "arguments": json.loads(text or "{}")}
            elif parse is not None:
                found = parse(text, tools)
            else:
                return []
            return [_call(one) for one in (found if isinstance(found, list) else [found])]
        except Exception:  # the parsers raise whatever their code runs into
            return []

    return read


def _call(found: dict[str, Any]) -> Call:
    name = found["name"]
    arguments = found["arguments"] if "arguments" in found else found.get("parameters", {})
    if isinstance(arguments, str):
        arguments = json.loads(arguments or "{}")
    # The GLM parser makes {"raw": …} of what it cannot read.
    raw = isinstance(arguments, dict) and arguments.keys() == {"raw"} and name == "unknown"
    if not isinstance(arguments, dict) or raw or not _NAME.fullmatch(name):
        raise ValueError("This is no call.")
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    return Call(str(found.get("id") or f"call_{uuid.uuid4().hex[:24]}"), name, text)
