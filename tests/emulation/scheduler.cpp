// Runs the blocks and threads of an emulated launch (cuda_on_cpu.h).
//
// In reverse everything that may be one way or the other is the other way: blocks and threads run from the last to the first,
// asynchronous copies land when they begin, and shared memory holds something else at first.
//
// A fiber runs thread after thread until one has to wait: that thread keeps the fiber, and another one takes the threads that
// have not begun. A kernel without barriers thus needs a single fiber, and no switches.

#include "../../csrc/common/cuda.h"
#include "../../csrc/common/op.h"

#include <link.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace segops::emulation {
namespace {

constexpr size_t kStack = 256 << 10;
constexpr size_t kLargestShared = 99 << 10;  // of dynamic shared memory, on the GPUs that have least: sm_86, 89 and 120

// A stack, and where its execution stands.
struct Context {
  ucontext_t registers;
  std::unique_ptr<char[]> stack;
  const void* bottom = nullptr;  // what a sanitizer knows of the stack
  size_t size = 0;
};

void switch_to(Context& to, Context& from) {
#ifdef __SANITIZE_ADDRESS__
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, to.bottom, to.size);
  swapcontext(&from.registers, &to.registers);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
  swapcontext(&from.registers, &to.registers);
#endif
}

enum class State { kReady, kAtBarrier, kInWarp, kDone };

struct Thread {
  State state = State::kReady;
  Context* fiber = nullptr;  // null before it begins
  Site site{};               // where it waits
  unsigned mask = 0;         // of the lanes that it waits for
  uint64_t value = 0;        // what it brings them
  Lanes lanes;               // what they brought
  struct Copy {
    void* to;
    const void* from;
    int bytes;
  };
  std::vector<Copy> begun;                // since the last commit
  std::vector<std::vector<Copy>> groups;  // committed
};

std::string text(dim3 index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

std::string text(Site site) {
  const std::string file = site.file;
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line);
}

bool same(Site a, Site b) {
  return a.line == b.line && !std::strcmp(a.file, b.file);
}

class Scheduler {
 public:
  bool reversed = false;
  int launches = 0;

  void run(dim3 blocks, dim3 size, size_t shared, const std::function<void()>& kernel);
  void wait(State state, Site site);
  [[noreturn]] void fail(const std::string& message);

  bool in_kernel() const { return current_ != nullptr; }
  Thread& current() { return *current_; }
  unsigned index() const { return unsigned(current_ - threads_.data()); }
  void* shared() { return shared_.get(); }

 private:
  std::vector<Thread> threads_;
  Thread* current_ = nullptr;
  unsigned begun_ = 0;  // threads
  const std::function<void()>* kernel_ = nullptr;
  std::unique_ptr<char[]> shared_;
  size_t shared_bytes_ = 0;
  Context host_;
  std::vector<std::unique_ptr<Context>> fibers_;
  std::vector<Context*> idle_;
  std::string failure_;

  static void main(unsigned low, unsigned high);
  void work(Context& fiber);
  void resume(Context& fiber);
  Context& fiber();
  void run_block();
  void enter(unsigned index);
  bool open_warps();
  bool open_barrier();
  void explain_deadlock();
};

Scheduler scheduler;

// Fills what is declared `__shared__`: the variables of the thread in this library, which has no others.
void fill_static_shared(int byte) {
#ifndef __SANITIZE_ADDRESS__
  static thread_local volatile char here;
  here = 0;  // allocates them
  std::pair<const volatile char*, int> sought{&here, byte};
  dl_iterate_phdr(
      [](dl_phdr_info* library, size_t, void* data) {
        const auto [sought, byte] = *static_cast<std::pair<const volatile char*, int>*>(data);
        auto* begin = static_cast<char*>(library->dlpi_tls_data);
        for (int i = 0; begin && i < library->dlpi_phnum; ++i) {
          const auto& segment = library->dlpi_phdr[i];
          if (segment.p_type != PT_TLS || sought < begin || sought >= begin + segment.p_memsz) continue;
          std::memset(begin, byte, segment.p_memsz);
          return 1;
        }
        return 0;
      },
      &sought);
#endif
}

void Scheduler::main(unsigned low, unsigned high) {
  Context& fiber = *reinterpret_cast<Context*>(uintptr_t(low) | uintptr_t(high) << 32);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &scheduler.host_.bottom, &scheduler.host_.size);
#endif
  scheduler.work(fiber);
}

void Scheduler::work(Context& fiber) {
  for (;;) {
    while (begun_ < threads_.size()) {
      const unsigned order = begun_++;
      enter(reversed ? unsigned(threads_.size()) - 1 - order : order);
      current_->fiber = &fiber;
      (*kernel_)();
      if (!current_->begun.empty() || !current_->groups.empty()) fail("a thread ends without waiting for its copies");
      current_->state = State::kDone;
    }
    idle_.push_back(&fiber);
    switch_to(host_, fiber);
  }
}

void Scheduler::enter(unsigned index) {
  current_ = &threads_[index];
  threadIdx = {index % blockDim.x, index / blockDim.x % blockDim.y, index / blockDim.x / blockDim.y};
}

