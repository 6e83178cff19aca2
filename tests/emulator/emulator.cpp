#include "emulator.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef SPECDIFF_RACES  // ThreadSanitizer is told of fibers and barriers, and not of the emulator's
                       // own data
#include <sanitizer/tsan_interface.h>
extern "C" void AnnotateIgnoreReadsBegin(const char*, int);
extern "C" void AnnotateIgnoreReadsEnd(const char*, int);
extern "C" void AnnotateIgnoreWritesBegin(const char*, int);
extern "C" void AnnotateIgnoreWritesEnd(const char*, int);

struct Unseen {
  Unseen() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unseen() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
};
#else
static void __tsan_acquire(void*) {}
static void __tsan_release(void*) {}

struct Unseen {
  ~Unseen() {}
};
#endif

namespace emulator {

Position here;
bool orders = true;

namespace {

constexpr size_t kStack = 128 << 10;
constexpr int64_t kPatience = 20'000'000;  // switches without a barrier passed or a thread ended
constexpr int kMultiprocessors[] = {96, 32, 200, 4};  // of each device; each runs one block

// Where an execution stands that another one has taken turns with.
#ifdef SPECDIFF_RACES
struct Context {
  ucontext_t state;
  void* fiber = nullptr;
};

void switch_to(Context& from, Context& to) {
  if (!from.fiber) from.fiber = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(to.fiber, __tsan_switch_to_fiber_no_sync);
  swapcontext(&from.state, &to.state);
}
#else
struct Context {
  jmp_buf state;
};

void switch_to(Context& from, Context& to) {
  if (_setjmp(from.state) == 0) _longjmp(to.state, 1);
}
#endif

struct Block;

struct Fiber {
  Context context;
  Block* block;
  int thread;
};

struct Warp {
  uint64_t slots[2][32];
  int generation = 0;
  std::vector<Fiber*> waiting;
};

struct Block {
  unsigned index;
  int running;
  int generation = 0;
  char barriers[2];
  std::vector<Fiber*> waiting;  // at the barrier
  std::vector<Warp> warps;
  std::vector<uint4> shared;
};

// One launch: its blocks, and the fibers that can go on.
struct Launch {
  std::function<void()> kernel;
  int threads;
  std::vector<Fiber*> ready;
  int64_t patience = kPatience;
};

using Place = std::pair<std::string, int>;  // of a barrier in the sources

std::mutex one_launch;
std::mt19937_64 randomness;
int device = 0;
int launches = 0;
int64_t blocks_launched = 0;
bool cooperates = true;
int together_launches = 0;
int64_t meetings = 0;  // of a thread with its block
std::set<Place> barriers;
Place missing;
Launch* launched;
Fiber* current;
Context scheduler;
std::vector<Fiber*> idle;  // fibers whose thread has ended

void leave() { switch_to(current->context, scheduler); }

void wake(std::vector<Fiber*>& fibers) {
  launched->ready.insert(launched->ready.end(), fibers.begin(), fibers.end());
  fibers.clear();
  launched->patience = kPatience;
}

void open_barrier(Block& block) {
  ++block.generation;
  wake(block.waiting);
}

void end_thread() {
  __tsan_release(&launches);
  const Unseen unseen;
  Block& block = *current->block;
  --block.running;
  launched->patience = kPatience;
  // threads that have ended are not waited for, as on a GPU
  if (block.running > 0 && int(block.waiting.size()) == block.running) open_barrier(block);
  idle.push_back(current);
}

void live() {
  for (;;) {
    __tsan_acquire(&launches);
    launched->kernel();
    end_thread();
    leave();
  }
}

// What the warp's lanes hand in; valid until the next call.
const uint64_t* exchange(uint64_t x) {
  Warp& warp = current->block->warps[current->thread / 32];
  uint64_t* slots = warp.slots[warp.generation & 1];
  slots[current->thread % 32] = x;
  warp.waiting.push_back(current);
  if (warp.waiting.size() == 32) {
    ++warp.generation;
    wake(warp.waiting);
  }
  leave();
  return slots;
}

// A fiber whose first step is live().
void prepare(Fiber* fiber, void* stack, size_t size);

Fiber* make_fiber() {
  Fiber* fiber = new Fiber;
  void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED) throw std::bad_alloc();
  // At different offsets, so that the stacks do not share a few lines of the cache.
  prepare(fiber, stack, kStack - randomness() % 256 * 64);
  return fiber;
}

void set_stack(ucontext_t* context, void* stack, size_t size) {
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = size;
  context->uc_link = nullptr;
}

#ifdef SPECDIFF_RACES
void prepare(Fiber* fiber, void* stack, size_t size) {
  set_stack(&fiber->context.state, stack, size);
  fiber->context.fiber = __tsan_create_fiber(0);
  makecontext(&fiber->context.state, live, 0);
}
#else
ucontext_t birthplace;

void first_steps() {
  if (_setjmp(current->context.state) == 0) setcontext(&birthplace);
  live();
}

void prepare(Fiber* fiber, void* stack, size_t size) {
  ucontext_t context;
  set_stack(&context, stack, size);
  makecontext(&context, first_steps, 0);
  current = fiber;
  swapcontext(&birthplace, &context);
}
#endif

Fiber* take_fiber() {
  if (idle.empty()) return make_fiber();
  Fiber* fiber = idle.back();
  idle.pop_back();
  return fiber;
}

std::unique_ptr<Block> begin_block(unsigned index) {
  auto block = std::make_unique<Block>();
  block->index = index;
  block->running = launched->threads;
  block->warps.resize(launched->threads / 32);
  for (int thread = 0; thread < launched->threads; ++thread) {
    Fiber* fiber = take_fiber();
    fiber->block = block.get();
    fiber->thread = thread;
    launched->ready.push_back(fiber);
  }
  return block;
}

template <class T>
T take_any(std::vector<T>& from) {
  std::swap(from[randomness() % from.size()], from.back());
  T taken = std::move(from.back());
  from.pop_back();
  return taken;
}

void resume(Fiber* fiber) {
  current = fiber;
  here = {{unsigned(fiber->thread)}, {fiber->block->index}};
  switch_to(scheduler, fiber->context);
}

// Runs all blocks, at most `resident` at once, which begin in any order.
void run_all(int64_t blocks, int64_t resident) {
  const Unseen unseen;
  std::vector<unsigned> remaining(blocks);
  for (int64_t i = 0; i < blocks; ++i) remaining[i] = unsigned(i);
  std::vector<std::unique_ptr<Block>> running;
  while (!remaining.empty() || !running.empty()) {
    while (!remaining.empty() && int64_t(running.size()) < resident) {
      running.push_back(begin_block(take_any(remaining)));
    }
    if (launched->ready.empty()) throw std::runtime_error("emulator: all threads wait");
    if (--launched->patience < 0) throw std::runtime_error("emulator: threads wait in vain");
    Fiber* fiber = take_any(launched->ready);
    Block* block = fiber->block;
    resume(fiber);
    if (block->running > 0) continue;
    for (size_t i = 0; i < running.size(); ++i) {
      if (running[i].get() != block) continue;
      std::swap(running[i], running.back());
      running.pop_back();
      break;
    }
  }
}

void run(int64_t blocks, int threads, const std::function<void()>& kernel, int64_t resident) {
  const std::lock_guard<std::mutex> guard(one_launch);
  Launch launch{kernel, threads, {}};
  launched = &launch;
  ++launches;
  blocks_launched += blocks;
  __tsan_release(&launches);
  run_all(blocks, resident);
  __tsan_acquire(&launches);
  launched = nullptr;
}

}  // namespace

