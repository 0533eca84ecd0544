// Runs a CUDA grid on the CPU: every thread of a block is a fiber, blocks follow one another.
//
// The order of threads and blocks is drawn anew for every block, so that a kernel which lacks a
// barrier computes something else. An exchange that a lane of the warp stays away from, undefined
// on a GPU, is an exception. As there, a barrier does not wait for threads that have returned.
#pragma once

#include <cstddef>
#include <functional>

namespace cuda_emulation {

struct Index {
  unsigned x = 0;
  unsigned y = 0;
  unsigned z = 0;
};

struct Extent {
  unsigned x = 1;
  unsigned y = 1;
  unsigned z = 1;

  Extent(unsigned x_count = 1, unsigned y_count = 1, unsigned z_count = 1)
      : x(x_count), y(y_count), z(z_count) {}
};

// Of the thread that is running.
extern Index thread_index;
extern Index block_index;
extern Extent grid_extent;
extern Extent block_extent;

// Calls `thread` once for every thread of the grid.
//
// Throws std::invalid_argument for an extent that CUDA would refuse, std::runtime_error for a
// kernel whose threads wait for one another forever.
void run_grid(const Extent& grid, const Extent& block, const std::function<void()>& thread);

// Waits for all threads of the block that have not returned.
void wait_for_block();

// Waits for all lanes of the warp, then overwrites `value` with that of lane `lane ^ mask`.
void exchange_in_warp(void* value, size_t bytes, int mask);

// What `kernel<<<grid, block, shared, stream>>>` becomes; the call takes the kernel's arguments.
template <typename Kernel>
auto launch(Kernel* kernel, const Extent& grid, const Extent& block, size_t /*shared*/,
            void* /*stream*/) {
  return [=](auto... arguments) { run_grid(grid, block, [&] { kernel(arguments...); }); };
}

}  // namespace cuda_emulation