Context& Scheduler::fiber() {
  if (idle_.empty()) {
    fibers_.push_back(std::make_unique<Context>());
    Context& made = *fibers_.back();
    made.stack.reset(new char[kStack]);  // which touches no memory
    made.bottom = made.stack.get();
    made.size = kStack;
    getcontext(&made.registers);
    made.registers.uc_stack.ss_sp = made.stack.get();
    made.registers.uc_stack.ss_size = kStack;
    const auto address = reinterpret_cast<uintptr_t>(&made);
    makecontext(&made.registers, reinterpret_cast<void (*)()>(&Scheduler::main), 2, unsigned(address), unsigned(address >> 32));
    return made;
  }
  Context& found = *idle_.back();
  idle_.pop_back();
  return found;
}

void Scheduler::resume(Context& fiber) {
  switch_to(fiber, host_);
  current_ = nullptr;
  if (!failure_.empty()) STD_TORCH_CHECK(false, "emulated CUDA: ", std::exchange(failure_, ""));
}

void Scheduler::wait(State state, Site site) {
  current_->state = state;
  current_->site = site;
  switch_to(host_, *current_->fiber);
}

void Scheduler::fail(const std::string& message) {
  if (!in_kernel()) STD_TORCH_CHECK(false, "emulated CUDA: ", message);
  failure_ = message + ", in thread " + text(threadIdx) + " of block " + text(blockIdx);
  Context gone;
  switch_to(host_, gone);
  std::abort();  // nobody comes back
}

// Lets those go on whose warps are complete.
bool Scheduler::open_warps() {
  bool opened = false;
  for (size_t first = 0; first < threads_.size(); first += warpSize) {
    const size_t lanes = std::min<size_t>(warpSize, threads_.size() - first);
    for (size_t i = 0; i < lanes; ++i) {
      const Thread& one = threads_[first + i];
      if (one.state != State::kInWarp) continue;
      unsigned come = 0;
      Lanes brought{};
      for (size_t k = 0; k < lanes; ++k) {
        const Thread& other = threads_[first + k];
        if (other.state != State::kInWarp || other.mask != one.mask || !same(other.site, one.site)) continue;
        come |= 1u << k;
        brought.value[k] = other.value;
      }
      if (come != one.mask) continue;
      opened = true;
      for (size_t k = 0; k < lanes; ++k) {
        if (!(come >> k & 1)) continue;
        threads_[first + k].lanes = brought;
        threads_[first + k].state = State::kReady;
      }
    }
  }
  return opened;
}

// Lets all threads go on if all are at the same barrier.
bool Scheduler::open_barrier() {
  for (const Thread& thread : threads_)
    if (thread.state != State::kAtBarrier || !same(thread.site, threads_[0].site)) return false;
  for (Thread& thread : threads_) thread.state = State::kReady;
  return true;
}

// Raises: what threads wait for does not come.
void Scheduler::explain_deadlock() {
  const Thread *at_barrier = nullptr, *elsewhere = nullptr;
  for (Thread& thread : threads_) {
    if (thread.state == State::kInWarp)
      STD_TORCH_CHECK(
          false, "emulated CUDA: lane ", (&thread - threads_.data()) % warpSize, " waits at ", text(thread.site),
          " with a mask of ", thread.mask, ", whose lanes do not all come there with that mask; in block ", text(blockIdx));
    if (thread.state == State::kAtBarrier && !at_barrier) at_barrier = &thread;
  }
  for (const Thread& thread : threads_)
    if (thread.state == State::kDone || !same(thread.site, at_barrier->site)) elsewhere = &thread;
  STD_TORCH_CHECK(
      false, "emulated CUDA: threads meet different barriers: thread ", at_barrier - threads_.data(), " waits at ",
      text(at_barrier->site), ", thread ", elsewhere - threads_.data(),
      elsewhere->state == State::kDone ? " has ended" : " waits at " + text(elsewhere->site), "; in block ", text(blockIdx));
}

void Scheduler::run_block() {
  const int nothing = reversed ? 0x7b : 0xff;  // NaN, and something else for what takes no notice of NaN
  std::memset(shared_.get(), nothing, shared_bytes_);
  fill_static_shared(nothing);
  for (Thread& thread : threads_) thread = Thread{};
  begun_ = 0;
  while (begun_ < threads_.size()) resume(fiber());
  for (;;) {
    bool done = true;
    for (size_t i = 0; i < threads_.size(); ++i) {
      Thread& thread = threads_[reversed ? threads_.size() - 1 - i : i];
      if (thread.state == State::kReady) {
        enter(unsigned(&thread - threads_.data()));
        resume(*thread.fiber);
      }
      done = done && thread.state == State::kDone;
    }
    if (done) return;
    if (!open_warps() && !open_barrier()) explain_deadlock();
  }
}

