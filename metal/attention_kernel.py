"""Masked-block attention in two Metal kernels: attend to parts of the context, merge the parts."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import mlx.core as mx

from .attention_plain import first_visible
from .attention_source import ATTEND, HEADER, MERGE
from .fragments import UNROLL

MAX_LENGTH = 32  # a row's view of the block is one 32-bit word
HEAD_DIMS = (32, 64, 80, 96, 128, 256)
DTYPES = (mx.float32, mx.float16, mx.bfloat16)

_TILE_ROWS = 64  # query rows for which a context element is read once
_SIMDGROUPS = (1, 2, 4, 6, 8)  # 8 rows each; few choices, since each is compiled apart
# A threadgroup for every core of the larger chips, parts long enough that writing and merging
# them costs little beside the context, and short enough to balance. Guesses until a Mac is asked.
_TARGET_THREADGROUPS = 64
_MIN_PART, _MAX_PART = 256, 1024
_NO_WINDOW = 2**31 - 1

NAMES = ("block_attention", "block_attention_merge")
SOURCE = HEADER + ATTEND + MERGE


class AttentionKernel:
    """`block_attention` on the GPU; the shapes that it takes are those of `supported`.

    make is mx.fast.metal_kernel or something that stands in for it.
    """

    def __init__(self, make: Callable[..., Any] = mx.fast.metal_kernel) -> None:
        # Strides are followed, so that no buffer is ever copied to make it contiguous.
        self._attend = make(
            name=NAMES[0],
            input_names=[
                "queries",
                "context_keys",
                "context_values",
                "block_keys",
                "block_values",
                "visible",
                "extent",
                "scale",
            ],
            output_names=["parts", "softmax"],
            source=ATTEND,
            header=HEADER,
            ensure_row_contiguous=False,
        )
        self._merge = make(
            name=NAMES[1],
            input_names=["parts", "softmax", "sinks", "length"],
            output_names=["out"],
            source=MERGE,
            header=UNROLL,
        )

    def __call__(
        self,
        queries: mx.array,
        context_keys: mx.array,
        context_values: mx.array,
        block_keys: mx.array | None = None,
        block_values: mx.array | None = None,
        *,
        context_length: int,
        context_start: int = 0,
        window: int | None = None,
        visible: mx.array | str | None = None,
        scale: float,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """As `block_attention`, without its checks; a row that sees nothing gives zeros."""
        batch, heads, length, dim = queries.shape
        kv_heads = context_keys.shape[1]
        first = first_visible(context_length, context_start, window)
        tiles, simdgroups = row_tiles(heads // kv_heads * length)
        parts, part_length = context_parts(context_length - first, batch * kv_heads * tiles)
        in_buffer = block_keys is None
        extent = _extent(
            first,
            context_length,
            _NO_WINDOW if window is None else window,
            part_length,
            context_length if in_buffer else 0,
        )
        partial, softmax = self._attend(
            inputs=[
                queries,
                context_keys,
                context_values,
                context_keys if in_buffer else block_keys,
                context_values if in_buffer else block_values,
                _bits(visible, length),
                extent,
                _scalar(scale),
            ],
            template=[("T", queries.dtype), ("D", dim), ("SG", simdgroups)],
            grid=(parts * simdgroups * 32, tiles, batch * kv_heads),
            threadgroup=(simdgroups * 32, 1, 1),
            output_shapes=[
                (parts, batch * heads * length, dim),
                (parts, batch * heads * length, 2),
            ],
            output_dtypes=[mx.float32, mx.float32],
        )
        return self._merge(
            inputs=[
                partial,
                softmax,
                _no_sinks(heads) if sinks is None else sinks.astype(mx.float32),
                _count(length),
            ],
            template=[("T", queries.dtype), ("D", dim)],
            grid=(32, batch * heads * length, 1),
            threadgroup=(32, 8, 1),
            output_shapes=[queries.shape],
            output_dtypes=[queries.dtype],
        )[0]


def supported(queries: mx.array, *others: mx.array | None) -> bool:
    """Whether the kernel takes these queries [B, Hq, L, D] and keys and values."""
    return (
        0 < queries.shape[2] <= MAX_LENGTH
        and queries.shape[3] in HEAD_DIMS
        and queries.dtype in DTYPES
        and all(x is None or x.dtype == queries.dtype for x in others)
    )


def row_tiles(rows: int) -> tuple[int, int]:
    """How many row tiles, and simdgroups of eight rows in each, cover so many query rows."""
    tiles = -(-rows // _TILE_ROWS)
    eights = -(-rows // (8 * tiles))
    return tiles, next(n for n in _SIMDGROUPS if n >= eights)


def context_parts(seen: int, threadgroups: int) -> tuple[int, int]:
    """Into how many parts, and of what length, to cut a context of which so many rows are seen.

    threadgroups is how many there would be without a cut.
    """
    wanted = max(-(-_TARGET_THREADGROUPS // threadgroups), seen // _MAX_PART)
    wanted = max(1, min(wanted, seen // _MIN_PART))
    part = max(32, -(-seen // (wanted * 32)) * 32)
    return max(1, -(-seen // part)), part


def visible_bits(visible: mx.array) -> mx.array:
    """The rows of an [L, L] boolean mask as bits: uint32, bit j of entry i is [i, j].

    There are at least eight entries: MLX passes fewer in another address space, and a kernel is
    compiled anew whenever that changes.
    """
    length = visible.shape[0]
    bits = (visible * _powers(length)).sum(axis=1)
    return bits if length >= 8 else mx.pad(bits, (0, 8 - length))


def _bits(visible: mx.array | str | None, length: int) -> mx.array:
    if isinstance(visible, mx.array):
        return visible_bits(visible)
    return _all_visible() if visible is None else _causal(length)


# These are data before they are cached: a lazy array must not be kept across traced calls.


@lru_cache
def _all_visible() -> mx.array:
    return mx.array([2**32 - 1] * MAX_LENGTH, dtype=mx.uint32)


@lru_cache
def _causal(length: int) -> mx.array:
    rows = [2 ** (i + 1) - 1 for i in range(length)]
    return mx.array(rows + [0] * (8 - length), dtype=mx.uint32)


@lru_cache
def _powers(length: int) -> mx.array:
    return mx.array([2**j for j in range(length)], dtype=mx.uint32)


@lru_cache
def _no_sinks(heads: int) -> mx.array:
    return mx.array([float("-inf")] * heads, dtype=mx.float32)


@lru_cache
def _count(value: int) -> mx.array:
    return mx.array(value, dtype=mx.int32)


@lru_cache(maxsize=64)
def _extent(*values: int) -> mx.array:
    return mx.array(values, dtype=mx.int32)


@lru_cache(maxsize=64)
def _scalar(value: float) -> mx.array:
    return mx.array(value, dtype=mx.float32)
