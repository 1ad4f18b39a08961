"""The fields of a request that say how tokens are drawn and what the text must be."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from dflash_mlx.server.fields import Fields
from dflash_mlx.server.job import Sampling
from dflash_mlx.server.refusal import Refusal
from dflash_mlx.server.structured import Grammar


def sampling(fields: Fields, defaults: Sampling) -> Sampling:
    """How tokens are drawn: the fields of OpenAI's and Anthropic's APIs, and common additions.

    Raises:
        Refusal: a value is out of range.
    """
    given = {
        "temperature": fields.number("temperature", 0, 100),
        "top_p": fields.number("top_p", 0, 1),
        "top_k": fields.integer("top_k", -1, 2**31 - 1),
        "min_p": fields.number("min_p", 0, 1),
        "xtc_probability": fields.number("xtc_probability", 0, 1),
        "xtc_threshold": fields.number("xtc_threshold", 0, 0.5),
        "seed": fields.integer("seed", -(2**63), 2**64 - 1),
        "repetition_penalty": fields.number("repetition_penalty", 0.01, 100),
        "presence_penalty": fields.number("presence_penalty", -2, 2),
        "frequency_penalty": fields.number("frequency_penalty", -2, 2),
        "logit_bias": _biases(fields),
    }
    chosen: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
    # As many as the model has, or more, are all of them: the engine sees to that.
    if "top_k" in chosen:
        chosen["top_k"] = max(0, chosen["top_k"])
    # MLX has no negative seeds.
    if "seed" in chosen:
        chosen["seed"] %= 2**64
    # So little leaves only the likeliest token, and float32 no room to compute with.
    if chosen.get("temperature", 1) < 1e-4:
        chosen["temperature"] = 0.0
    if chosen.get("top_p", 1) < 1e-4:
        chosen |= {"top_p": 1.0, "top_k": 1}
    return replace(defaults, **chosen)


def _biases(fields: Fields) -> tuple[tuple[int, float], ...] | None:
    given = fields.get("logit_bias")
    if not given:
        return None
    try:
        biases = {int(token): float(bias) for token, bias in given.items()}
    except (AttributeError, TypeError, ValueError, OverflowError):
        raise fields.refuse("logit_bias", "must map token ids to numbers.") from None
    if any(token < 0 or not -100 <= bias <= 100 for token, bias in biases.items()):
        raise fields.refuse("logit_bias", "must map token ids to numbers from -100 to 100.")
    return tuple(biases.items())


def grammar(fields: Fields, shape: Fields | None = None) -> Grammar | None:
    """What the text must match: a format, or one of the guided_ fields.

    Args:
        fields: the request.
        shape: the format of newer APIs, where a schema stands beside its type; None: the older
            APIs' response_format.

    Raises:
        Refusal: more than one of them is given, or one makes no sense.
    """
    given = [
        found
        for found in (
            _format(shape, "")
            if shape
            else _format(fields.inner("response_format"), "json_schema"),
            _schema(fields, "guided_json"),
            _source(fields, "guided_regex", Grammar.regex),
            _source(fields, "guided_grammar", Grammar.lark),
        )
        if found is not None
    ]
    if len(given) > 1:
        raise Refusal("Give only one format, or one of the guided_ fields.")
    return given[0] if given else None


def _format(fields: Fields | None, inside: str) -> Grammar | None:
    kind = fields and fields.choice("type", "text", "json_object", "json_schema")
    if fields is None or kind in (None, "text"):
        return None
    if kind == "json_object":
        return Grammar.json_object()
    holder = fields.inner(inside) if inside else fields
    found = _schema(holder, "schema") if holder else None
    if found is None:
        raise fields.refuse(inside or "schema", "is missing.")
    return found


def _schema(fields: Fields, name: str) -> Grammar | None:
    schema = fields.get(name)
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError):
            raise fields.refuse(name, "is not JSON.") from None
    if schema is None:
        return None
    if not isinstance(schema, dict | bool):
        raise fields.refuse(name, "must be a JSON schema.")
    return Grammar.json_schema(schema)


def _source(fields: Fields, name: str, make: Callable[[str], Grammar]) -> Grammar | None:
    source = fields.text(name)
    return None if source is None else make(source)
