"""A few rows times a quantized matrix, in Metal kernels that read the matrix once for all rows.

MLX's own kernels read it once for a handful of rows, or for one, and again for the next ones,
and a verify of 16 rows is bound by exactly these reads.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from .fragments import FRAGMENTS, UNROLL

MIN_ROWS, MAX_ROWS = 2, 16
BITS = (4, 8)
GROUP_SIZES = (32, 64, 128)
DTYPES = (mx.float32, mx.float16, mx.bfloat16)

# Up to so many rows each lane keeps sums of its own, from then on simdgroup matrices do. By count
# of instructions the two cross at six rows; at six, the lanes' registers (below) get scarce.
MAX_FEW = 5
_FEW_SIMDGROUPS, _FEW_OUTPUTS = 2, 4  # as in MLX's kernel for one row
_MANY_SIMDGROUPS, _MANY_OUTPUTS = 4, 8

# A simdgroup makes four outputs of every row. It walks along K as MLX's kernel for one row does,
# each lane with its own few words, and adds in the same order: so a row's result hangs neither on
# the rows beside it nor, if the compiler treats both alike, on which kernel made it.
# Registers of a lane for M rows: 32 for decoded weights, 8 M for sums, M + 8 for x; 85 at five.
FEW = """
    constexpr int PER_WORD = 32 / BITS;
    constexpr int PER_LANE = LANE_WORDS * PER_WORD;
    constexpr int SHARE = G / PER_LANE;  // lanes with the same scale: one reads it
    int inner = x_shape[1], outer = w_shape[0];
    int words = inner / PER_WORD, groups = inner / G;
    uint lane = thread_index_in_simdgroup;
    uint leader = lane / SHARE * SHARE;
    int first = int(threadgroup_position_in_grid.x * SIMDGROUPS + simdgroup_index_in_threadgroup)
        * OUTPUTS;

    float sum[ROWS][OUTPUTS] = {};
    for (int from = 0; from < inner; from += 32 * PER_LANE) {
        int k = from + int(lane) * PER_LANE;
        bool inside = k < inner;
        float scale[OUTPUTS], bias[OUTPUTS];
        UNROLL
        for (int o = 0; o < OUTPUTS; o++) {
            scale[o] = 0.0f;
            bias[o] = 0.0f;
            if (inside && lane == leader) {
                size_t at = size_t(min(first + o, outer - 1)) * groups + k / G;
                scale[o] = static_cast<float>(scales[at]);
                bias[o] = static_cast<float>(biases[at]);
            }
            scale[o] = simd_shuffle(scale[o], ushort(leader));
            bias[o] = simd_shuffle(bias[o], ushort(leader));
        }
        if (inside) {
            float part[ROWS][OUTPUTS] = {}, total[ROWS] = {};
            UNROLL
            for (int n = 0; n < LANE_WORDS; n++) {
                float weight[OUTPUTS][PER_WORD];
                UNROLL
                for (int o = 0; o < OUTPUTS; o++) {
                    uint word = w[size_t(min(first + o, outer - 1)) * words + k / PER_WORD + n];
                    UNROLL
                    for (int i = 0; i < PER_WORD; i++) {
                        weight[o][i] = static_cast<float>(word >> (BITS * i) & ((1u << BITS) - 1));
                    }
                }
                UNROLL
                for (int m = 0; m < ROWS; m++) {
                    float v[PER_WORD];
                    UNROLL
                    for (int i = 0; i < PER_WORD; i++) {
                        v[i] = static_cast<float>(x[m * inner + k + n * PER_WORD + i]);
                    }
                    UNROLL
                    for (int i = 0; i < PER_WORD; i += 4) {
                        if (BITS == 4) {
                            total[m] += v[i] + v[i + 1] + v[i + 2] + v[i + 3];
                        } else {
                            total[m] = total[m] + v[i] + v[i + 1] + v[i + 2] + v[i + 3];
                        }
                    }
                    UNROLL
                    for (int o = 0; o < OUTPUTS; o++) {
                        UNROLL
                        for (int i = 0; i < PER_WORD; i += 4) {
                            if (BITS == 4) {
                                part[m][o] += v[i] * weight[o][i] + v[i + 1] * weight[o][i + 1]
                                    + v[i + 2] * weight[o][i + 2] + v[i + 3] * weight[o][i + 3];
                            } else {
                                part[m][o] += v[i] * weight[o][i];
                                part[m][o] += v[i + 1] * weight[o][i + 1];
                                part[m][o] += v[i + 2] * weight[o][i + 2];
                                part[m][o] += v[i + 3] * weight[o][i + 3];
                            }
                        }
                    }
                }
            }
            UNROLL
            for (int m = 0; m < ROWS; m++) {
                UNROLL
                for (int o = 0; o < OUTPUTS; o++) {
                    sum[m][o] += scale[o] * part[m][o] + total[m] * bias[o];
                }
            }
        }
    }
    UNROLL
    for (int m = 0; m < ROWS; m++) {
        UNROLL
        for (int o = 0; o < OUTPUTS; o++) {
            float value = simd_sum(sum[m][o]);
            if (lane == 0 && first + o < outer) {
                out[m * size_t(outer) + first + o] = static_cast<T>(value);
            }
        }
    }
