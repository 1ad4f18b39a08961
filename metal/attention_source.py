"""The Metal source of masked-block attention: bodies of two kernels, and what they share."""

from .fragments import FRAGMENTS

HEADER = (
    FRAGMENTS
    + """
// The maximum or sum over the four lanes that hold a row.
inline float row_max(float v) {
    v = max(v, simd_shuffle_xor(v, ushort(1)));
    return max(v, simd_shuffle_xor(v, ushort(8)));
}

inline float row_sum(float v) {
    v += simd_shuffle_xor(v, ushort(1));
    return v + simd_shuffle_xor(v, ushort(8));
}
"""
)

# A threadgroup serves one KV head, one part of the context and up to 64 rows, that is pairs of a
# query head that shares the KV head and a row of the block. A simdgroup owns eight of them.
ATTEND = """
    constexpr int ROW_BYTES = D * int(sizeof(T));
    constexpr int KEYS = ROW_BYTES > 512 ? 8 : (ROW_BYTES > 256 ? 16 : 32);
    constexpr int PITCH = D + 16 / int(sizeof(T));  // rows start in different banks
    constexpr float LOWEST = -1e30f;  // for minus infinity, without its arithmetic
    threadgroup T key_tile[KEYS * PITCH];
    threadgroup T value_tile[KEYS * PITCH];

    int first = extent[0], context_length = extent[1], window = extent[2];
    int part_length = extent[3], block_at = extent[4];
    int length = queries_shape[2];
    int kv_heads = context_keys_shape[1];
    int share = queries_shape[1] / kv_heads;
    int rows = share * length;

    int part = threadgroup_position_in_grid.x;
    int pair = threadgroup_position_in_grid.z;
    int batch = pair / kv_heads, kv_head = pair % kv_heads;
    uint lane = thread_index_in_simdgroup;
    int at_row = fragment_row(lane), at_column = fragment_column(lane);
    int row = (threadgroup_position_in_grid.y * SG + simdgroup_index_in_threadgroup) * 8 + at_row;
    int i = row % length;

    T q[D / 4];
    auto query = queries + batch * queries_strides[0]
        + (kv_head * share + row / length) * queries_strides[1] + i * queries_strides[2];
    UNROLL
    for (int c = 0; c < D / 4; c++) {
        q[c] = static_cast<T>(0.0f);
        if (row < rows) {
            q[c] = query[(c / 2 * 8 + at_column + c % 2) * queries_strides[3]];
        }
    }
    uint sees = visible[i];
    float factor = scale * 1.44269504f;  // powers of two from here on

    simdgroup_matrix<float, 8, 8> out[D / 8];
    UNROLL
    for (int c = 0; c < D / 8; c++) {
        out[c] = matrix_of(0.0f, 0.0f);
    }
    float best = LOWEST, total = 0.0f;

    int begin = first + part * part_length;
    int end = min(begin + part_length, context_length);
    int context_tiles = (end - begin + KEYS - 1) / KEYS;
    int block_tiles = part + 1 == int(threadgroups_per_grid.x) ? (length + KEYS - 1) / KEYS : 0;
    for (int tile = 0; tile < context_tiles + block_tiles; tile++) {
        bool in_block = tile >= context_tiles;
        int at = in_block ? (tile - context_tiles) * KEYS : begin + tile * KEYS;
        int count = min(KEYS, (in_block ? length : end) - at);

        threadgroup_barrier(mem_flags::mem_threadgroup);
        {
            auto keys = in_block
                ? block_keys + batch * block_keys_strides[0] + kv_head * block_keys_strides[1]
                    + (block_at + at) * block_keys_strides[2]
                : context_keys + batch * context_keys_strides[0]
                    + kv_head * context_keys_strides[1] + at * context_keys_strides[2];
            auto values = in_block
                ? block_values + batch * block_values_strides[0]
                    + kv_head * block_values_strides[1] + (block_at + at) * block_values_strides[2]
                : context_values + batch * context_values_strides[0]
                    + kv_head * context_values_strides[1] + at * context_values_strides[2];
            // Within a tile 32 bits are enough, and quicker to multiply.
            int key_step = int(in_block ? block_keys_strides[2] : context_keys_strides[2]);
            int value_step = int(in_block ? block_values_strides[2] : context_values_strides[2]);
            int key_unit = int(in_block ? block_keys_strides[3] : context_keys_strides[3]);
            int value_unit = int(in_block ? block_values_strides[3] : context_values_strides[3]);
            for (int n = thread_position_in_threadgroup.x; n < KEYS * D; n += 32 * SG) {
                int key = n / D, d = n % D;
                T k = static_cast<T>(0.0f), v = static_cast<T>(0.0f);
                if (key < count) {
                    k = keys[key * key_step + d * key_unit];
                    v = values[key * value_step + d * value_unit];
                }
                key_tile[key * PITCH + d] = k;
                value_tile[key * PITCH + d] = v;
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);

        simdgroup_matrix<float, 8, 8> weights[KEYS / 8];
        UNROLL
        for (int b = 0; b < KEYS / 8; b++) {
            weights[b] = matrix_of(0.0f, 0.0f);
        }
        UNROLL
        for (int c = 0; c < D / 8; c++) {
            auto q_part = matrix_of(static_cast<float>(q[2 * c]), static_cast<float>(q[2 * c + 1]));
            UNROLL
            for (int b = 0; b < KEYS / 8; b++) {
                int from = (8 * b + at_column) * PITCH + 8 * c + at_row;  // transposed
                auto k_part = matrix_of(static_cast<float>(key_tile[from]),
                                       static_cast<float>(key_tile[from + PITCH]));
                simdgroup_multiply_accumulate(weights[b], q_part, k_part, weights[b]);
            }
        }

        float before = best;
        UNROLL
        for (int b = 0; b < KEYS / 8; b++) {
            UNROLL
            for (int e = 0; e < 2; e++) {
                int key = 8 * b + at_column + e;
                bool seen = key < count;
                if (seen) {
                    seen = in_block ? (sees >> (at + key) & 1) != 0
                                    : context_length + i - (at + key) < window;
                }
                float score = seen ? weights[b].thread_elements()[e] * factor : LOWEST;
                weights[b].thread_elements()[e] = score;
                best = max(best, score);
            }
        }
        best = row_max(best);
        float rescale = metal::fast::exp2(before - best);
        total *= rescale;
        UNROLL
        for (int b = 0; b < KEYS / 8; b++) {
            UNROLL
            for (int e = 0; e < 2; e++) {
                float score = weights[b].thread_elements()[e];
                float weight = score == LOWEST ? 0.0f : metal::fast::exp2(score - best);
                weights[b].thread_elements()[e] = weight;
                total += weight;
            }
        }
        UNROLL
        for (int c = 0; c < D / 8; c++) {
            out[c].thread_elements()[0] *= rescale;
            out[c].thread_elements()[1] *= rescale;
            UNROLL
            for (int b = 0; b < KEYS / 8; b++) {
                int from = (8 * b + at_row) * PITCH + 8 * c + at_column;
                auto v_part = matrix_of(static_cast<float>(value_tile[from]),
                                       static_cast<float>(value_tile[from + 1]));
                simdgroup_multiply_accumulate(out[c], weights[b], v_part, out[c]);
            }
        }
    }

    total = row_sum(total);
    if (row < rows) {
        size_t to = (size_t(part) * threadgroups_per_grid.z + pair) * rows + row;
        UNROLL
        for (int c = 0; c < D / 8; c++) {
            parts[to * D + 8 * c + at_column] = out[c].thread_elements()[0];
            parts[to * D + 8 * c + at_column + 1] = out[c].thread_elements()[1];
        }
        if (at_column == 0) {
            softmax[2 * to] = best;
            softmax[2 * to + 1] = total;
        }
    }
"""

