#include "emulator.h"

#include <pybind11/pybind11.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cmath>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace emulator {

Position here;

namespace {

constexpr size_t kStack = 128 << 10;
constexpr int64_t kPatience = 20'000'000;  // switches without a barrier passed or a thread ended

struct Block;

struct Fiber {
  jmp_buf state;
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

std::mutex one_launch;
std::mt19937_64 randomness;
constexpr int kMultiprocessors[] = {96, 32, 600};  // of each device; each runs one block
int device = 0;
int launches = 0;
int together_launches = 0;
Launch* launched;
Fiber* current;
jmp_buf scheduler;
std::vector<Fiber*> idle;  // fibers whose thread has ended
ucontext_t birthplace;

void leave() {
  if (_setjmp(current->state) == 0) _longjmp(scheduler, 1);
}

void wake(std::vector<Fiber*>& fibers) {
  launched->ready.insert(launched->ready.end(), fibers.begin(), fibers.end());
  fibers.clear();
  launched->patience = kPatience;
}

void end_thread() {
  Block& block = *current->block;
  --block.running;
  launched->patience = kPatience;
  // threads that have ended are not waited for, as on a GPU
  if (block.running > 0 && int(block.waiting.size()) == block.running) wake(block.waiting);
  idle.push_back(current);
}

void live() {
  for (;;) {
    launched->kernel();
    end_thread();
    leave();
  }
}

void first_steps() {
  Fiber* self = current;
  if (_setjmp(self->state) == 0) setcontext(&birthplace);
  live();
}

Fiber* make_fiber() {
  Fiber* fiber = new Fiber;
  void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED) throw std::bad_alloc();
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  // At different offsets, so that the stacks do not share a few lines of the cache.
  context.uc_stack.ss_size = kStack - randomness() % 256 * 64;
  context.uc_link = nullptr;
  makecontext(&context, first_steps, 0);
  current = fiber;
  volatile bool born = false;
  getcontext(&birthplace);
  if (!born) {
    born = true;
    setcontext(&context);
  }
  return fiber;
}

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
  if (_setjmp(scheduler) == 0) _longjmp(fiber->state, 1);
}

// Runs all blocks, at most `resident` at once, which begin in any order.
void run(int64_t blocks, int64_t resident) {
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

}  // namespace

void launch(int64_t blocks, int threads, bool together, const std::function<void()>& kernel) {
  const std::lock_guard<std::mutex> guard(one_launch);
  const int multiprocessors = kMultiprocessors[device];
  if (together && blocks > multiprocessors) throw std::runtime_error("emulator: too many blocks");
  Launch launch{kernel, threads, {}};
  launched = &launch;
  ++launches;
  together_launches += together;
  // So few that blocks which wait for each other just find room, or as many as there may be.
  const int64_t least = multiprocessors / 32;
  const bool many = together || randomness() % 2;
  run(blocks, many ? multiprocessors : least);
  launched = nullptr;
}

void may_switch() {
  if (randomness() % 4 != 0) return;
  launched->ready.push_back(current);
  leave();
}

void sync_block() {
  Block& block = *current->block;
  block.waiting.push_back(current);
  if (int(block.waiting.size()) == block.running) wake(block.waiting);
  leave();
}

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

void* shared_memory(size_t size) {
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

PYBIND11_MODULE(emulator, m) {
  m.def("seed", [](uint64_t seed) { emulator::randomness.seed(seed); });
  m.def("launches", [] { return emulator::launches; });
  m.def("together_launches", [] { return emulator::together_launches; });
  m.def("device", [] { return emulator::device; });
}
