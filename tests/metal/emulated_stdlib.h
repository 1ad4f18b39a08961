// Types, mathematics, simdgroup functions and matrices of the emulated Metal.

#pragma once

namespace metal {

// 16-bit floats: every operation goes through float and rounds to nearest even.
template <typename Format>
struct small_float {
  uint16_t bits;
  small_float() = default;
  template <typename N, typename std::enable_if<std::is_arithmetic<N>::value, int>::type = 0>
  explicit small_float(N v) : bits(Format::round(float(v))) {}
  template <typename F>
  explicit small_float(small_float<F> v) : bits(Format::round(float(v))) {}
  small_float(const small_float&) = default;
  small_float& operator=(const small_float&) = default;
  operator float() const { return Format::widen(bits); }
  friend small_float operator+(small_float a, small_float b) {
    return small_float(float(a) + float(b));
  }
  friend small_float operator-(small_float a, small_float b) {
    return small_float(float(a) - float(b));
  }
  friend small_float operator*(small_float a, small_float b) {
    return small_float(float(a) * float(b));
  }
  friend small_float operator/(small_float a, small_float b) {
    return small_float(float(a) / float(b));
  }
};

struct half_format {
  static uint16_t round(float v) {
    _Float16 h = _Float16(v);
    uint16_t b;
    memcpy(&b, &h, 2);
    return b;
  }
  static float widen(uint16_t b) {
    _Float16 h;
    memcpy(&h, &b, 2);
    return float(h);
  }
};

struct bfloat_format {
  static uint16_t round(float v) {
    uint32_t b;
    memcpy(&b, &v, 4);
    if ((b & 0x7fffffffu) > 0x7f800000u) return uint16_t(b >> 16 | 0x40);
    return uint16_t((b + 0x7fffu + (b >> 16 & 1)) >> 16);
  }
  static float widen(uint16_t bits) {
    uint32_t b = uint32_t(bits) << 16;
    float v;
    memcpy(&v, &b, 4);
    return v;
  }
};

typedef small_float<half_format> half;
typedef small_float<bfloat_format> bfloat;

#define EMULATED_FUNCTIONS                                     \
  inline float exp(float x) { return ::expf(x); }              \
  inline float exp2(float x) { return ::exp2f(x); }            \
  inline float log(float x) { return ::logf(x); }              \
  inline float log2(float x) { return ::log2f(x); }            \
  inline float sqrt(float x) { return ::sqrtf(x); }            \
  inline float rsqrt(float x) { return 1.0f / ::sqrtf(x); }    \
  inline float sin(float x) { return ::sinf(x); }              \
  inline float cos(float x) { return ::cosf(x); }

EMULATED_FUNCTIONS
namespace precise {
EMULATED_FUNCTIONS
}
namespace fast {
EMULATED_FUNCTIONS
}

inline float abs(float x) { return ::fabsf(x); }
inline float max(float a, float b) { return a > b ? a : b; }
inline float min(float a, float b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline int min(int a, int b) { return a < b ? a : b; }
inline uint max(uint a, uint b) { return a > b ? a : b; }
inline uint min(uint a, uint b) { return a < b ? a : b; }

enum class mem_flags { mem_none, mem_device, mem_threadgroup };

inline void threadgroup_barrier(mem_flags flags) {
  emulated::wait_for(emulated::kThreadgroup, emulated::kBarrier);
  if (flags != mem_flags::mem_threadgroup) {
    emulated::fail("a barrier that does not order threadgroup memory", "flags", int(flags));
  }
}

inline void simdgroup_barrier(mem_flags) {
  emulated::wait_for(emulated::kSimd, emulated::kSimdBarrier);
}

template <typename V, typename Combine>
inline V simd_reduce(V v, int operation, V nothing, Combine combine) {
  const V* all = emulated::exchange(v, operation);
  int lanes = emulated::lanes_in_group(emulated::machine.current / emulated::kLanes);
  V part[emulated::kLanes];
  for (int i = 0; i < emulated::kLanes; i++) part[i] = i < lanes ? all[i] : nothing;
  for (int step = 1; step < emulated::kLanes; step *= 2) {
    for (int i = 0; i < emulated::kLanes; i += 2 * step) part[i] = combine(part[i], part[i + step]);
  }
  return part[0];
}

template <typename V>
inline V simd_sum(V v) {
  return simd_reduce(v, emulated::kSum, V(0), [](V a, V b) { return V(a + b); });
}
template <typename V>
inline V simd_max(V v) {
  return simd_reduce(v, emulated::kMax, v, [](V a, V b) { return a > b ? a : b; });
}
template <typename V>
inline V simd_min(V v) {
  return simd_reduce(v, emulated::kMin, v, [](V a, V b) { return a < b ? a : b; });
}
template <typename V>
inline V simd_shuffle_xor(V v, ushort mask) {
  int from = emulated::machine.current % emulated::kLanes ^ mask;
  return emulated::exchange(v, emulated::kShuffle)[from];
}

template <typename V>
inline V simd_shuffle(V v, ushort lane) {
  if (lane >= emulated::kLanes) emulated::fail("a shuffle from no lane", "lane", lane);
  return emulated::exchange(v, emulated::kShuffle)[lane % emulated::kLanes];
}

// An 8 x 8 matrix spread over a simdgroup: each lane holds two neighbours of one row.
template <typename T, int Rows, int Columns>
struct simdgroup_matrix {
  static_assert(Rows == 8 && Columns == 8, "simdgroup matrices are 8 x 8");
  struct elements {
    T values[2];
    T& operator[](int i) { return values[i]; }
    const T& operator[](int i) const { return values[i]; }
  };
  simdgroup_matrix() { memset(&own, 0xff, sizeof own); }
  explicit simdgroup_matrix(T diagonal) {
    for (int i = 0; i < 2; i++) own[i] = row() == column() + i ? diagonal : T(0.0f);
  }
  elements& thread_elements() { return own; }
  const elements& thread_elements() const { return own; }
  static int row() { return row(emulated::machine.current % emulated::kLanes); }
  static int column() { return column(emulated::machine.current % emulated::kLanes); }
  static int row(int lane) { return (lane >> 2 & 4) | (lane >> 1 & 3); }
  static int column(int lane) { return (lane >> 1 & 4) | (lane << 1 & 2); }

 private:
  elements own;
};

template <typename T, int Rows, int Columns>
inline simdgroup_matrix<T, Rows, Columns> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, Rows, Columns> m;
  m.thread_elements()[0] = m.thread_elements()[1] = value;
  return m;
}

template <typename D, typename A, typename B, typename C>
inline void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d,
                                          const simdgroup_matrix<A, 8, 8>& a,
                                          const simdgroup_matrix<B, 8, 8>& b,
                                          const simdgroup_matrix<C, 8, 8>& c) {
  typedef simdgroup_matrix<float, 8, 8> layout;
  struct Both {
    float a[2], b[2];
  } mine;
  for (int i = 0; i < 2; i++) {
    mine.a[i] = float(a.thread_elements()[i]);
    mine.b[i] = float(b.thread_elements()[i]);
  }
  const Both* all = emulated::exchange(mine, emulated::kMatrix);
  int row = layout::row(), column = layout::column();
  float sums[2] = {float(c.thread_elements()[0]), float(c.thread_elements()[1])};
  for (int k = 0; k < 8; k++) {
    // The lanes that hold a[row][k], and b[k][column] with its right neighbour.
    int left = (row & 4) << 2 | (k & 4) << 1 | (row & 3) << 1 | (k & 2) >> 1;
    int right = (k & 4) << 2 | (column & 4) << 1 | (k & 3) << 1 | (column & 2) >> 1;
    float x = all[left].a[k & 1];
    sums[0] += x * all[right].b[0];
    sums[1] += x * all[right].b[1];
  }
  for (int i = 0; i < 2; i++) d.thread_elements()[i] = D(sums[i]);
}

}  // namespace metal

namespace emulated {
template <>
struct is_small_float<metal::half> : std::true_type {};
template <>
struct is_small_float<metal::bfloat> : std::true_type {};
}  // namespace emulated

typedef metal::half float16_t;
typedef metal::bfloat bfloat16_t;
