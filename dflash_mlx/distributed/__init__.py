"""One target over several machines: mlx-lm shards it, and rank 0 decides what all ranks do."""

from dflash_mlx.distributed.decisions import Decisions
from dflash_mlx.distributed.ranks import Ranks

__all__ = ["Decisions", "Ranks"]
