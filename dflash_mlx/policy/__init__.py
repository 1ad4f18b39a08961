"""How much to propose now. Pure Python: it knows times, tokens and confidences, and no arrays."""

from dflash_mlx.policy.adaptive import AdaptiveLength
from dflash_mlx.policy.costs import Costs
from dflash_mlx.policy.kept import CostsFile
from dflash_mlx.policy.learned import Learned
from dflash_mlx.policy.protocol import Cycle, FixedLength, Grown, Kind, Lap, Policy, Sign

__all__ = [
    "AdaptiveLength",
    "Costs",
    "CostsFile",
    "Cycle",
    "FixedLength",
    "Grown",
    "Kind",
    "Lap",
    "Learned",
    "Policy",
    "Sign",
]
