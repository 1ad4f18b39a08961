"""What each Metal kernel gains: DFlash with and without it, on the same prompts."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from dflash_mlx.measure.comparison import Result
from dflash_mlx.measure.run import Run, Settings, dflash_run
from dflash_mlx.measure.summary import Summary
from dflash_mlx.measure.summary import sides as summaries
from dflash_mlx.metal.catalogue import USES
from dflash_mlx.metal.selection import MODES, Selection
from dflash_mlx.pairs import SpeculativeModel
from dflash_mlx.policy import Learned

KERNELS = "kernels"  # what the sides try
NO_METAL = "There is no Metal here: the kernels cannot run, so there is nothing to compare."


@dataclass
class KernelSide:
    """DFlash with some kernels. What cycles cost is another thing for every side, so that each
    learns it for itself, and keeps it in no file."""

    selection: Selection
    learned: Learned | None = field(default=None, repr=False)

    def run(
        self,
        model: SpeculativeModel,
        tokenizer: TokenizerWrapper,
        prompt: Sequence[int],
        settings: Settings,
    ) -> Run:
        """`dflash_run` with these kernels."""
        if self.learned is None:
            self.learned = Learned(model.draft.most_proposals)
        kept, model.learned = model.learned, self.learned
        try:
            with self.selection.used():
                return dflash_run(model, tokenizer, prompt, settings)
        finally:
            model.learned = kept


def kernel_sides(modes: Sequence[str], selection: Selection) -> dict[str, KernelSide]:
    """A side for every mode, and where all kernels may run one for each use alone."""
    sides = {}
    for mode in modes:
        if mode != "off":
            for use in USES:
                sides[f"{mode}, {use}"] = KernelSide(selection.variant(mode, [use]))
        sides[mode] = KernelSide(selection.variant(mode))
    return sides


def side_name(side: str) -> str:
    """A side's name for readers: the mode, and what alone kernels are used for."""
    mode, _, use = side.partition(", ")
    return f"{mode}, {USES[use]} alone" if use else mode


def modes(text: str) -> list[str]:
    """The modes of a list such as "off,auto".

    Raises:
        ValueError: one is unknown.
    """
    found = list(dict.fromkeys(part.strip() for part in text.lower().split(",")))
    for mode in found:
        if mode not in MODES:
            raise ValueError(f"{mode!r} is no mode of kernels; use off, auto or on, or several.")
    return found


@dataclass(frozen=True)
class Kernels:
    """What a comparison of kernels found.

    Attributes:
        sides: the summary of every side against plain decoding.
        gains: decode seconds without any kernel / with the side's; empty where no side had none.
    """

    sides: dict[str, Summary]
    gains: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return asdict(self)


def compared(results: Sequence[Result]) -> Kernels | None:
    """The figures of the prompts that count; None where kernels were not compared."""
    sides = summaries(results, KERNELS)
    if not sides:
        return None
    off = sides.get("off")
    speed = {n: s.dflash.generation_tps for n, s in sides.items()}
    gains = {n: speed[n] / speed["off"] for n in sides} if off and speed["off"] else {}
    return Kernels(sides, gains)
