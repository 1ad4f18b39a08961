"""Fixed verify lengths, and how DFlash as it was run compares with the best of them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from dflash_mlx.measure.comparison import Result
from dflash_mlx.measure.summary import Summary, overall


@dataclass(frozen=True)
class Sweep:
    """What a sweep found.

    Attributes:
        lengths: the summary of every fixed verify length against plain decoding.
        best: the length with the largest speedup.
        over_best: decode seconds with the best length / with DFlash as it was run.
        over_best_interval: 95 % interval of the median of that ratio; None as in Summary.
    """

    lengths: dict[int, Summary]
    best: int
    over_best: float
    over_best_interval: tuple[float, float] | None

    def as_json(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return asdict(self)


def lengths_to_sweep(most: int) -> list[int]:
    """Verify lengths worth measuring of so many proposals at most: all of a few, some of many."""
    return [n for n in range(1, most + 1) if n <= 8 or n % 2 == 0 or n == most]


def swept(results: Sequence[Result]) -> Sweep | None:
    """The figures of a sweep over the prompts that count; None where none was made."""
    lengths = list(results[0].fixed)
    if not lengths:
        return None
    found = {n: overall([replace(r, dflash=r.fixed[n]) for r in results]) for n in lengths}
    best = max(lengths, key=lambda n: found[n].speedup)
    against = overall([replace(r, plain=r.fixed[best]) for r in results])
    return Sweep(found, best, against.speedup, against.speedup_interval)
