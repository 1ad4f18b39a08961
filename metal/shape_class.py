"""Shape classes: calls alike enough that one proof and one verdict serve them all."""

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx

from .attention_kernel import DTYPES, HEAD_DIMS, MAX_LENGTH, row_tiles

LENGTHS = (4, 8, 16, 32)  # upper ends of the buckets of block lengths
# The context sizes at which classes are proved. A class reaches from half its size to twice it,
# and the last one on from there. With less context than half the first there is nothing to win.
CONTEXTS = (512, 2048, 8192, 32768)
DTYPE_NAMES = {str(dtype).removeprefix("mlx.core."): dtype for dtype in DTYPES}


@dataclass(frozen=True)
class ShapeClass:
    """One class of calls: block lengths up to `length`, contexts around `context`."""

    dim: int
    dtype: str
    length: int
    context: int
    ratio: int

    @property
    def key(self) -> str:
        """The name under which its verdict is kept."""
        return f"d{self.dim}-{self.dtype}-l{self.length}-s{self.context}-g{self.ratio}"

    def trials(self) -> Iterator[dict]:
        """Random calls of block_attention that compile and try all that the class may need.

        Every threadgroup size that a block length of the class leads to occurs, with masks,
        windows, ragged lengths, an empty context, and the block inside the buffers or apart.
        """
        shortest = max((n for n in LENGTHS if n < self.length), default=0) + 1
        by_tiles = {row_tiles(self.ratio * n): n for n in range(shortest, self.length + 1)}
        for seed, length in enumerate(by_tiles.values()):
            yield self.call(length, 301, seed, window=200, visible=_tree(length))
            yield self.call(length, 0, seed, visible=mx.tri(length).astype(mx.bool_))
            yield self.call(length, self.context + 5, seed, start=3, in_buffer=True)
        yield self.typical()

    def typical(self) -> dict:
        """The call by which the class is timed: its longest block over its context."""
        return self.call(self.length, self.context, seed=0)

    def call(
        self,
        length: int,
        context: int,
        seed: int,
        *,
        start: int = 0,
        window: int | None = None,
        visible: mx.array | None = None,
        in_buffer: bool = False,
        kv_heads: int = 4,
    ) -> dict:
        """Keyword arguments of block_attention with normal random arrays."""
        keys = mx.random.split(mx.random.key(seed), 5)
        dtype = DTYPE_NAMES[self.dtype]

        def draw(key: mx.array, heads: int, rows: int) -> mx.array:
            return mx.random.normal((1, heads, rows, self.dim), key=key).astype(dtype)

        capacity = context + length + 7
        return {
            "queries": draw(keys[0], kv_heads * self.ratio, length),
            "context_keys": draw(keys[1], kv_heads, capacity),
            "context_values": draw(keys[2], kv_heads, capacity),
            "block_keys": None if in_buffer else draw(keys[3], kv_heads, length),
            "block_values": None if in_buffer else draw(keys[4], kv_heads, length),
            "context_length": context,
            "context_start": start,
            "window": window,
            "visible": visible,
            "scale": self.dim**-0.5,
        }


def _tree(length: int) -> mx.array:
    """Two branches from one root: row i sees every second row up to itself, and row 0."""
    rows = mx.arange(length)
    distance = rows[:, None] - rows[None]
    return ((distance >= 0) & (distance % 2 == 0)) | (rows[None] == 0)


def shape_class(queries: mx.array, kv_heads: int, seen: int) -> ShapeClass | None:
    """The class of a call that sees so many context rows; None if it is too small to gain.

    queries: [B, Hq, L, D] of a supported size and dtype.
    """
    _, heads, length, dim = queries.shape
    if seen < CONTEXTS[0] // 2:
        return None
    return ShapeClass(
        dim=dim,
        dtype=str(queries.dtype).removeprefix("mlx.core."),
        length=next(n for n in LENGTHS if length <= n),
        context=next((n for n in CONTEXTS if seen < 2 * n), CONTEXTS[-1]),
        ratio=heads // kv_heads,
    )


def parse(key: str) -> ShapeClass:
    """The class with this key. Raises ValueError for anything else."""
    fields = key.split("-")
    if len(fields) == 5 and fields[1] in DTYPE_NAMES:
        numbers = fields[:1] + fields[2:]
        if all(f[:1] == c and f[1:].isdigit() for f, c in zip(numbers, "dlsg", strict=True)):
            dim, length, context, ratio = (int(f[1:]) for f in numbers)
            known = dim in HEAD_DIMS and length <= MAX_LENGTH and ratio > 0
            if known and length in LENGTHS and context in CONTEXTS:
                return ShapeClass(dim, fields[1], length, context, ratio)
    raise ValueError(f"{key!r} is not the key of a shape class.")
