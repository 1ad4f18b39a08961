"""The algorithm: the decode loop, acceptance, verify length and statistics."""

from dflash_mlx.decode.acceptance import LogitsProcessor
from dflash_mlx.decode.cache import BorrowedCache, Moment, PromptCache
from dflash_mlx.decode.costs import costs_file
from dflash_mlx.decode.emission import Token
from dflash_mlx.decode.guide import Guide, restrict
from dflash_mlx.decode.loop import Decoder
from dflash_mlx.decode.options import Options
from dflash_mlx.decode.prefill import Prefilled, fill
from dflash_mlx.decode.randomness import OwnState
from dflash_mlx.decode.sampling import Sampler, make_sampler
from dflash_mlx.decode.statistics import Statistics

__all__ = [
    "BorrowedCache",
    "Decoder",
    "Guide",
    "LogitsProcessor",
    "Moment",
    "Options",
    "OwnState",
    "Prefilled",
    "PromptCache",
    "Sampler",
    "Statistics",
    "Token",
    "costs_file",
    "fill",
    "make_sampler",
    "restrict",
]
