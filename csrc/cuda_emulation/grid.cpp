#include "cuda_emulation/grid.h"

#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/subnormals.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_emulation {

Index thread_index;
Index block_index;
Extent grid_extent;
Extent block_extent;

namespace {

std::atomic<int64_t> launches{0};

constexpr unsigned kWarp = 32;
constexpr unsigned kMostThreads = 1024;
constexpr size_t kMostExchanged = 16;  // bytes
constexpr size_t kStackBytes = 64 << 10;

enum class State { kReady, kAtBarrier, kExchanging, kReturned };

// A thread of the block.
struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  State state = State::kReturned;
  Index index;
  int mask = 0;  // of the exchange it waits in
  alignas(kMostExchanged) char value[kMostExchanged];
};

// One block at a time.
class Scheduler {
 public:
  void run(const Extent& grid, const Extent& block, const std::function<void()>& thread);
  void leave(State state);
  Fiber& running() { return *running_; }

 private:
  void run_block();
  void run_warp(unsigned warp);
  void resume(Fiber* fiber);
  void exchange(unsigned warp);
  std::vector<unsigned> drawn_order(unsigned count);
  static void enter();

  std::vector<Fiber> fibers_;
  unsigned threads_ = 0;
  const std::function<void()>* thread_ = nullptr;
  ucontext_t home_;
  Fiber* running_ = nullptr;
  std::mt19937 random_;
  std::mutex one_grid_;
};

// Never destroyed: another thread may be launching while the process ends.
Scheduler& scheduler() {
  static Scheduler* const only = new Scheduler;
  return *only;
}

std::vector<unsigned> Scheduler::drawn_order(unsigned count) {
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0U);
  std::shuffle(order.begin(), order.end(), random_);
  return order;
}

void Scheduler::run(const Extent& grid, const Extent& block, const std::function<void()>& thread) {
  const uint64_t threads = static_cast<uint64_t>(block.x) * block.y * block.z;
  const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
  if (threads == 0 || threads > kMostThreads || threads % kWarp != 0) {
    throw std::invalid_argument("a block of " + std::to_string(threads) +
                                " threads; expected whole warps, at most 1024 threads");
  }
  if (blocks == 0 || grid.x > 0x7fffffffU || grid.y > 65535 || grid.z > 65535) {
    throw std::invalid_argument("a grid that CUDA refuses: " + std::to_string(grid.x) + " x " +
                                std::to_string(grid.y) + " x " + std::to_string(grid.z));
  }
  const std::lock_guard<std::mutex> alone(one_grid_);
  ++launches;
  threads_ = static_cast<unsigned>(threads);
  thread_ = &thread;
  grid_extent = grid;
  block_extent = block;
  if (fibers_.empty()) {
    fibers_ = std::vector<Fiber>(kMostThreads);
    for (Fiber& fiber : fibers_) {
      fiber.stack = std::make_unique<char[]>(kStackBytes);
    }
  }
  for (unsigned b : drawn_order(static_cast<unsigned>(blocks))) {
    block_index = {b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y};
    run_block();
  }
}

void Scheduler::run_block() {
  for (unsigned t = 0; t < threads_; ++t) {
    Fiber& fiber = fibers_[t];
    fiber.index = {t % block_extent.x, t / block_extent.x % block_extent.y,
                   t / block_extent.x / block_extent.y};
    fiber.state = State::kReady;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Scheduler::enter, 0);
  }
  while (true) {
    for (unsigned warp : drawn_order(threads_ / kWarp)) {
      run_warp(warp);
    }
    bool waiting = false;
    for (unsigned t = 0; t < threads_; ++t) {
      waiting |= fibers_[t].state == State::kAtBarrier;
    }
    if (!waiting) {
      return;
    }
    for (unsigned t = 0; t < threads_; ++t) {
      if (fibers_[t].state == State::kAtBarrier) {
        fibers_[t].state = State::kReady;
      }
    }
  }
}

// Until every lane has returned or waits for the block.
void Scheduler::run_warp(unsigned warp) {
  Fiber* const lanes = &fibers_[warp * kWarp];
  while (true) {
    for (unsigned lane : drawn_order(kWarp)) {
      if (lanes[lane].state == State::kReady) {
        resume(&lanes[lane]);
      }
    }
    const auto exchanging = std::count_if(
        lanes, lanes + kWarp, [](const Fiber& f) { return f.state == State::kExchanging; });
    if (exchanging == 0) {
      return;
    }
    if (exchanging != kWarp) {
      throw std::runtime_error("warp " + std::to_string(warp) + ": only " +
                               std::to_string(exchanging) + " of 32 lanes came to an exchange");
    }
    exchange(warp);
  }
}

void Scheduler::exchange(unsigned warp) {
  Fiber* const lanes = &fibers_[warp * kWarp];
  char values[kWarp][kMostExchanged];
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    std::memcpy(values[lane], lanes[lane].value, kMostExchanged);
  }
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    std::memcpy(lanes[lane].value, values[lane ^ static_cast<unsigned>(lanes[lane].mask)],
                kMostExchanged);
    lanes[lane].state = State::kReady;
  }
}

// AddressSanitizer must know whose stack is in use; otherwise there is nothing to tell.
const void* home_stack = nullptr;
size_t home_stack_bytes = 0;

void* leaving_for(const void* stack, size_t bytes, bool for_good) {
  void* own = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &own, stack, bytes);
#else
  (void)stack, (void)bytes, (void)for_good;
#endif
  return own;
}

void arrived(void* own, bool from_home) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(own, from_home ? &home_stack : nullptr,
                                  from_home ? &home_stack_bytes : nullptr);
#else
  (void)own, (void)from_home;
#endif
}

void Scheduler::resume(Fiber* fiber) {
  running_ = fiber;
  thread_index = fiber->index;
  void* const own = leaving_for(fiber->stack.get(), kStackBytes, false);
  swapcontext(&home_, &fiber->context);
  arrived(own, false);
}

void Scheduler::leave(State state) {
  running_->state = state;
  void* const own = leaving_for(home_stack, home_stack_bytes, state == State::kReturned);
  swapcontext(&running_->context, &home_);
  arrived(own, true);
}

void Scheduler::enter() {
  arrived(nullptr, true);
  (*scheduler().thread_)();
  scheduler().leave(State::kReturned);
}

}  // namespace

void run_grid(const Extent& grid, const Extent& block, const std::function<void()>& thread) {
  const chanprune::SubnormalScope scope;  // a GPU minds no mode of the host's threads
  scheduler().run(grid, block, thread);
}

void wait_for_block() { scheduler().leave(State::kAtBarrier); }

void exchange_in_warp(void* value, size_t bytes, int mask) {
  Fiber& fiber = scheduler().running();
  std::memcpy(fiber.value, value, bytes);
  fiber.mask = mask;
  scheduler().leave(State::kExchanging);
  std::memcpy(value, fiber.value, bytes);
}

}  // namespace cuda_emulation

// Grids run so far; tests ask by ctypes.
extern "C" __attribute__((visibility("default"))) int64_t cuda_emulation_launches() {
  return cuda_emulation::launches;
}
