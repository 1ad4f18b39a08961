"""The target as DFlash sees it: embedding, head, taps, and a cache that can be taken back."""

from dflash_mlx.target.transaction import Transaction
from dflash_mlx.target.view import TargetView

__all__ = ["TargetView", "Transaction"]