void launch(int64_t blocks, int threads, const std::function<void()>& kernel) {
  // So few that blocks which wait for each other just find room, or as many as there may be.
  const bool many = randomness() % 2;
  const int64_t multiprocessors = kMultiprocessors[device];
  run(blocks, threads, kernel, many ? multiprocessors : std::max<int64_t>(multiprocessors / 32, 1));
}

bool launch_together(int64_t blocks, int threads, const std::function<void()>& kernel) {
  if (blocks > kMultiprocessors[device] || !cooperates) return false;
  ++together_launches;
  run(blocks, threads, kernel, blocks);
  return true;
}

void may_switch() {
  const Unseen unseen;
  if (randomness() % 4 != 0) return;
  launched->ready.push_back(current);
  leave();
}

void sync_block(const char* file, int line) {
  const Unseen unseen;
  const Place place(file, line);
  barriers.insert(place);
  if (place == missing) return;
  ++meetings;
  Block& block = *current->block;
  char* barrier = &block.barriers[block.generation & 1];
  __tsan_release(barrier);
  block.waiting.push_back(current);
  if (int(block.waiting.size()) == block.running) open_barrier(block);
  leave();
  __tsan_acquire(barrier);
}

uint64_t from_lane(uint64_t x, int lane) {
  const Unseen unseen;
  return exchange(x)[lane];
}

