"""Trees as they were asked for, and lines with the same settings."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from dflash_mlx.measure.comparison import Result, SideName, Sides
from dflash_mlx.measure.run import Settings, dflash_run
from dflash_mlx.measure.summary import Summary, overall
from dflash_mlx.pairs import SpeculativeModel

_LINES: SideName = ("lines", "otherwise as run")


@dataclass(frozen=True)
class Trees:
    """What trees gave over lines.

    Attributes:
        lines: the summary of lines against plain decoding.
        over_lines: decode seconds with lines / with trees.
        over_lines_interval: 95 % interval of the median of that ratio; None as in Summary.
    """

    lines: Summary
    over_lines: float
    over_lines_interval: tuple[float, float] | None

    def as_json(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return asdict(self)


def takes_trees(model: SpeculativeModel) -> bool:
    """Whether the pair verifies trees; some targets, and several ranks, always verify lines."""
    return model.ranks is None and model.view.takes_trees(model.view.make_cache())


def wants_trees(settings: Settings) -> bool:
    """Whether trees are asked for; a fixed verify length grows none by cost."""
    if settings.tree == "auto":
        return settings.verify_length == "auto"
    return settings.tree not in (0, "off") and settings.verify_length not in (0, "off")


def lines_side(model: SpeculativeModel, settings: Settings) -> Sides:
    """Lines beside the trees that are asked for; nothing where there are none."""
    if not (wants_trees(settings) and takes_trees(model)):
        return {}
    return {_LINES: (dflash_run, replace(settings, tree=0))}


def against_lines(results: Sequence[Result]) -> Trees | None:
    """The figures of the prompts that count; None where lines were not run beside trees."""
    if _LINES not in results[0].sides:
        return None
    lines = overall([replace(r, dflash=r.sides[_LINES]) for r in results])
    against = overall([replace(r, plain=r.sides[_LINES]) for r in results])
    return Trees(lines, against.speedup, against.speedup_interval)
