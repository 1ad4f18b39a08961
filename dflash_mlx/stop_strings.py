"""Strings that end a text, found while the text comes in pieces."""

from collections.abc import Iterable
from types import NoneType

from dflash_mlx.errors import DFlashError


class StopStrings:
    """Watches a text for the first of several strings to be complete in it.

    What `feed` gives does not depend on how the text is cut into pieces, and never holds a part of
    the string that ends it. Of strings that end at the same character the longest counts.

    Attributes:
        found: the string that ended the text; None as long as it goes on.
    """

    def __init__(self, strings: str | Iterable[str] | None):
        """Watch for these strings; one alone may be given as it is.

        Raises:
            DFlashError: one of them is empty or no string.
        """
        if not isinstance(strings, (str, Iterable, NoneType)):
            raise DFlashError(f"stop is a {type(strings).__name__}; give strings, or None.")
        self._strings = (strings,) if isinstance(strings, str) else tuple(strings or ())
        for string in self._strings:
            if not isinstance(string, str) or not string:
                raise DFlashError(
                    f"{string!r} cannot be a stop string; give text of at least one character."
                )
        self._held = ""
        self.found: str | None = None

    def feed(self, text: str, *, last: bool = False) -> str:
        """What is certain to stand before a stop string; the rest waits, unless this is the last.

        After `found` there is nothing more.
        """
        if self.found is not None:
            return ""
        text = self._held + text
        ends = [(text.find(s) + len(s), -len(s), s) for s in self._strings if s in text]
        if ends:
            end, _, self.found = min(ends)
            self._held = ""
            return text[: end - len(self.found)]
        ready = len(text) if last else len(text) - beginning_of(self._strings, text)
        self._held = text[ready:]
        return text[:ready]


def beginning_of(strings: Iterable[str], text: str) -> int:
    """The length of the longest end of a text that one of the strings begins with."""
    return max(
        (n for s in strings for n in range(1, min(len(s), len(text) + 1)) if text.endswith(s[:n])),
        default=0,
    )
