// Memory of a device, of constants and of a threadgroup, behind pointers that check every access.

#pragma once

namespace emulated {

// Device memory.

template <typename T>
inline bool device_reachable(T* p, Region* r) {
  long at = reinterpret_cast<char*>(const_cast<typename std::remove_const<T>::type*>(p)) - r->base;
  if (at < 0 || at + long(sizeof(T)) > long(r->bytes)) {
    fail("device access out of bounds", r->name, at / long(sizeof(T)));
    return false;
  }
  return true;
}

template <typename T>
struct DeviceMemory {
  typedef typename std::remove_const<T>::type V;
  Region* region;
  explicit DeviceMemory(Region* r) : region(r) {}
  V read(T* p) const {
    if (!device_reachable(p, region)) return V();
    region->bytes_read += sizeof(T);
    return *p;
  }
  void write(T* p, V v) const {
    if (!device_reachable(p, region)) return;
    region->bytes_written += sizeof(T);
    if (region->written) memset(region->written + ((char*)p - region->base), 1, sizeof(T));
    *p = v;
  }
};

template <typename T>
struct ConstantMemory : DeviceMemory<T> {
  using DeviceMemory<T>::DeviceMemory;
};

// Threadgroup memory.

inline void touch(size_t at, size_t size, bool writes) {
  int me = machine.current, group = me / kLanes;
  uint64_t epoch = machine.epoch, simd_epoch = machine.simd_epochs[group];
  for (size_t i = at; i < at + size; i++) {
    Shadow& s = machine.shadow[i];
    bool after_write = s.write_epoch == epoch && s.writer != me &&
                       !(s.writer / kLanes == group && s.write_simd_epoch < simd_epoch);
    bool after_read = writes && s.read_epoch == epoch && s.reader != me &&
                      !(s.reader >= 0 && s.reader / kLanes == group &&
                        s.read_simd_epoch < simd_epoch);
    if (after_write || after_read) fail("race in threadgroup memory", "byte", long(i));
    if (writes) {
      s.writer = me;
      s.write_epoch = epoch;
      s.write_simd_epoch = simd_epoch;
    } else {
      bool shared = s.read_epoch == epoch && s.reader != me && s.reader / kLanes != group;
      s.reader = shared ? kMany : me;
      s.read_epoch = epoch;
      s.read_simd_epoch = simd_epoch;
    }
  }
}

template <typename T>
struct ThreadgroupMemory {
  typedef typename std::remove_const<T>::type V;
  size_t begin, end;  // of the array that the pointer came from
  bool reachable(T* p) const {
    size_t at = (char*)p - machine.threadgroup_memory;
    if (at < begin || at + sizeof(T) > end) {
      fail("threadgroup access out of bounds", "element", (long(at) - long(begin)) / long(sizeof(T)));
      return false;
    }
    return true;
  }
  V read(T* p) const {
    if (!reachable(p)) return V();
    touch((char*)p - machine.threadgroup_memory, sizeof(T), false);
    return *p;
  }
  void write(T* p, V v) const {
    if (!reachable(p)) return;
    touch((char*)p - machine.threadgroup_memory, sizeof(T), true);
    *p = v;
  }
};

template <typename T>
struct is_small_float : std::false_type {};

template <typename T, typename Memory>
struct Reference {
  T* p;
  Memory memory;
  operator T() const { return memory.read(p); }
  template <typename U = T, typename std::enable_if<is_small_float<U>::value, int>::type = 0>
  operator float() const {
    return float(memory.read(p));
  }
  Reference(T* p_, Memory m) : p(p_), memory(m) {}
  Reference(const Reference&) = default;
  Reference& operator=(T v) {
    memory.write(p, v);
    return *this;
  }
  Reference& operator=(const Reference& other) { return *this = T(other); }
  Reference& operator+=(T v) { return *this = T(T(*this) + v); }
  Reference& operator*=(T v) { return *this = T(T(*this) * v); }
};

template <typename T, template <typename> class Space>
struct Pointer {
  T* p;
  Space<T> memory;
  Pointer(T* p_, Space<T> m) : p(p_), memory(m) {}
  typedef typename std::conditional<std::is_const<T>::value, typename Space<T>::V,
                                    Reference<T, Space<T>>>::type Element;
  template <typename I>
  Pointer operator+(I i) const {
    return Pointer(p + i, memory);
  }
  template <typename I>
  Pointer operator-(I i) const {
    return Pointer(p - i, memory);
  }
  template <typename I>
  Pointer& operator+=(I i) {
    p += i;
    return *this;
  }
  template <typename I>
  Element operator[](I i) const {
    return at(p + i, std::is_const<T>());
  }
  Element operator*() const { return at(p, std::is_const<T>()); }

