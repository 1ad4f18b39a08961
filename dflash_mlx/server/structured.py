"""Texts that must look like something: JSON, a regular expression, a grammar."""

import json
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Grammar:
    """What a text must look like.

    Attributes:
        kind: "json_schema", "regex" or "lark".
        source: the schema as JSON text, the expression, or the grammar in llguidance's Lark.
        after: token sequences that the free part of an answer (thinking) ends with; the grammar
            rules what follows the first of them. Empty: it rules from the first token on.
    """

    kind: str
    source: str
    after: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def json_object(cls) -> "Grammar":
        """Any JSON object."""
        return cls("json_schema", '{"type": "object"}')

    @classmethod
    def json_schema(cls, schema: dict[str, Any] | bool) -> "Grammar":
        """JSON that a schema allows."""
        return cls("json_schema", json.dumps(schema))

    @classmethod
    def regex(cls, expression: str) -> "Grammar":
        """Text that an expression matches as a whole."""
        return cls("regex", expression)

    @classmethod
    def lark(cls, grammar: str) -> "Grammar":
        """Text that a Lark grammar derives from `start`."""
        return cls("lark", grammar)

    def behind(self, *ends: tuple[int, ...]) -> "Grammar":
        """The same, ruling what follows the first of these token sequences."""
        return replace(self, after=ends)
