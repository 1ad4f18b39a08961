"""The shape classes of masked-block attention, as a draft calls it and as a verify does."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx

from .attention_kernel import HEAD_DIMS, MAX_LENGTH, row_tiles
from .attention_plain import plain_block_attention
from .shape_class import DTYPE_NAMES, Call, Implementation, dtype_name, key_numbers

LENGTHS = (4, 8, 16, 32)  # upper ends of the buckets of block lengths
# The context sizes at which classes are proved. A class reaches from half its size to twice it,
# and the last one on from there. With less context than half the first there is nothing to win.
CONTEXTS = (512, 2048, 8192, 32768)
USES = ("draft", "verify")


@dataclass(frozen=True)
class AttentionClass:
    """One class of calls: block lengths up to `length`, contexts around `context`.

    A draft's block lies apart from its context, under any mask and window. A verify's block lies
    in the buffer, is causal and sees all of the context; MLX's own attention is what else runs.
    """

    kernel: ClassVar[str] = "block_attention"

    use: str
    dim: int
    dtype: str
    length: int
    context: int
    ratio: int

    @property
    def key(self) -> str:
        """The name under which its verdict is kept."""
        numbers = f"l{self.length}-s{self.context}-g{self.ratio}"
        return f"{self.use}-{self.dtype}-d{self.dim}-{numbers}"

    def trials(self) -> Iterator[Call]:
        """Every threadgroup size that a block length of the class leads to, with all that varies.

        For a draft masks, windows, an empty context, and the block inside the buffers or apart;
        for both ragged lengths and sinks.
        """
        shortest = max((n for n in LENGTHS if n < self.length), default=0) + 1
        by_tiles = {row_tiles(self.ratio * n): n for n in range(shortest, self.length + 1)}
        for seed, length in enumerate(by_tiles.values()):
            sinks = mx.random.normal((4 * self.ratio,), key=mx.random.key(seed))
            if self.use == "draft":
                yield self.call(length, 301, seed, window=200, visible=_tree(length))
                yield self.call(length, 0, seed, visible="causal")
                yield self.call(length, self.context + 5, seed, start=3, in_buffer=True)
            else:
                yield self._verify(length, 301, seed)
                yield self._verify(length, self.context + 5, seed)
            yield self._verify(length, 77, seed) | {"sinks": sinks.astype(DTYPE_NAMES[self.dtype])}
        yield from next(self.timed())

    def timed(self) -> Iterator[list[Call]]:
        """Its longest block over its context."""
        if self.use == "draft":
            yield [self.call(self.length, self.context, seed=0)]
        else:
            yield [self._verify(self.length, self.context, seed=0)]

    def plain(self, **call: Any) -> mx.array:
        """What runs where the kernel does not."""
        if self.use == "draft":
            return plain_block_attention(**call)
        end = call["context_length"] + call["queries"].shape[2]
        keys, values = call["context_keys"][:, :, :end], call["context_values"][:, :, :end]
        return mx.fast.scaled_dot_product_attention(
            call["queries"],
            keys,
            values,
            scale=call["scale"],
            mask="causal",
            sinks=call.get("sinks"),
        )

    def bit_equal(self, kernel: Implementation) -> bool | None:
        """Nobody asks: its sums are another order in every implementation."""
        return None

    def _verify(self, length: int, context: int, seed: int) -> Call:
        return self.call(length, context, seed, visible="causal", in_buffer=True)

    def call(
        self,
        length: int,
        context: int,
        seed: int,
        *,
        start: int = 0,
        window: int | None = None,
        visible: mx.array | str | None = None,
        in_buffer: bool = False,
        kv_heads: int = 4,
    ) -> Call:
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


def attention_class(use: str, queries: mx.array, kv_heads: int, seen: int) -> AttentionClass | None:
    """The class of a call that sees so many context rows; None if it is too small to gain.

    Args:
        queries: [B, Hq, L, D] of a supported size and dtype.
    """
    _, heads, length, dim = queries.shape
    if seen < CONTEXTS[0] // 2:
        return None
    return AttentionClass(
        use=use,
        dim=dim,
        dtype=dtype_name(queries.dtype),
        length=next(n for n in LENGTHS if length <= n),
        context=next((n for n in CONTEXTS if seen < 2 * n), CONTEXTS[-1]),
        ratio=heads // kv_heads,
    )


def parse(fields: list[str]) -> AttentionClass | None:
    """The class whose key has these fields; None if it is no attention's."""
    numbers = key_numbers(fields[2:], "dlsg")
    if numbers is None or fields[0] not in USES or fields[1] not in DTYPE_NAMES:
        return None
    dim, length, context, ratio = numbers
    known = dim in HEAD_DIMS and length <= MAX_LENGTH and ratio > 0
    if not known or length not in LENGTHS or context not in CONTEXTS:
        return None
    return AttentionClass(fields[0], dim, fields[1], length, context, ratio)
