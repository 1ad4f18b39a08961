"""The algorithm: the decode loop, acceptance, verify length and statistics."""

from dflash_mlx.decode.acceptance import LogitsProcessor
from dflash_mlx.decode.cache import BorrowedCache, PromptCache
from dflash_mlx.decode.loop import Decoder, Options
from dflash_mlx.decode.sampling import Sampler, make_sampler
from dflash_mlx.decode.schedule import FixedLength, VerifyLength
from dflash_mlx.decode.statistics import Statistics

__all__ = [
    "BorrowedCache",
    "Decoder",
    "FixedLength",
    "LogitsProcessor",
    "Options",
    "PromptCache",
    "Sampler",
    "Statistics",
    "VerifyLength",
    "make_sampler",
]
