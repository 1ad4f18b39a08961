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

}  // namespace emulated

#include "emulated_memory.h"
#include "emulated_threads.h"
#include "emulated_stdlib.h"
