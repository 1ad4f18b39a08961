// The threads of a grid as fibers, and the scheduler that runs them from one rendezvous to the next.

#pragma once

namespace emulated {

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
