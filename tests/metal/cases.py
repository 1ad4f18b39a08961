"""Random attention problems and their answer by the definition, in float64 NumPy."""

from dataclasses import dataclass

import hypothesis.strategies as st
import mlx.core as mx
import numpy as np

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
# Largest error allowed against float64 on inputs of order one, rounded alike. The plain way
# rounds its scores and weights to the dtype, the kernel only its result.
PLAIN_TOLERANCE = {"float32": 2e-5, "float16": 1e-2, "bfloat16": 8e-2}
KERNEL_TOLERANCE = {"float32": 1e-5, "float16": 3e-3, "bfloat16": 2e-2}


@dataclass(frozen=True)
class Case:
    """One call of block_attention; the arrays follow from seed."""

    length: int
    dim: int = 64
    kv_heads: int = 1
    ratio: int = 1
    context_length: int = 0
    context_start: int = 0
    window: int | None = None
    mask: str = "none"  # none, causal or tree
    in_buffer: bool = False
    dtype: str = "float32"
    batch: int = 1
    seed: int = 0
    spread: float = 1.0  # of the scores
    sinks: bool = False

    def arrays(self) -> dict:
        """Keyword arguments of block_attention.

        Rows of the buffers that are neither context nor block hold NaN: reading one shows.
        """
        random = np.random.default_rng(self.seed)
        dtype = DTYPES[self.dtype]

        def draw(*shape):
            return random.standard_normal(shape).astype(np.float32)

        block = (self.batch, self.kv_heads, self.length, self.dim)
        end = self.context_length + (self.length if self.in_buffer else 0)
        capacity = end + int(random.integers(0, 5)) + 1
        queries = draw(self.batch, self.kv_heads * self.ratio, self.length, self.dim) * self.spread
        buffers = []
        for _ in "kv":
            buffer = draw(self.batch, self.kv_heads, capacity, self.dim)
            buffer[:, :, end:] = np.nan
            buffers.append(mx.array(buffer).astype(dtype))
        blocks = [None, None] if self.in_buffer else [mx.array(draw(*block)) for _ in "kv"]
        visible = None
        if self.mask == "causal":
            visible = np.tril(np.ones((self.length, self.length), dtype=bool))
        elif self.mask == "tree":
            visible = random.random((self.length, self.length)) < 0.5
            np.fill_diagonal(visible, True)
        sinks = mx.array(draw(self.kv_heads * self.ratio) * 2).astype(dtype)
        return {
            "sinks": sinks if self.sinks else None,
            "queries": mx.array(queries).astype(dtype),
            "context_keys": buffers[0],
            "context_values": buffers[1],
            "block_keys": None if blocks[0] is None else blocks[0].astype(dtype),
            "block_values": None if blocks[1] is None else blocks[1].astype(dtype),
            "context_length": self.context_length,
            "context_start": self.context_start,
            "window": self.window,
            "visible": None if visible is None else mx.array(visible),
            "scale": self.dim**-0.5,
        }


def by_definition(
    *,
    queries,
    context_keys,
    context_values,
    block_keys,
    block_values,
    context_length,
    context_start,
    window,
    visible,
    scale,
    sinks=None,
) -> np.ndarray:
    """Masked-block attention of the given inputs in float64, row by row.

    Shapes as in block_attention; returns [B, Hq, L, D] float64.
    """
    q, ck, cv = (_float64(x) for x in (queries, context_keys, context_values))
    batch, heads, length, _ = q.shape
    if block_keys is None:
        block = slice(context_length, context_length + length)
        bk, bv = ck[:, :, block], cv[:, :, block]
    else:
        bk, bv = _float64(block_keys), _float64(block_values)
    sees = np.ones((length, length), dtype=bool) if visible is None else np.array(visible)
    share = heads // ck.shape[1]
    out = np.empty_like(q)
    for i in range(length):
        first = context_start
        if window is not None:
            first = max(first, context_length + i - window + 1)
        context = slice(min(first, context_length), context_length)
        for head in range(heads):
            for b in range(batch):
                kv = head // share
                keys = np.concatenate([ck[b, kv, context], bk[b, kv, sees[i]]])
                values = np.concatenate([cv[b, kv, context], bv[b, kv, sees[i]]])
                scores = keys @ q[b, head, i] * scale
                sink = -np.inf if sinks is None else _float64(sinks)[head]
                best = max(scores.max(), sink)
                weights = np.exp(scores - best)
                out[b, head, i] = weights @ values / (weights.sum() + np.exp(sink - best))
    return out


def _float64(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)


def largest_error(out: mx.array, expected: np.ndarray) -> float:
    """The largest absolute difference; NaN anywhere gives NaN, which no tolerance admits."""
    return float(np.abs(_float64(out) - expected).max())


@st.composite
def cases(draw, dims=(64,), dtypes=("float32",), max_context=200, ratios=(1, 2, 3, 4, 8)):
    """Any Case within the given dimensions."""
    context_length = draw(st.integers(0, max_context))
    return Case(
        length=draw(st.integers(1, 32)),
        dim=draw(st.sampled_from(dims)),
        kv_heads=draw(st.integers(1, 2)),
        ratio=draw(st.sampled_from(ratios)),
        context_length=context_length,
        context_start=draw(st.one_of(st.just(0), st.integers(0, context_length))),
        window=draw(st.one_of(st.none(), st.integers(1, context_length + 40))),
        mask=draw(st.sampled_from(["none", "causal", "tree"])),
        in_buffer=draw(st.booleans()),
        dtype=draw(st.sampled_from(dtypes)),
        batch=draw(st.integers(1, 2)),
        seed=draw(st.integers(0, 2**20)),
        sinks=draw(st.booleans()),
    )
