"""Rotary positions in a config.json: `rope_parameters`, or the flat keys that came before it."""

from collections.abc import Mapping
from typing import Any

from dflash_mlx.draft.config import FULL, SLIDING, Rope
from dflash_mlx.draft.schema import Field, Flag, Integer, Number, Object, Word, read, shown
from dflash_mlx.errors import CheckpointError

_KINDS = (FULL, SLIDING)
_TYPES = ("default", "linear", "llama3", "yarn", "longrope", "proportional", "mrope")
_THETA = Number("rope_theta", None)
_SHARE = Number("partial_rotary_factor", None)
_FACTOR = Number("factor")
_LENGTH = Integer("original_max_position_embeddings", None, most=2**40)
_SCALING: dict[str, tuple[Field, ...]] = {
    "linear": (_FACTOR,),
    "llama3": (
        _FACTOR,
        _LENGTH,
        Number("low_freq_factor", None),
        Number("high_freq_factor", None),
    ),
    "yarn": (
        _FACTOR,
        _LENGTH,
        Number("beta_fast", None),
        Number("beta_slow", None),
        Number("attention_factor", None),
        Number("mscale", None),
        Number("mscale_all_dim", None, above=-1.0),
        Flag("truncate", None),
    ),
    "proportional": (Number("factor", None), _SHARE),
}


def ropes(
    config: Mapping[str, Any],
    max_positions: int | None,
    interleaved: bool = False,
    share: bool = False,
) -> dict[str, Rope]:
    """Rotary positions of either attention kind.

    `rope_parameters` wins over the flat `rope_theta` and `rope_scaling`, as in Transformers 5; it
    may hold one object for each attention kind. Null is absent.

    Args:
        config: of the backbone.
        max_positions: what it says of positions.
        interleaved: whether pairs are neighbours.
        share: whether partial_rotary_factor is meant.

    Raises:
        CheckpointError: no theta is there, or a value cannot be.
    """
    parameters = read((Object("rope_parameters", None),), config)["rope_parameters"] or {}
    found = {}
    for kind in _KINDS:
        own, label = parameters, "rope_parameters"
        if any(isinstance(parameters.get(name), dict) for name in _KINDS):
            own = parameters.get(kind) or {}
            label = f"rope_parameters.{kind}"
            if not isinstance(own, dict):
                raise CheckpointError(
                    f"The draft's config.json has {label} {shown(own)}; an object is needed."
                )
        found[kind] = _rope(config, own, label, max_positions, interleaved, share)
    missing = [kind for kind, rope in found.items() if rope is None]
    if len(missing) == len(found):
        raise CheckpointError("The draft's config.json lacks rope_theta.")
    # A kind that the object leaves out is one that the draft does not have.
    given = next(rope for rope in found.values() if rope is not None)
    return {kind: rope or given for kind, rope in found.items()}


def _rope(
    config: Mapping[str, Any],
    own: Mapping[str, Any],
    label: str,
    max_positions: int | None,
    interleaved: bool,
    share: bool,
) -> Rope | None:
    theta = read((_THETA,), own, label=label)["rope_theta"]
    if theta is None:
        theta = read((_THETA,), config)["rope_theta"]
    if theta is None:
        return None
    kind, where = _type(own, label), (own, label)
    if kind is None:
        flat = read((Object("rope_scaling", None),), config)["rope_scaling"] or {}
        kind, where = _type(flat, "rope_scaling") or "default", (flat, "rope_scaling")
    scaling = _scaling(kind, *where, max_positions)
    part = None
    if share and kind != "proportional":
        part = read((_SHARE,), own, label=label)["partial_rotary_factor"]
        if part is None:
            part = read((_SHARE,), config)["partial_rotary_factor"]
    return Rope(theta, scaling, interleaved, max_positions, min(part or 1.0, 1.0))


def _type(place: Mapping[str, Any], label: str) -> str | None:
    fields = (Word("rope_type", None, words=_TYPES), Word("type", None, words=_TYPES))
    try:
        values = read(fields, place, label=label)
    except CheckpointError as error:
        said = place.get("rope_type") or place.get("type")
        raise CheckpointError(
            f"The draft's config.json has {label} of the type {shown(said)}; supported: "
            f"{', '.join(_TYPES[:-1])}."
        ) from error
    return values["rope_type"] or values["type"]


def _scaling(
    kind: str, place: Mapping[str, Any], label: str, max_positions: int | None
) -> dict[str, Any] | None:
    """What mlx_lm's `initialize_rope` wants; None for plain positions."""
    if kind in ("default", "mrope"):  # the sections of a text are all alike
        return None
    if kind == "longrope":
        return _longrope(place, label)
    values = read(_SCALING[kind], place, label=label)
    found = {name: value for name, value in values.items() if value is not None}
    if _LENGTH in _SCALING[kind] and _LENGTH.name not in found:
        if max_positions is None:
            raise CheckpointError(f"The draft's config.json lacks {label}.{_LENGTH.name}.")
        found[_LENGTH.name] = max_positions
    if kind == "proportional":
        found["partial_rotary_factor"] = min(found.get("partial_rotary_factor", 1.0), 1.0)
    return {"rope_type": kind, **found}


def _longrope(place: Mapping[str, Any], label: str) -> dict[str, Any]:
    found: dict[str, Any] = {"rope_type": "longrope"}
    length = Integer(_LENGTH.name, most=2**40)
    found |= read((length,), place, label=label)
    for name in ("short_factor", "long_factor"):
        factors = place.get(name)
        good = isinstance(factors, list) and all(
            isinstance(f, (int, float)) and not isinstance(f, bool) and 0 < f < 1e9 for f in factors
        )
        if not good or not factors:
            raise CheckpointError(
                f"The draft's config.json has {label}.{name} {shown(factors)}; a list of numbers "
                "is needed."
            )
        found[name] = factors
    return found
