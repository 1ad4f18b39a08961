"""How many bytes a sequence of some length will hold, told from a short one."""

from dataclasses import dataclass

from dflash_mlx.decode import PromptCache
from dflash_mlx.target import rows_of

_STEP = 256  # mlx-lm's caches grow by so many rows
_CHUNK = 2048  # rows of a prefill chunk stand in a window's buffer until the next token comes


@dataclass(frozen=True)
class _Growing:
    """A buffer that grows with the sequence: bytes a row, up to `most` rows."""

    row: float
    most: int | None

    def nbytes(self, tokens: int) -> float:
        rows = -(-tokens // _STEP) * _STEP
        return self.row * (rows if self.most is None else min(rows, self.most))


class Footprint:
    """The bytes of a pair's caches by the number of tokens.

    A cache class that nobody described counts as it is; it is watched while it grows.
    """

    def __init__(self, cache: PromptCache):
        """`cache` stands for at least one token."""
        self._growing: list[_Growing] = []
        self._fixed = 0
        for leaf, rows, most in rows_of(cache.target):
            if rows:
                longest = None if most is None else most + _CHUNK
                self._growing.append(_Growing(leaf.nbytes / rows, longest))
            else:
                self._fixed += leaf.nbytes
        self._context = 0.0
        for group in cache.context.groups:
            if group.limit is None:
                self._context += group.nbytes / group.keys.shape[2]
            else:
                self._fixed += group.nbytes

    def nbytes(self, tokens: int) -> int:
        """Of a sequence of so many tokens."""
        context = self._context * (1.25 * tokens + _STEP)  # it grows by a quarter at a time
        return int(self._fixed + context + sum(g.nbytes(tokens) for g in self._growing))