void Scheduler::run(dim3 blocks, dim3 size, size_t shared, const std::function<void()>& kernel) {
  ++launches;
  const uint64_t count = uint64_t(size.x) * size.y * size.z;
  STD_TORCH_CHECK(
      blocks.x > 0 && blocks.y > 0 && blocks.z > 0, "emulated CUDA: a launch of zero blocks: the grid is ", text(blocks));
  STD_TORCH_CHECK(
      blocks.x <= 0x7fffffffu && blocks.y <= 0xffff && blocks.z <= 0xffff,
      "emulated CUDA: the grid is too large: ", text(blocks));
  STD_TORCH_CHECK(count > 0 && count <= 1024 && size.z <= 64, "emulated CUDA: a block cannot be ", text(size));
  STD_TORCH_CHECK(shared <= kLargestShared, "emulated CUDA: too much shared memory: ", shared, " bytes, of ", kLargestShared);
  threads_.resize(count);
  shared_ = std::make_unique<char[]>(shared);
  shared_bytes_ = shared;
  kernel_ = &kernel;
  gridDim = blocks;
  blockDim = size;
  const uint64_t all = uint64_t(blocks.x) * blocks.y * blocks.z;
  for (uint64_t i = 0; i < all; ++i) {
    const uint64_t index = reversed ? all - 1 - i : i;
    blockIdx = {unsigned(index % blocks.x), unsigned(index / blocks.x % blocks.y), unsigned(index / blocks.x / blocks.y)};
    try {
      run_block();
    } catch (...) {
      fibers_.clear();  // whatever they were at
      idle_.clear();
      throw;
    }
  }
}

std::mutex one_launch;

}  // namespace

void fail(const std::string& message) {
  scheduler.fail(message);
}

void barrier(Site site) {
  scheduler.wait(State::kAtBarrier, site);
}

unsigned lane() {
  return scheduler.index() % warpSize;
}

const Lanes& meet(unsigned mask, uint64_t value, Site site) {
  if (!(mask >> lane() & 1)) fail("a lane calls with a mask that does not name it");
  Thread& thread = scheduler.current();
  thread.mask = mask;
  thread.value = value;
  scheduler.wait(State::kInWarp, site);
  return thread.lanes;
}

void* dynamic_shared() {
  return scheduler.shared();
}

void begin_copy(void* shared, const void* global, int bytes) {
  if (reinterpret_cast<uintptr_t>(shared) % bytes || reinterpret_cast<uintptr_t>(global) % bytes)
    fail("an asynchronous copy of " + std::to_string(bytes) + " bytes is misaligned");
  scheduler.current().begun.push_back({shared, global, bytes});
  if (scheduler.reversed) std::memcpy(shared, global, bytes);
}

void commit_copies() {
  Thread& thread = scheduler.current();
  thread.groups.push_back(std::exchange(thread.begun, {}));
}

void wait_for_copies(int pending) {
  auto& groups = scheduler.current().groups;
  for (; int(groups.size()) > pending; groups.erase(groups.begin()))
    for (const auto& copy : groups.front())
      if (!scheduler.reversed) std::memcpy(copy.to, copy.from, copy.bytes);
}

void run(dim3 blocks, dim3 threads, size_t shared, const std::function<void()>& kernel) {
  const std::lock_guard<std::mutex> lock(one_launch);
  scheduler.run(blocks, threads, shared, kernel);
}

}  // namespace segops::emulation

// What tensors hold before it is written, which differs in reverse; floating-point numbers are NaN at first.
void segops::poison(void* memory, size_t bytes, bool floating) {
  if (bytes)
    std::memset(
        memory,
        floating                        ? emulation::scheduler.reversed ? 0xc2 : 0xff
        : emulation::scheduler.reversed ? 0x15
                                        : 0xb3,
        bytes);
}

// For the launches that follow.
extern "C" __attribute__((visibility("default"))) void segops_emulation_reverse(bool reversed) {
  segops::emulation::scheduler.reversed = reversed;
}

// So far.
extern "C" __attribute__((visibility("default"))) int segops_emulation_launches() {
  return segops::emulation::scheduler.launches;
}

#ifndef SEGOPS_SANITIZE  // GCC calls these where an address or an index is wrong; the sanitizers' library has its own

namespace {
struct Location {
  const char* file;
  unsigned line, column;
};
struct Type {
  uint16_t kind, info;
  char name[1];
};
struct Mismatch {
  Location location;
  const Type* type;
  unsigned char log_alignment;
};
struct OutOfBounds {
  Location location;
  const Type *array, *index;
};

[[noreturn]] void fail_at(const Location& location, const std::string& message) {
  segops::emulation::fail(
      message + " at " + segops::emulation::text(segops::emulation::Site{location.file, int(location.line)}));
}
}  // namespace

extern "C" void __ubsan_handle_type_mismatch_v1(Mismatch* found, void*) {
  fail_at(
      found->location, std::string("a misaligned address: ") + found->type->name + " needs a multiple of " +
                           std::to_string(1 << found->log_alignment) + " bytes");
}
extern "C" void __ubsan_handle_out_of_bounds(OutOfBounds* found, uint64_t index) {
  fail_at(
      found->location, std::string("an index out of bounds: ") + std::to_string(int64_t(index)) + " of " + found->array->name);
}

#endif
