"""What `bench --json` writes, as a JSON schema."""

from typing import Any

from dflash_mlx.measure.profile import PHASES
from dflash_mlx.propose import MOST_NODES

NUMBER = {"type": "number", "minimum": 0}
COUNT = {"type": "integer", "minimum": 0}
SHARE = {"type": "number", "minimum": 0, "maximum": 1}


def _object(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _side() -> dict[str, Any]:
    return _object(
        generation_tps=NUMBER,
        decode_seconds=NUMBER,
        tokens=COUNT,
        first_token_seconds=NUMBER,
        peak_memory=NUMBER,
        collectives={"type": ["number", "null"], "minimum": 0},
    )


FIGURES: dict[str, Any] = {
    "prompts": {"type": "integer", "minimum": 1},
    "speedup": NUMBER,
    "speedup_interval": {"type": ["array", "null"], "items": NUMBER, "minItems": 2, "maxItems": 2},
    "acceptance_length": NUMBER,
    "identical": {"type": "boolean"},
    "plain": _side(),
    "dflash": _side(),
    "prompt_tokens": NUMBER,
    "verify_length": NUMBER,
    "plain_share": SHARE,
    "copied_share": SHARE,
    "histogram": {"type": "array", "items": COUNT},
    "by_position": {"type": "array", "items": SHARE},
}

_RUNS = {
    "type": "array",
    "minItems": 1,
    "items": _object(tokens=COUNT, first_token_seconds=NUMBER, decode_seconds=NUMBER),
}

_DIFFERENCE = {
    "anyOf": [
        {"type": "null"},
        _object(
            position=COUNT,
            plain={"type": ["string", "null"]},
            dflash={"type": ["string", "null"]},
            margin=NUMBER,
        ),
    ]
}

_TEXT = {"type": "string", "minLength": 1}
_PHASES = _object(**dict.fromkeys(PHASES, NUMBER))

_BY_NUMBER = {
    "type": "object",
    "propertyNames": {"pattern": "^[1-9][0-9]*$"},
    "additionalProperties": _object(**FIGURES),
}

SCHEMA = _object(
    summary=_object(**FIGURES),
    kinds={"type": "object", "minProperties": 1, "additionalProperties": _object(**FIGURES)},
    prompts={
        "type": "array",
        "minItems": 1,
        "items": _object(
            **{**FIGURES, "prompt_tokens": COUNT},
            kind=_TEXT,
            text=_TEXT,
            counts={"type": "boolean"},
            difference=_DIFFERENCE,
            runs=_object(plain=_RUNS, dflash=_RUNS),
        ),
    },
    kernels={
        "anyOf": [
            {"type": "null"},
            _object(
                sides={
                    "type": "object",
                    "minProperties": 1,
                    "additionalProperties": _object(**FIGURES),
                },
                gains={"type": "object", "additionalProperties": NUMBER},
            ),
        ]
    },
    trees={
        "anyOf": [
            {"type": "null"},
            _object(
                lines=_object(**FIGURES),
                over_lines=NUMBER,
                over_lines_interval=FIGURES["speedup_interval"],
            ),
        ]
    },
    sweep={
        "anyOf": [
            {"type": "null"},
            _object(
                lengths={**_BY_NUMBER, "minProperties": 1},
                trees=_BY_NUMBER,
                best={"type": "integer", "minimum": 1},
                over_best=NUMBER,
                over_best_interval=FIGURES["speedup_interval"],
            ),
        ]
    },
    profile={
        "anyOf": [
            {"type": "null"},
            _object(
                seconds=_PHASES, per_cycle=_PHASES, cycles=COUNT, tokens=COUNT, host_share=SHARE
            ),
        ]
    },
    settings=_object(
        model=_TEXT,
        draft=_TEXT,
        repeats={"type": "integer", "minimum": 1},
        context={"type": ["array", "null"], "items": COUNT},
        max_tokens={"type": "integer", "minimum": -1},
        stop={"type": "array", "items": _TEXT},
        verify_length={"type": ["integer", "string", "null"]},
        tree={"enum": ["auto", *range(MOST_NODES + 1)]},
        copies={"enum": ["auto", "off"]},
        temp=NUMBER,
        top_p=SHARE,
        min_p=SHARE,
        top_k=COUNT,
        seed=COUNT,
        kv_bits={"type": ["integer", "null"]},
    ),
    machine=_object(
        chip=_TEXT,
        cores=COUNT,
        memory_gb=NUMBER,
        system=_TEXT,
        device={"enum": ["cpu", "gpu"]},
        gflops={"type": "number", "exclusiveMinimum": 0},
        versions=_object(**{"dflash-mlx": _TEXT, "mlx": _TEXT, "mlx-lm": _TEXT, "python": _TEXT}),
    ),
)
