"""What cycles cost, kept in a file for the next process."""

import json
from collections.abc import Mapping
from contextlib import suppress
from math import log
from pathlib import Path
from typing import Any, Protocol

from dflash_mlx.files import replace_file
from dflash_mlx.policy.costs import BUSY

Seconds = tuple[float, tuple[float, ...], float]  # a plain step, cycles by proposals, reading


class Store(Protocol):
    """Keeps costs by level of context length, as `Costs.known` takes them."""

    def load(self, most: int) -> dict[int, Seconds]:
        """What is kept, for cycles of up to `most` proposals."""

    def save(self, costs: Mapping[int, Seconds]) -> None:
        """Keep what was learned."""


class CostsFile:
    """A file of costs. One that is damaged, or tells what no machine can have taken, is ignored and
    replaced; one that cannot be written is done without."""

    def __init__(self, file: Path):
        self._file = file
        self._kept: dict[int, Seconds] = {}

    def load(self, most: int) -> dict[int, Seconds]:
        self._kept = {}
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            found = json.loads(self._file.read_text(encoding="utf-8"))
            self._kept = {_level(name): _seconds(entry, most) for name, entry in found.items()}
        return dict(self._kept)

    def save(self, costs: Mapping[int, Seconds]) -> None:
        """Write costs if some are new or differ, and none are of a busy moment."""
        changed = bool(costs.keys() - self._kept.keys())
        for level in costs.keys() & self._kept.keys():
            (now, cycles, _), (before, known, _) = costs[level], self._kept[level]
            if log(now / before) > BUSY:
                return
            pairs = zip((now, *cycles), (before, *known), strict=True)
            changed |= any(abs(log(a / b)) > BUSY for a, b in pairs)
        if changed:
            self._kept |= costs
            names = ("plain", "cycle", "reading")
            entries = {k: dict(zip(names, c, strict=True)) for k, c in sorted(self._kept.items())}
            with suppress(OSError):
                replace_file(self._file, json.dumps(entries, indent=1))


def _level(name: str) -> int:
    """Raises ValueError for what no context's length can give."""
    level = int(name)
    if not 0 <= level < 64:
        raise ValueError
    return level


def _seconds(entry: dict[str, Any], most: int) -> Seconds:
    """Raises ValueError, KeyError or TypeError for what no machine can have taken."""
    plain, cycle, reading = entry["plain"], tuple(entry["cycle"]), entry["reading"]
    if len(cycle) != most + 1 or not 0 <= reading < 3600:
        raise ValueError
    if not all(1e-6 < t < 3600 for t in (plain, *cycle)):
        raise ValueError
    return plain, cycle, reading
