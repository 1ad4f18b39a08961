// The part of the Metal shading language that kernels use, for a C++14 compiler on a CPU.
//
// Threads are fibers. Barriers and simdgroup operations are rendezvous points: a fiber runs until
// it reaches one, and the scheduler runs the others, in a chosen order, before it goes on. Memory
// is reached through pointers that know their bounds, count bytes, and see two threads touch the
// same byte of threadgroup memory without a barrier between.

#pragma once

#ifdef __APPLE__
#define _XOPEN_SOURCE 700  // for ucontext
#define _DARWIN_C_SOURCE
#endif

#include <csetjmp>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>
#include <ucontext.h>

typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned char uchar;
typedef unsigned long ulong;

struct uint3 {
  uint x, y, z;
};

namespace emulated {

const int kLanes = 32;
const size_t kStack = 128 * 1024;
const size_t kThreadgroupBytes = 32 * 1024;
const size_t kReserved = 1024 * 1024;  // so that a kernel that asks for too much can say so
const int kMany = -2;

// One input or output. Python holds the same layout.
struct Region {
  char* base;
  uint64_t bytes;
  uint64_t bytes_read;
  uint64_t bytes_written;
  uint8_t* written;  // one flag per byte, for outputs only
  const char* name;
};

enum Wait { kReady, kSimd, kThreadgroup, kDone };

struct Fiber {
  ucontext_t start;
  jmp_buf here;
  bool started;
  Wait wait;
  int operation;
  uint64_t operations;
  char* stack;
};

// What a simdgroup's lanes hand each other. Two buffers: a lane may start on the next operation
// while others still read this one, but not on the one after that.
struct Exchange {
  char bytes[2][kLanes * 32];
};

struct Shadow {
  int writer, reader;
  uint64_t write_epoch, read_epoch;
  uint64_t write_simd_epoch, read_simd_epoch;
};

struct Machine {
  char error[512];
  int threads;
  Fiber* fibers;
  Exchange* exchanges;
  uint64_t* simd_epochs;
  uint64_t epoch;
  int current;
  jmp_buf scheduler;
  ucontext_t scheduler_context;
  char threadgroup_memory[kReserved];
  size_t threadgroup_used;
  Shadow shadow[kReserved];
  uint64_t random;
  int order;
};

static Machine machine;

inline void fail(const char* what, const char* name, long detail) {
  if (!machine.error[0]) {
    snprintf(machine.error, sizeof machine.error, "%s: %s (%ld), thread %d", what, name, detail,
             machine.current);
  }
}

inline uint64_t next_random() {
  machine.random ^= machine.random << 13;
  machine.random ^= machine.random >> 7;
  machine.random ^= machine.random << 17;
  return machine.random;
}

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

// Fibers.

inline void wait_for(Wait wait, int operation) {
  Fiber& fiber = machine.fibers[machine.current];
  fiber.wait = wait;
  fiber.operation = operation;
  if (!_setjmp(fiber.here)) _longjmp(machine.scheduler, 1);
}

enum Operation { kBarrier, kSimdBarrier, kShuffle, kSum, kMax, kMin, kMatrix };

// Every lane of the simdgroup gives v; returns all lanes' values, good until the operation after
// the next.
template <typename V>
inline const V* exchange(V v, int operation) {
  static_assert(sizeof(V) <= 32, "exchange of a large value");
  int lane = machine.current % kLanes;
  Exchange& slots = machine.exchanges[machine.current / kLanes];
  V* slot = reinterpret_cast<V*>(slots.bytes[machine.fibers[machine.current].operations++ % 2]);
  slot[lane] = v;
  wait_for(kSimd, operation);
  return slot;
}

inline int lanes_in_group(int group) {
  int left = machine.threads - group * kLanes;
  return left < kLanes ? left : kLanes;
}

typedef void (*ThreadBody)();
static ThreadBody thread_body;

inline void fiber_main() {
  thread_body();
  machine.fibers[machine.current].wait = kDone;
  _longjmp(machine.scheduler, 1);
}

inline void resume(int thread) {
  machine.current = thread;
  Fiber& fiber = machine.fibers[thread];
  if (_setjmp(machine.scheduler)) return;
  if (fiber.started) _longjmp(fiber.here, 1);
  fiber.started = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack;
  fiber.start.uc_stack.ss_size = kStack;
  fiber.start.uc_link = &machine.scheduler_context;
  makecontext(&fiber.start, fiber_main, 0);
  setcontext(&fiber.start);
}

// 0 .. n - 1 forward, in reverse or shuffled.
inline void permute(int* order, int n) {
  for (int i = 0; i < n; i++) order[i] = machine.order == 1 ? n - 1 - i : i;
  if (machine.order == 2) {
    for (int i = n - 1; i > 0; i--) {
      int j = int(next_random() % uint64_t(i + 1)), t = order[i];
      order[i] = order[j];
      order[j] = t;
    }
  }
}

// Runs a simdgroup until all its lanes are done or wait for the threadgroup.
inline void run_simdgroup(int group) {
  int lanes = lanes_in_group(group), order[kLanes];
  while (!machine.error[0]) {
    permute(order, lanes);
    int simd = 0, rest = 0, operation = -1;
    for (int i = 0; i < lanes; i++) {
      int thread = group * kLanes + order[i];
      if (machine.fibers[thread].wait == kReady) resume(thread);
      Fiber& fiber = machine.fibers[thread];
      if (fiber.wait == kSimd) {
        simd++;
        if (operation >= 0 && operation != fiber.operation)
          fail("lanes wait in different simdgroup operations", "simdgroup", group);
        operation = fiber.operation;
      } else {
        rest++;
      }
    }
    if (!simd) return;
    if (rest) fail("a simdgroup operation that some lanes do not reach", "simdgroup", group);
    if (operation == kSimdBarrier) machine.simd_epochs[group]++;
    for (int i = 0; i < lanes; i++) machine.fibers[group * kLanes + i].wait = kReady;
  }
}

inline void run_threadgroup(int threads) {
  int groups = (threads + kLanes - 1) / kLanes, order[1024 / kLanes];
  memset(machine.threadgroup_memory, 0xff, kThreadgroupBytes);
  machine.epoch++;
  for (int i = 0; i < threads; i++) {
    machine.fibers[i].started = false;
    machine.fibers[i].wait = kReady;
    machine.fibers[i].operations = 0;
  }
  while (!machine.error[0]) {
    permute(order, groups);
    for (int i = 0; i < groups; i++) run_simdgroup(order[i]);
    int waiting = 0;
    for (int i = 0; i < threads; i++) waiting += machine.fibers[i].wait == kThreadgroup;
    if (!waiting) return;
    if (waiting < threads) fail("a barrier that some threads do not reach", "threads", waiting);
    machine.epoch++;
    for (int i = 0; i < threads; i++) machine.fibers[i].wait = kReady;
  }
}

struct Position {
  uint3 grid, threadgroup, group_in_grid, groups, group_size, threads;
};
static Position position;  // of the threadgroup that runs; a thread adds its own index
static uint3 launch_group;

inline uint3 thread_in_group() {
  uint i = uint(machine.current), x = position.group_size.x, y = position.group_size.y;
  return uint3{i % x, i / x % y, i / (x * y)};
}

// Runs body for every thread of a grid counted in threads; edge threadgroups are smaller.
inline int launch(const uint* grid, const uint* group, int order, uint64_t seed, ThreadBody body) {
  machine.error[0] = 0;
  machine.order = order;
  machine.random = seed | 1;
  thread_body = body;
  int most = int(group[0] * group[1] * group[2]);
  if (most < 1 || most > 1024) fail("a threadgroup of this size", "threads", most);
  if (machine.error[0]) return 1;
  machine.fibers = (Fiber*)calloc(most, sizeof(Fiber));
  machine.exchanges = (Exchange*)calloc((most + 31) / 32, sizeof(Exchange));
  machine.simd_epochs = (uint64_t*)calloc((most + 31) / 32, sizeof(uint64_t));
  char* stacks = (char*)malloc(kStack * most);
  for (int i = 0; i < most; i++) machine.fibers[i].stack = stacks + kStack * i;
  memset(machine.shadow, 0, sizeof(Shadow) * kThreadgroupBytes);
  machine.epoch = 0;
  uint3 groups{(grid[0] + group[0] - 1) / group[0], (grid[1] + group[1] - 1) / group[1],
               (grid[2] + group[2] - 1) / group[2]};
  int count = int(groups.x * groups.y * groups.z);
  int* sequence = (int*)malloc(sizeof(int) * (count + 1));
  permute(sequence, count);
  for (int i = 0; i < count && !machine.error[0]; i++) {
    uint n = uint(sequence[i]);
    uint3 at{n % groups.x, n / groups.x % groups.y, n / (groups.x * groups.y)};
    uint3 size{grid[0] - at.x * group[0], grid[1] - at.y * group[1], grid[2] - at.z * group[2]};
    if (size.x > group[0]) size.x = group[0];
    if (size.y > group[1]) size.y = group[1];
    if (size.z > group[2]) size.z = group[2];
    position.group_in_grid = at;
    position.groups = groups;
    position.group_size = size;
    position.threads = uint3{grid[0], grid[1], grid[2]};
    position.threadgroup = uint3{at.x * group[0], at.y * group[1], at.z * group[2]};
    machine.threads = int(size.x * size.y * size.z);
    run_threadgroup(machine.threads);
  }
  if (machine.threadgroup_used > kThreadgroupBytes)
    fail("more than 32 KB of threadgroup memory", "bytes", long(machine.threadgroup_used));
  free(sequence);
  free(stacks);
  free(machine.simd_epochs);
  free(machine.exchanges);
  free(machine.fibers);
  return machine.error[0] != 0;
}

}  // namespace emulated

#include "emulated_stdlib.h"
