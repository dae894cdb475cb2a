// Memory that tells who touches it, for a while in place of PyTorch's own on the CPU: full of one byte, between margins that
// nobody may change.

#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

namespace {

constexpr size_t kMargin = 256;

struct Block {
  unsigned char* memory;
  size_t bytes;
  unsigned char byte;

  bool damaged() const {
    const auto other = [this](unsigned char each) { return each != byte; };
    return std::any_of(memory, memory + kMargin, other) ||
           std::any_of(memory + kMargin + bytes, memory + kMargin + bytes + kMargin, other);
  }
};

std::mutex mutex;
std::map<void*, Block> blocks;  // by what was handed out
int64_t damaged = 0;

void release(void* data) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto block = blocks.find(data);
  damaged += block->second.damaged();
  std::free(block->second.memory);
  blocks.erase(block);
}

struct Guard final : c10::Allocator {
  unsigned char byte = 0;

  c10::DataPtr allocate(size_t bytes) override {
    const size_t all = (bytes + 2 * kMargin + 63) / 64 * 64;
    auto* memory = static_cast<unsigned char*>(std::aligned_alloc(64, all));
    std::memset(memory, byte, all);
    void* data = memory + kMargin;
    const std::lock_guard<std::mutex> lock(mutex);
    blocks[data] = {memory, bytes, byte};
    return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t count) const override { std::memcpy(to, from, count); }
};

Guard guard;
c10::Allocator* before = nullptr;

}  // namespace

extern "C" void segops_guard_begin(unsigned char byte) {
  guard.byte = byte;
  damaged = 0;
  before = c10::GetCPUAllocator();
  c10::SetCPUAllocator(&guard, 100);
}

// Whether memory that begins here was handed out, and has not been given back.
extern "C" bool segops_guard_holds(void* data) {
  const std::lock_guard<std::mutex> lock(mutex);
  return blocks.count(data) > 0;
}

// Whether all margins are as they were.
extern "C" bool segops_guard_end() {
  c10::SetCPUAllocator(before, 100);
  const std::lock_guard<std::mutex> lock(mutex);
  for (const auto& [data, block] : blocks) damaged += block.damaged();
  return damaged == 0;
}
