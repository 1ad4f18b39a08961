"""The algorithm: the decode loop, acceptance, verify length and statistics."""

from dflash_mlx.decode.acceptance import LogitsProcessor
from dflash_mlx.decode.adaptive import AdaptiveLength, Learned
from dflash_mlx.decode.cache import BorrowedCache, PromptCache
from dflash_mlx.decode.cost import CostModel
from dflash_mlx.decode.emission import Token
from dflash_mlx.decode.loop import Decoder, Options, Prefilled
from dflash_mlx.decode.rehearsal import measure_costs
from dflash_mlx.decode.sampling import Sampler, make_sampler
from dflash_mlx.decode.schedule import FixedLength, VerifyLength
from dflash_mlx.decode.seeds import costs_file, kept_costs
from dflash_mlx.decode.statistics import Statistics

__all__ = [
    "AdaptiveLength",
    "BorrowedCache",
    "CostModel",
    "Decoder",
    "FixedLength",
    "Learned",
    "LogitsProcessor",
    "Options",
    "Prefilled",
    "PromptCache",
    "Sampler",
    "Statistics",
    "Token",
    "VerifyLength",
    "costs_file",
    "kept_costs",
    "make_sampler",
    "measure_costs",
]
