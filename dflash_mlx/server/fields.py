"""Reading the fields of a request: a wrong one is refused by name, null counts as left out."""

import math
from collections.abc import Mapping
from typing import Any, TypeVar

from dflash_mlx.server.refusal import Refusal

T = TypeVar("T")


class Fields:
    """The JSON object of a request."""

    def __init__(self, body: Any, where: str = ""):
        """Wrap an object; `where` is its own name, for messages.

        Raises:
            Refusal: it is no object.
        """
        if not isinstance(body, Mapping):
            raise Refusal(f"{where or 'The body'} must be a JSON object.", param=where or None)
        self._body, self._where = body, f"{where}." if where else ""

    def get(self, name: str) -> Any:
        """A field as it is; None where it is missing."""
        return self._body.get(name)

    def refuse(self, name: str, reason: str) -> Refusal:
        """The error for a field: `NAME` and the rest of the sentence."""
        return Refusal(f"{self._where}{name} {reason}", param=f"{self._where}{name}")

    def text(self, name: str) -> str | None:
        """A string."""
        return self._typed(name, str, "a string")

    def flag(self, name: str) -> bool | None:
        """True or false."""
        return self._typed(name, bool, "true or false")

    def items(self, name: str) -> list[Any]:
        """A list; empty where it is missing."""
        return self._typed(name, list, "a list") or []

    def inner(self, name: str) -> "Fields | None":
        """An object inside this one."""
        value = self.get(name)
        return None if value is None else Fields(value, f"{self._where}{name}")

    def integer(self, name: str, low: int, high: int | None = None) -> int | None:
        """A whole number from `low` to `high`, also where it is written as 1.0."""
        value = self.get(name)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.refuse(name, "must be a whole number.")
        self._check(name, value, low, high)
        return value

    def number(self, name: str, low: float, high: float | None = None) -> float | None:
        """A number from `low` to `high`."""
        value = self.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.refuse(name, "must be a number.")
        try:
            value = float(value)
        except OverflowError:
            value = math.inf
        self._check(name, value, low, high)
        return value

    def choice(self, name: str, *choices: str) -> str | None:
        """One of these strings."""
        value = self.text(name)
        if value is not None and value not in choices:
            raise self.refuse(name, f"must be one of {', '.join(choices)}.")
        return value

    def strings(self, name: str, most: int) -> tuple[str, ...]:
        """One string or a list of them, none of them empty."""
        value = self.get(name)
        if value is None:
            return ()
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
            raise self.refuse(name, "must be a string or a list of strings.")
        if len(values) > most:
            raise self.refuse(name, f"can hold {most} strings at most.")
        return tuple(v for v in values if v)

    def _check(self, name: str, value: float, low: float, high: float | None) -> None:
        # A whole number may be too long for a float.
        finite = isinstance(value, int) or math.isfinite(value)
        if not finite or value < low or (high is not None and value > high):
            upper = "" if high is None else f" and at most {high:g}"
            raise self.refuse(name, f"must be at least {low:g}{upper}.")

    def _typed(self, name: str, kind: type[T], what: str) -> T | None:
        value = self.get(name)
        if value is not None and not isinstance(value, kind):
            raise self.refuse(name, f"must be {what}.")
        return value