uint32_t sum_of_lanes(uint32_t x) {
  const Unseen unseen;
  const uint64_t* all = exchange(x);
  return std::accumulate(all, all + 32, uint32_t(0));
}

uint32_t votes_of_lanes(bool x) {
  const Unseen unseen;
  const uint64_t* all = exchange(x);
  uint32_t votes = 0;
  for (int lane = 0; lane < 32; ++lane) votes |= uint32_t(all[lane]) << lane;
  return votes;
}

uint32_t max_of_lanes(uint32_t x) {
  const Unseen unseen;
  const uint64_t* all = exchange(x);
  return uint32_t(*std::max_element(all, all + 32));
}

void* shared_memory(size_t size) {
  const Unseen unseen;
  std::vector<uint4>& shared = current->block->shared;
  if (shared.empty()) {
    shared.resize((size + sizeof(uint4) - 1) / sizeof(uint4));
    std::memset(shared.data(), 0xa5, shared.size() * sizeof(uint4));
  }
  return shared.data();
}

}  // namespace emulator

float __fadd_rd(float a, float b) {
  const double sum = double(a) + double(b);  // exact for numbers of similar size
  const float nearest = float(sum);
  return double(nearest) > sum ? std::nextafter(nearest, -INFINITY) : nearest;
}

const char* cudaGetErrorString(cudaError_t) { return "an emulated error"; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) {
  *device = emulator::device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  emulator::device = device;
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* data, int value, size_t size, cudaStream_t) {
  std::memset(data, value, size);
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, int, int device) {
  *value = emulator::kMultiprocessors[device];
  return cudaSuccess;
}

// What each thread of two warps gets of each warp operation on x.
std::vector<std::vector<int64_t>> warp_operations(const std::vector<int64_t>& x) {
  std::vector<std::vector<int64_t>> got(64);
  emulator::launch(1, 64, [&] {
    const unsigned all = 0xffffffffu, thread = threadIdx.x;
    const int64_t mine = x.at(thread);
    std::vector<int64_t> of;
    of.push_back(__shfl_sync(all, mine, 5));
    of.push_back(__shfl_up_sync(all, mine, 3));
    of.push_back(__shfl_xor_sync(all, mine, 9));
    of.push_back(__reduce_add_sync(all, unsigned(mine)));
    of.push_back(__reduce_max_sync(all, unsigned(mine)));
    of.push_back(__ballot_sync(all, mine % 2));
    of.push_back(__any_sync(all, mine == x[40]));
    of.push_back(__all_sync(all, thread < 32));
    got[thread] = of;
  });
  return got;
}

PYBIND11_MODULE(emulator, m) {
  m.def("warp_operations", &warp_operations);
  m.def("seed", [](uint64_t seed) { emulator::randomness.seed(seed); });
  m.def("device", [] { return emulator::device; }, "The current one.");
  m.def("launches", [] { return emulator::launches; });
  m.def("blocks", [] { return emulator::blocks_launched; });
  m.def("together_launches", [] { return emulator::together_launches; });
  m.def("meetings", [] { return emulator::meetings; }, "Of threads at barriers.");
  m.def("barriers", [] { return emulator::barriers; }, "(file, line) of all that were met.");
  m.def("use_cooperation", [](bool does) { emulator::cooperates = does; });
  m.def("use_orders", [](bool orders) { emulator::orders = orders; });
  m.def("leave_out", [](const std::string& file, int line) { emulator::missing = {file, line}; });
}