# A simdgroup for each row of the result.
MERGE = """
    constexpr float LOWEST = -1e30f;
    constexpr int R = (D + 31) / 32;
    uint lane = thread_index_in_simdgroup;
    uint row = thread_position_in_grid.y;
    uint rows = threads_per_grid.y;
    int count = parts_shape[0];

    // A sink is one more logit, without a value; minus infinity where there is none.
    float sink = max(sinks[row / length % sinks_shape[0]] * 1.44269504f, LOWEST);
    float best = sink;
    for (int part = 0; part < count; part++) {
        best = max(best, softmax[2 * (size_t(part) * rows + row)]);
    }
    float total = metal::fast::exp2(sink - best), sum[R];
    UNROLL
    for (int r = 0; r < R; r++) {
        sum[r] = 0.0f;
    }
    for (int part = 0; part < count; part++) {
        size_t from = size_t(part) * rows + row;
        float weight = metal::fast::exp2(softmax[2 * from] - best);
        total += weight * softmax[2 * from + 1];
        UNROLL
        for (int r = 0; r < R; r++) {
            int d = lane + 32 * r;
            if (d < D) {
                sum[r] += weight * parts[from * D + d];
            }
        }
    }
    UNROLL
    for (int r = 0; r < R; r++) {
        int d = lane + 32 * r;
        if (d < D) {
            out[size_t(row) * D + d] = static_cast<T>(sum[r] / total);
        }
    }
"""
