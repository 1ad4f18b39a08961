"""Metal source that several kernels share: simdgroup matrices seen from one lane."""

UNROLL = """
// Arrays of registers must be indexed by constants, or they end up in memory.
#define UNROLL _Pragma("clang loop unroll(full)")
"""

FRAGMENTS = (
    UNROLL
    + """
// A simdgroup matrix keeps two neighbours of a row in each lane.
inline int fragment_row(uint lane) {
    return (lane / 16) * 4 + (lane / 2) % 4;
}

inline int fragment_column(uint lane) {
    return (lane / 8) % 2 * 4 + (lane % 2) * 2;
}

inline simdgroup_matrix<float, 8, 8> matrix_of(float left, float right) {
    simdgroup_matrix<float, 8, 8> m;
    m.thread_elements()[0] = left;
    m.thread_elements()[1] = right;
    return m;
}
"""
)
