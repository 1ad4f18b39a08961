"""What is to be trained, on what, and how."""

import hashlib
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dflash_mlx.errors import DFlashError

STEPS = 2000  # of a run that is not told otherwise


@dataclass(frozen=True)
class Plan:
    """What is trained, on what, and how; the names are the command line's.

    Attributes:
        target: directory or hub id.
        data: a .jsonl, .json or .txt file.
        revision: branch, tag or commit of the target's hub repository.
        adapter_path: trained adapter weights for the target.
        draft_layers, block_size, taps: the shape of a new draft; None takes 5 layers, blocks of 16
            and five taps spread evenly, or with `init` what that draft has.
        mask_token: the token that a new draft's blocks are masked with, or its id; None finds one.
        steps: optimizer steps; None takes 2000, or as many as fit into `minutes`.
        minutes: that the whole run may take, the target's answers included, of which it then gives
            fewer; None for no limit.
        batch_size: sequences of full length that a step holds; of shorter ones as many more.
        seq_length: tokens of a sequence.
        anchors: blocks drawn from a sequence of full length; from a shorter one as many fewer.
        lr, warmup: the highest learning rate, and the steps until it is reached.
        gamma: row k of a block weighs exp(-(k - 1) / gamma) in the loss, as in DFlash's paper; None
            weighs it by what it adds to the expected acceptance, as D-PACE does.
        seed: of the weights, the order of the data and the anchors.
        init: a draft to go on from.
        keep_features: bytes of the target's outputs to keep on disk while the run lasts, so that
            they are computed once; 0 computes them in every step.
        regenerate: so many rows, from the first on, are answered by the target.
        think: whether the target should think in these answers; None leaves it to its template.
        skip_bad_rows: leave out rows that cannot be used, instead of ending with the first.
    """

    target: str
    data: Path
    draft_layers: int | None = None
    block_size: int | None = None
    taps: tuple[int, ...] | None = None
    mask_token: str | None = None
    steps: int | None = None
    batch_size: int = 8
    seq_length: int = 512
    anchors: int = 64
    lr: float = 6e-4
    warmup: int = 100
    gamma: float | None = None
    seed: int = 0
    init: str | None = None
    keep_features: int = 8 << 30
    regenerate: int = 0
    minutes: float | None = None
    think: bool | None = None
    skip_bad_rows: bool = False
    revision: str | None = None
    adapter_path: str | None = None

    def check(self) -> None:
        """Raise DFlashError for a number that cannot be meant."""
        least = {"steps": 1, "batch_size": 1, "seq_length": 4, "anchors": 1}
        least |= {"warmup": 0, "seed": 0, "regenerate": 0, "keep_features": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise DFlashError(f"{name} is {value}; give at least {bound}.")
        for name in ("lr", "gamma", "minutes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise DFlashError(f"{name} is {getattr(self, name)}; give more than 0.")
        if self.steps is not None and self.minutes is not None:
            raise DFlashError("Minutes decide how many steps there are; give one of the two.")
        shape = (self.draft_layers, self.block_size, self.taps, self.mask_token)
        if self.init is not None and any(part is not None for part in shape):
            raise DFlashError(
                "A draft to go on from has its own layers, block size, taps and mask token; leave "
                "these out, or init."
            )

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return STEPS if self.steps is None else self.steps

    def within(self, seconds: float, each: float) -> "Plan":
        """The plan with as many steps as take so many seconds, where one takes `each`.

        Raises:
            DFlashError: not even ten do.
        """
        steps = int(seconds / each)
        if steps < 10:
            raise DFlashError(
                f"A step takes {each:.1f} seconds here, so not even ten fit into the minutes that "
                "are left; allow more, or lower batch_size, anchors or seq_length."
            )
        return replace(self, steps=steps)

    def blocks_of(self, width: int) -> int:
        """Blocks drawn from a sequence that is `width` tokens wide with its padding."""
        return max(1, round(self.anchors * width / self.seq_length))

    def learning_rate_at(self, step: int) -> float:
        """Rises over `warmup` steps or a quarter of all, then falls to nothing along a cosine."""
        rise = min(1.0, (step + 1) / max(1, min(self.warmup, self.total_steps // 4)))
        return self.lr * rise * 0.5 * (1 + math.cos(math.pi * step / self.total_steps))

    def options(self) -> dict[str, Any]:
        """The plan as JSON values, with a digest of the data: what a resumed run must share."""
        options = asdict(self)
        options["data"] = hashlib.sha256(self.data.read_bytes()).hexdigest()
        options["steps"] = self.total_steps
        options["taps"] = None if self.taps is None else list(self.taps)
        return options
