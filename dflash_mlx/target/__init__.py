"""The target as DFlash sees it: embedding, head, taps, and a cache that can be taken back."""

from dflash_mlx.target.caches import rolls_back_by, rows_of
from dflash_mlx.target.rewind import (
    Snapshot,
    can_rewind,
    cut,
    fork,
    keeps_rows,
    restore,
    rewind,
    snapshot,
)
from dflash_mlx.target.transaction import Transaction
from dflash_mlx.target.view import TargetView

__all__ = [
    "Snapshot",
    "TargetView",
    "Transaction",
    "can_rewind",
    "cut",
    "fork",
    "keeps_rows",
    "restore",
    "rewind",
    "rolls_back_by",
    "rows_of",
    "snapshot",
]
