"""Random products of rows and a quantized matrix, and their answers by the definition."""

from dataclasses import dataclass

import hypothesis.strategies as st
import mlx.core as mx
import numpy as np

from dflash_mlx.metal.quantized_rows import BITS, GROUP_SIZES

from .cases import DTYPES

# Largest difference from float64 allowed, over the result plus sqrt(K), the size of a usual one.
# For 16 bits that is the rounding of the result, for 32 that of the sums.
TOLERANCE = {"float32": 2e-6, "float16": 6e-4, "bfloat16": 4.5e-3}


@dataclass(frozen=True)
class RowsCase:
    """One call of quantized_rows; the arrays follow from seed. groups is K / group_size."""

    rows: int
    outputs: int
    groups: int
    group_size: int = 64
    bits: int = 4
    dtype: str = "float32"
    seed: int = 0

    @property
    def inner(self) -> int:
        """K."""
        return self.groups * self.group_size

    def call(self) -> dict:
        """Keyword arguments of quantized_rows."""
        keys = mx.random.split(mx.random.key(self.seed), 2)
        matrix = mx.random.normal((self.outputs, self.inner), key=keys[0])
        w, scales, biases = mx.quantize(matrix, group_size=self.group_size, bits=self.bits)
        dtype = DTYPES[self.dtype]
        return {
            "x": mx.random.normal((self.rows, self.inner), key=keys[1]).astype(dtype),
            "w": w,
            "scales": scales.astype(dtype),
            "biases": biases.astype(dtype),
            "group_size": self.group_size,
            "bits": self.bits,
        }


def parts(call: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """x [M, K] and, for each weight, its integer, scale and bias [N, K], float32 all."""
    words = np.array(call["w"])
    bits, group = call["bits"], call["group_size"]
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    integers = (words[..., None] >> shifts & np.uint32(2**bits - 1)).reshape(len(words), -1)
    x, scales, biases = (np.array(call[n].astype(mx.float32)) for n in ("x", "scales", "biases"))
    return (
        x,
        integers.astype(np.float32),
        np.repeat(scales, group, axis=1),
        np.repeat(biases, group, axis=1),
    )


def error_of(out: mx.array, call: dict) -> float:
    """The largest difference from float64, as TOLERANCE counts it; NaN where there is one."""
    x, integers, scales, biases = (a.astype(np.float64) for a in parts(call))
    expected = x @ (integers * scales + biases).T
    gaps = np.abs(np.array(out.astype(mx.float32)) - expected)
    return float((gaps / (np.abs(expected) + np.sqrt(x.shape[1]))).max())


def in_order_of_one_row(call: dict) -> np.ndarray:
    """x times the matrix [M, N] in float32, added in the order of MLX's kernel for one row.

    qmv_fast_impl and qmv_impl of MLX 0.32.4's quantized.h: a lane takes two words, or one where
    sizes are uneven, of every 64 or 32; then simd_sum, here as the emulator adds.
    """
    x, integers, scales, biases = parts(call)
    outputs, inner = integers.shape
    even = inner % 512 == 0 and outputs % 8 == 0
    per_lane = (2 if even else 1) * 32 // call["bits"]
    run = 4 if call["bits"] == 4 else 1
    result = np.zeros((len(x), outputs, 32), np.float32)
    for k in range(0, inner, per_lane):
        part = np.zeros((len(x), outputs), np.float32)
        total = np.zeros((len(x), 1), np.float32)
        for i in range(k, k + per_lane, run):
            products = [x[:, None, j] * integers[None, :, j] for j in range(i, i + run)]
            plain = [x[:, None, j] for j in range(i, i + run)]
            part, total = part + _sum(products), total + _sum(plain)
        result[..., k // per_lane % 32] += scales[:, k] * part + total * biases[:, k]
    while result.shape[-1] > 1:
        result = result[..., 0::2] + result[..., 1::2]
    return result[..., 0]


def _sum(terms: list[np.ndarray]) -> np.ndarray:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


@st.composite
def rows_cases(draw, dtypes=("float32",)):
    """Any RowsCase of small size."""
    return RowsCase(
        rows=draw(st.integers(2, 16)),
        outputs=draw(st.integers(8, 70)),
        groups=draw(st.integers(1, 9)),
        group_size=draw(st.sampled_from(GROUP_SIZES)),
        bits=draw(st.sampled_from(BITS)),
        dtype=draw(st.sampled_from(dtypes)),
        seed=draw(st.integers(0, 2**20)),
    )