"""

# A simdgroup makes eight outputs of all rows, as the product of 8 x 8 matrices: decoded weights
# (output, k) times x (k, row). The four lanes that hold an output's weights take 32 of a chunk's
# 128 k each, in whole words. Which k is in which column of which matrix is free as long as
# weights and x agree, so x is laid out for it: the matrices read their eight k one below another.
# x goes through threadgroup memory because 32 outputs share it; a thread places one k of a chunk.
MANY = """
    constexpr int PER_WORD = 32 / BITS;
    constexpr int HALF = PER_WORD / 2;  // matrices that a word gives: each takes two of its values
    constexpr int CHUNK = 128;
    constexpr int PITCH = 8 * TILES + 2;  // the eight k start in different banks
    constexpr uint SHARED_LANES = G == 32 ? 0 : (G == 64 ? 1 : 9);  // bits that tell them apart
    threadgroup T tile[CHUNK * PITCH];

    int rows = x_shape[0], inner = x_shape[1], outer = w_shape[0];
    uint lane = thread_index_in_simdgroup;
    uint leader = lane & ~SHARED_LANES;
    int at_row = fragment_row(lane), at_column = fragment_column(lane);
    int output = int(threadgroup_position_in_grid.x * SIMDGROUPS + simdgroup_index_in_threadgroup)
        * 8 + at_row;
    size_t weights_at = size_t(output) * (inner / PER_WORD);
    size_t scales_at = size_t(output) * (inner / G);

    int own = thread_position_in_threadgroup.x;
    int nth = own % PER_WORD;
    int own_matrix = own % 32 / PER_WORD * HALF + nth % HALF;
    int own_place = (own_matrix * 8 + own / 32 * 2 + nth / HALF) * PITCH;

    simdgroup_matrix<float, 8, 8> sum[TILES];
    UNROLL
    for (int r = 0; r < TILES; r++) {
        sum[r] = matrix_of(0.0f, 0.0f);
    }
    for (int from = 0; from < inner; from += CHUNK) {
        int k = from + at_column / 2 * 32;
        bool inside = k < inner && output < outer;
        // The weights are asked for first, and are on their way while x is laid out.
        uint word[BITS];
        UNROLL
        for (int n = 0; n < BITS; n++) {
            word[n] = 0;
            if (inside) {
                word[n] = w[weights_at + k / PER_WORD + n];
            }
        }
        float scale = 0.0f, bias = 0.0f;
        if (inside && lane == leader) {
            scale = static_cast<float>(scales[scales_at + k / G]);
            bias = static_cast<float>(biases[scales_at + k / G]);
        }
        scale = simd_shuffle(scale, ushort(leader));
        bias = simd_shuffle(bias, ushort(leader));

        threadgroup_barrier(mem_flags::mem_threadgroup);
        UNROLL
        for (int m = 0; m < 8 * TILES; m++) {
            T v = static_cast<T>(0.0f);
            if (m < rows && from + own < inner) {
                v = x[m * inner + from + own];
            }
            tile[own_place + m] = v;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);

        UNROLL
        for (int n = 0; n < BITS; n++) {
            UNROLL
            for (int f = 0; f < HALF; f++) {
                uint left = word[n] >> (BITS * f) & ((1u << BITS) - 1);
                uint right = word[n] >> (BITS * (f + HALF)) & ((1u << BITS) - 1);
                auto weights = matrix_of(static_cast<float>(left) * scale + bias,
                                         static_cast<float>(right) * scale + bias);
                UNROLL
                for (int r = 0; r < TILES; r++) {
                    int at = ((n * HALF + f) * 8 + at_row) * PITCH + 8 * r + at_column;
                    auto values = matrix_of(static_cast<float>(tile[at]),
                                            static_cast<float>(tile[at + 1]));
                    simdgroup_multiply_accumulate(sum[r], weights, values, sum[r]);
                }
            }
        }
    }
    UNROLL
    for (int r = 0; r < TILES; r++) {
        UNROLL
        for (int e = 0; e < 2; e++) {
            int m = 8 * r + at_column + e;
            if (m < rows && output < outer) {
                out[m * size_t(outer) + output] = static_cast<T>(sum[r].thread_elements()[e]);
            }
        }
    }
