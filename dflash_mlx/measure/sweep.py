"""Fixed verify lengths and trees, and how DFlash as it was run compares with the best length."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from dflash_mlx.measure.comparison import Result, Sides
from dflash_mlx.measure.run import Settings, dflash_run
from dflash_mlx.measure.summary import Summary, overall
from dflash_mlx.measure.summary import sides as summaries
from dflash_mlx.measure.trees import takes_trees
from dflash_mlx.pairs import SpeculativeModel

_LENGTH, _TREE = "verify length", "tree"
_NODES = (4, 8, 16, 32, 64)  # propose.MOST_NODES at most


@dataclass(frozen=True)
class Sweep:
    """What a sweep found.

    Attributes:
        lengths: the summary of every fixed verify length, as lines, against plain decoding.
        trees: likewise of trees, by their nodes; empty where the pair takes none.
        best: the length with the largest speedup.
        over_best: decode seconds with the best length / with DFlash as it was run.
        over_best_interval: 95 % interval of the median of that ratio; None as in Summary.
    """

    lengths: dict[int, Summary]
    trees: dict[int, Summary]
    best: int
    over_best: float
    over_best_interval: tuple[float, float] | None

    @property
    def faster_tree(self) -> int | None:
        """The nodes of the fastest tree, if it is faster than the best length."""
        if not self.trees:
            return None
        nodes = fastest(self.trees)
        return nodes if self.trees[nodes].speedup > self.lengths[self.best].speedup else None

    def as_json(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return asdict(self)


def fastest(sides: dict[int, Summary]) -> int:
    """Which has the largest speedup."""
    return max(sides, key=lambda n: sides[n].speedup)


def sweep_sides(model: SpeculativeModel, settings: Settings) -> Sides:
    """Every length worth measuring as lines, and where the pair takes trees, these in their sizes.

    Trees are as deep as the block.
    """
    lengths = lengths_to_sweep(model.draft.most_proposals)
    lines = {(_LENGTH, n): replace(settings, verify_length=n, tree=0) for n in lengths}
    sizes = _NODES if takes_trees(model) else ()
    trees = {(_TREE, n): replace(settings, verify_length=None, tree=n) for n in sizes}
    return {name: (dflash_run, how) for name, how in {**lines, **trees}.items()}


def lengths_to_sweep(most: int) -> list[int]:
    """Verify lengths worth measuring of so many proposals at most: all of a few, some of many."""
    return [n for n in range(1, most + 1) if n <= 8 or n % 2 == 0 or n == most]


def swept(results: Sequence[Result]) -> Sweep | None:
    """The figures of a sweep over the prompts that count; None where none was made."""
    lengths, trees = summaries(results, _LENGTH), summaries(results, _TREE)
    if not lengths:
        return None
    best = fastest(lengths)
    against = overall([replace(r, plain=r.sides[_LENGTH, best]) for r in results])
    return Sweep(lengths, trees, best, against.speedup, against.speedup_interval)
