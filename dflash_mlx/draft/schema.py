"""The fields of a config.json, declared: kind, range, default, and where each one stands."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from dflash_mlx.errors import CheckpointError

REQUIRED: Any = object()


@dataclass(frozen=True)
class Field:
    """One key of a config.json; null counts as absent.

    Attributes:
        name: the key.
        default: its value where it is absent; REQUIRED makes that an error.
        inside: the object in which the packaging keeps it, for what is said when it is missing. It
            is looked for at every place that `read` is given.
    """

    name: str
    default: Any = REQUIRED
    inside: str = ""

    wanted = "something else"

    def parse(self, value: Any) -> Any:
        """The value as the library uses it; ValueError or TypeError where it cannot be meant."""
        raise NotImplementedError

    @property
    def path(self) -> str:
        """The key with the object that it stands in."""
        return f"{self.inside}.{self.name}" if self.inside else self.name


@dataclass(frozen=True)
class Integer(Field):
    """A whole number of least … most."""

    least: int = 1
    most: int = 2**24

    @property
    def wanted(self) -> str:  # type: ignore[override]
        """What is said to be needed."""
        return f"a whole number from {self.least} to {self.most}"

    def parse(self, value: Any) -> int:
        if not _is_integer(value) or not self.least <= value <= self.most:
            raise ValueError
        return value


@dataclass(frozen=True)
class Number(Field):
    """A finite number above `above`."""

    above: float = 0.0

    @property
    def wanted(self) -> str:  # type: ignore[override]
        """What is said to be needed."""
        return f"a number above {self.above:g}"

    def parse(self, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError
        try:
            number = float(value)
        except OverflowError as error:
            raise ValueError from error
        if not isfinite(number) or number <= self.above:
            raise ValueError
        return number


@dataclass(frozen=True)
class Flag(Field):
    """True or false."""

    wanted = "true or false"

    def parse(self, value: Any) -> bool:
        if not isinstance(value, bool):
            raise TypeError
        return value


@dataclass(frozen=True)
class Word(Field):
    """One of a few words."""

    words: tuple[str, ...] = ()

    @property
    def wanted(self) -> str:  # type: ignore[override]
        """What is said to be needed."""
        return either(self.words)

    def parse(self, value: Any) -> str:
        if value not in self.words:
            raise ValueError
        return str(value)


@dataclass(frozen=True)
class Integers(Field):
    """A list of whole numbers, each of least … most."""

    least: int = 0
    most: int = 2**16

    @property
    def wanted(self) -> str:  # type: ignore[override]
        """What is said to be needed."""
        return f"a non-empty list of whole numbers from {self.least} to {self.most}"

    def parse(self, value: Any) -> tuple[int, ...]:
        if not isinstance(value, list) or not 0 < len(value) <= 1024:
            raise TypeError
        if not all(_is_integer(i) and self.least <= i <= self.most for i in value):
            raise ValueError
        return tuple(value)


@dataclass(frozen=True)
class Words(Field):
    """A list of words."""

    wanted = "a list of words"

    def parse(self, value: Any) -> tuple[str, ...]:
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
            raise TypeError
        return tuple(value)


@dataclass(frozen=True)
class Object(Field):
    """A JSON object."""

    wanted = "an object"

    def parse(self, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise TypeError
        return value


def read(
    fields: Iterable[Field], config: Mapping[str, Any], *inner: str, label: str = ""
) -> dict[str, Any]:
    """Read declared fields.

    Args:
        fields: what to read.
        config: the object that holds them.
        inner: keys of objects inside it in which they may stand as well, as "dflash_config".
        label: what `config` is called in messages, where it is itself inside something.

    Raises:
        CheckpointError: a value is of the wrong kind or out of range, required ones are missing, or
            two places contradict each other.
    """
    places = [(label, config)]
    for key in inner:
        place = config.get(key)
        if place is not None and not isinstance(place, dict):
            raise _wrong(_joined(label, key), place, "an object")
        places.append((_joined(label, key), place or {}))
    values: dict[str, Any] = {}
    missing = []
    for field in fields:
        found = [
            (where, place[field.name])
            for where, place in places
            if place.get(field.name) is not None
        ]
        for where, value in found:
            try:
                values[field.name] = field.parse(value)
            except (TypeError, ValueError) as error:
                raise _wrong(_joined(where, field.name), value, field.wanted) from error
        if len(found) > 1 and any(value != found[0][1] for _, value in found):
            said = " and ".join(
                f"{shown(v)} {f'inside {w}' if w else 'at the top'}" for w, v in found
            )
            raise CheckpointError(
                f"The draft's config.json contradicts itself: {field.name} is {said}."
            )
        if not found:
            if field.default is REQUIRED:
                missing.append(_joined(label, field.path))
            values[field.name] = field.default
    if missing:
        raise CheckpointError(f"The draft's config.json lacks {', '.join(missing)}.")
    return values


def shown(value: Any) -> str:
    """A value for a message, cut where it is long."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deep, or an integer of thousands of digits
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= 60 else f"{text[:59]}…"


def either(words: Iterable[Any]) -> str:
    """Some words as "a, b or c"."""
    *first, last = [str(word) for word in words]
    return f"{', '.join(first)} or {last}" if first else last


def _wrong(path: str, value: Any, wanted: str) -> CheckpointError:
    return CheckpointError(
        f"The draft's config.json has {path} {shown(value)}; {wanted} is needed."
    )


def _joined(label: str, name: str) -> str:
    return f"{label}.{name}" if label else name


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