"""

NAMES = ("quantized_rows_few", "quantized_rows_many")
SOURCE = FRAGMENTS + FEW + MANY


class RowsKernel:
    """`quantized_rows` on the GPU; what it takes, `supported` says.

    make is mx.fast.metal_kernel or something that stands in for it.
    """

    def __init__(self, make: Callable[..., Any] = mx.fast.metal_kernel) -> None:
        inputs = ["x", "w", "scales", "biases"]
        self._few = make(
            name=NAMES[0], input_names=inputs, output_names=["out"], source=FEW, header=UNROLL
        )
        self._many = make(
            name=NAMES[1], input_names=inputs, output_names=["out"], source=MANY, header=FRAGMENTS
        )

    def __call__(
        self,
        x: mx.array,
        w: mx.array,
        scales: mx.array,
        biases: mx.array,
        *,
        group_size: int,
        bits: int,
    ) -> mx.array:
        """As `plain_quantized_rows`, for the arrays that `supported` admits; has no gradient."""
        rows, outer = x.shape[0], w.shape[0]
        template: list[tuple[str, Any]] = [("T", x.dtype), ("G", group_size), ("BITS", bits)]
        if rows <= MAX_FEW:
            kernel, simdgroups = self._few, _FEW_SIMDGROUPS
            outputs = simdgroups * _FEW_OUTPUTS
            # MLX's kernel for one row gives a lane two words where all is even, else one.
            even = x.shape[1] % 512 == 0 and outer % 8 == 0
            template += [("ROWS", rows), ("LANE_WORDS", 2 if even else 1)]
            template += [("OUTPUTS", _FEW_OUTPUTS), ("SIMDGROUPS", simdgroups)]
        else:
            kernel, simdgroups = self._many, _MANY_SIMDGROUPS
            outputs = simdgroups * _MANY_OUTPUTS
            template += [("TILES", -(-rows // 8)), ("SIMDGROUPS", simdgroups)]
        return kernel(
            inputs=[x, w, scales, biases],
            template=template,
            grid=(-(-outer // outputs) * simdgroups * 32, 1, 1),
            threadgroup=(simdgroups * 32, 1, 1),
            output_shapes=[(rows, outer)],
            output_dtypes=[x.dtype],
        )[0]


def plain_quantized_rows(
    x: mx.array,
    w: mx.array,
    scales: mx.array,
    biases: mx.array,
    *,
    group_size: int,
    bits: int,
) -> mx.array:
    """x times the transpose of an affinely quantized matrix, by MLX.

    Args:
        x: [M, K] float.
        w: [N, K * bits / 32] uint32.
        scales, biases: [N, K / group_size], in x's dtype.

    Returns:
        [M, N].
    """
    return mx.quantized_matmul(
        x, w, scales, biases, transpose=True, group_size=group_size, bits=bits
    )


def supported(
    dtype: mx.Dtype,
    scales: mx.array,
    biases: mx.array | None,
    *,
    group_size: int,
    bits: int,
    mode: str,
) -> bool:
    """Whether the kernel takes rows of this dtype and this kind of quantization."""
    return (
        mode == "affine"
        and bits in BITS
        and group_size in GROUP_SIZES
        and dtype in DTYPES
        and biases is not None
        and scales.dtype == biases.dtype == dtype
    )