 private:
  Element at(T* q, std::true_type) const { return memory.read(q); }
  Element at(T* q, std::false_type) const { return Element(q, memory); }
};

template <typename T>
struct device_ptr : Pointer<T, DeviceMemory> {
  typedef Pointer<T, DeviceMemory> Base;
  device_ptr(const Base& b) : Base(b) {}
  explicit device_ptr(Region& r) : Base(reinterpret_cast<T*>(r.base), DeviceMemory<T>(&r)) {}
};

template <typename T>
struct constant_ptr : Pointer<T, ConstantMemory> {
  typedef Pointer<T, ConstantMemory> Base;
  constant_ptr(const Base& b) : Base(b) {}
  explicit constant_ptr(Region& r) : Base(reinterpret_cast<T*>(r.base), ConstantMemory<T>(&r)) {}
};

template <typename T>
struct threadgroup_ptr : Pointer<T, ThreadgroupMemory> {
  typedef Pointer<T, ThreadgroupMemory> Base;
  threadgroup_ptr(const Base& b) : Base(b) {}
  template <typename U,
            typename std::enable_if<std::is_same<const U, T>::value && !std::is_const<U>::value,
                                    int>::type = 0>
  threadgroup_ptr(const Pointer<U, ThreadgroupMemory>& b)
      : Base(b.p, ThreadgroupMemory<T>{b.memory.begin, b.memory.end}) {}
};

// An array in threadgroup memory, or a row of one.
template <typename T, size_t N, size_t... Rest>
struct threadgroup_rows {
  T* p;
  ThreadgroupMemory<T> memory;
  static size_t count() { return N * threadgroup_rows<T, Rest...>::count(); }
  template <typename I>
  threadgroup_rows<T, Rest...> operator[](I i) const {
    return {p + i * threadgroup_rows<T, Rest...>::count(), memory};
  }
};
template <typename T, size_t N>
struct threadgroup_rows<T, N> {
  T* p;
  ThreadgroupMemory<T> memory;
  static size_t count() { return N; }
  Pointer<T, ThreadgroupMemory> first() const {
    return Pointer<T, ThreadgroupMemory>(p, memory);
  }
  operator threadgroup_ptr<T>() const { return threadgroup_ptr<T>(first()); }
  operator threadgroup_ptr<const T>() const { return threadgroup_ptr<const T>(first()); }
  template <typename I>
  typename Pointer<T, ThreadgroupMemory>::Element operator[](I i) const {
    return first()[i];
  }
  template <typename I>
  Pointer<T, ThreadgroupMemory> operator+(I i) const {
    return first() + i;
  }
};

template <typename T, size_t... N>
struct threadgroup_array : threadgroup_rows<T, N...> {
  typedef threadgroup_rows<T, N...> Rows;
  threadgroup_array() : Rows{} {
    size_t bytes = (Rows::count() * sizeof(T) + 15) / 16 * 16;
    size_t at = machine.threadgroup_used;
    machine.threadgroup_used += bytes;
    if (machine.threadgroup_used > kReserved) at = 0;  // the run fails at its end
    Rows::p = reinterpret_cast<T*>(machine.threadgroup_memory + at);
    Rows::memory = ThreadgroupMemory<T>{at, at + Rows::count() * sizeof(T)};
  }
};

}  // namespace emulated
