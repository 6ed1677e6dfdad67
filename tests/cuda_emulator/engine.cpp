#include "engine.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#include <sys/mman.h>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// ---------------------------------------------------------------- fibers
namespace {

constexpr size_t kStack = 256 << 10;

#if defined(__x86_64__)
// Saves what a call must preserve on this stack, and continues on the other. ucontext would do the same with
// two system calls a switch.
extern "C" void emulator_switch(void** from, void* to);
asm(R"(
.text
.p2align 4
.globl emulator_switch
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, .-emulator_switch
)");

struct Context {
  void* stack_pointer = nullptr;
  void start(char* stack, void (*entry)()) {
    auto* top = reinterpret_cast<void**>(stack + kStack - 64);
    *--top = nullptr;  // what would be the return address of entry: keeps the stack aligned as after a call
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    stack_pointer = top;
  }
  static void switch_to(Context& from, Context& to) {
    emulator_switch(&from.stack_pointer, to.stack_pointer);
  }
};
#else
struct Context {
  ucontext_t context;
  void start(char* stack, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = kStack;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  static void switch_to(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
};
#endif

struct Stacks {
  std::vector<char*> all;
  char* at(size_t i) {
    while (all.size() <= i) {
      void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (memory == MAP_FAILED) throw std::bad_alloc();
      all.push_back(static_cast<char*>(memory));
    }
    return all[i];
  }
};

Stacks stacks;  // kept for the process's life

}  // namespace

// ---------------------------------------------------------------- a block
namespace emulator {
namespace {

enum class State { ready, waiting, done };

struct Copy {
  char* to;
  const char* from;
  size_t bytes;
  bool valid;
};

struct Thread {
  Context context;
  State state = State::ready;
  const char* waits_at = nullptr;
  std::vector<Copy> open;                // copies of the group that is not committed yet
  std::deque<std::vector<Copy>> groups;  // committed, not waited for
  bool unfenced = false;                 // copies arrived that matrix instructions may not see yet
  bool sees_unfenced = false;            // the same, of others, by a barrier that they arrived at
  std::vector<std::function<void()>> deferred;
  std::deque<std::vector<std::function<void()>>> deferred_groups;
};

// Threads meet when all that the mask names have come. Two buffers: nobody can come a second time before
// everybody has read the first result.
struct Meeting {
  uint32_t mask = 0;
  int arrived = 0;
  uint64_t generation = 0;
  const char* where = nullptr;
  std::vector<int> waiting;
  Slot slots[2][kWarp];
};

// A barrier for part of a block.
struct PartBarrier {
  int threads = 0;
  std::vector<int> waiting;
};

// What is under way by nobody's hand: a box of so many bytes, or (no bytes) a thread's copies with the
// arrival that follows them.
struct Bulk {
  uint64_t* barrier;
  size_t bytes;
  std::function<void()> work;
};

// How a barrier in shared memory looks here. Shared memory starts as 0xFF, so `sign` tells whether it was
// initialised.
struct SharedBarrier {
  static constexpr uint8_t kSign = 0x5A;
  uint8_t sign, phase;
  uint16_t arrivals;     // a phase
  int32_t missing : 12;  // arrivals
  int32_t bytes : 20;    // announced, not here yet
};
static_assert(sizeof(SharedBarrier) == sizeof(uint64_t));

struct Block {
  int threads = 0, running = -1, alive = 0;
  std::vector<Thread> thread;
  std::vector<std::vector<std::unique_ptr<Meeting>>> warp;  // one meeting a mask
  std::deque<int> ready;
  std::vector<int> at_barrier;
  const char* barrier = nullptr;
  int votes = 0, last_votes = 0;
  std::map<int, PartBarrier> part_barriers;                     // by their number
  std::map<const uint64_t*, std::vector<int>> waits_for_phase;  // threads, by barrier
  std::map<const uint64_t*, bool> by_copies;                    // whether 16-byte copies arrive at a barrier
  std::deque<Bulk> bulk;
  std::exception_ptr error;
  std::unique_ptr<char, void (*)(void*)> shared{nullptr, std::free};
};

bool land_bulk();  // one of the boxes under way; false if there is none

uint64_t schedule = 0;
std::mt19937_64 generator;
Block* block = nullptr;
Context scheduler;
const std::function<void()>* body = nullptr;
std::mutex one_grid_at_a_time;

#if defined(__SANITIZE_ADDRESS__)
void* fake_stack_of_scheduler = nullptr;
const void* scheduler_stack = nullptr;
size_t scheduler_stack_size = 0;
#endif

std::string name_of(int thread) {
  const unsigned t = static_cast<unsigned>(thread);
  const auto triple = [](unsigned x, unsigned y, unsigned z) {
    return "(" + std::to_string(x) + ", " + std::to_string(y) + ", " + std::to_string(z) + ")";
  };
  return "thread " + triple(t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y) +
         " of block " + triple(blockIdx.x, blockIdx.y, blockIdx.z);
}

void set_thread(int t) {
  const unsigned i = static_cast<unsigned>(t);
  threadIdx = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
  block->running = t;
}

// Back to the scheduler; returns when it picks this thread again.
void suspend(bool for_good = false) {
  const int me = block->running;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_stack, scheduler_stack, scheduler_stack_size);
#else
  (void)for_good;
#endif
  Context::switch_to(block->thread[static_cast<size_t>(me)].context, scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, &scheduler_stack, &scheduler_stack_size);
#endif
}

void wake(int t) {
  block->thread[static_cast<size_t>(t)].state = State::ready;
  block->ready.push_back(t);
}

void wait_at(const char* where) {
  Thread& me = block->thread[static_cast<size_t>(block->running)];
  me.state = State::waiting;
  me.waits_at = where;
  suspend();
}

void thread_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
  try {
    (*body)();
    const Thread& me = block->thread[static_cast<size_t>(block->running)];
    bool pending = !me.open.empty();
    for (const auto& group : me.groups) pending = pending || !group.empty();
    if (!me.deferred.empty() || !me.deferred_groups.empty())
      fault("ends with matrix instructions that it never waited for");
    if (pending) fault("ends with asynchronous copies that it never waited for");
  } catch (...) {
    if (!block->error) block->error = std::current_exception();
  }
  block->thread[static_cast<size_t>(block->running)].state = State::done;
  --block->alive;
  suspend(true);
  std::abort();  // nobody resumes a thread that is done
}

int pick_ready() {
  auto& ready = block->ready;
  size_t i = 0;
  if (schedule == 1) i = ready.size() - 1;
  if (schedule > 1) i = generator() % ready.size();
  const int t = ready[i];
  ready.erase(ready.begin() + static_cast<std::ptrdiff_t>(i));
  return t;
}

[[noreturn]] void report_stuck() {
  std::string text = "deadlock: only part of the threads came: ";
  int shown = 0, done = 0;
  for (int t = 0; t < block->threads; ++t) {
    const Thread& thread = block->thread[static_cast<size_t>(t)];
    done += thread.state == State::done;
    if (thread.state == State::waiting && shown++ < 4)
      text += name_of(t) + " waits at " + thread.waits_at + "; ";
  }
  throw Fault(text + std::to_string(done) + " of " + std::to_string(block->threads) + " threads have ended");
}

void run_block(size_t shared_bytes) {
  Block state;
  block = &state;
  state.threads = state.alive = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
  state.thread.resize(static_cast<size_t>(state.threads));
  state.warp.resize(static_cast<size_t>((state.threads + kWarp - 1) / kWarp));
  // Exactly as large as asked for, so that AddressSanitizer sees what lies beyond.
  const size_t size = std::max<size_t>(shared_bytes, 1);
  void* memory = nullptr;
  if (posix_memalign(&memory, 1024, size) != 0) throw std::bad_alloc();
  state.shared.reset(static_cast<char*>(memory));
  std::memset(memory, 0xFF, size);
  for (int t = 0; t < state.threads; ++t) {
    char* stack = stacks.at(static_cast<size_t>(t));
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(stack, kStack);  // whoever used it last may have left in the middle
#endif
    state.thread[static_cast<size_t>(t)].context.start(stack, thread_main);
    state.ready.push_back(t);
  }
  while (state.alive > 0) {
    // Boxes arrive as late as they may, or at random.
    if (schedule > 1 && generator() % 8 == 0) land_bulk();
    while (state.ready.empty())
      if (!land_bulk()) report_stuck();
    const int t = pick_ready();
    set_thread(t);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&fake_stack_of_scheduler, stacks.at(static_cast<size_t>(t)), kStack);
#endif
    Context::switch_to(scheduler, state.thread[static_cast<size_t>(t)].context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack_of_scheduler, nullptr, nullptr);
#endif
    if (state.error) std::rethrow_exception(state.error);
    // A thread that ended while others wait at a barrier will never come.
    if (!state.at_barrier.empty() && state.alive < state.threads && state.ready.empty()) report_stuck();
  }
  if (!state.bulk.empty()) throw Fault("a block ends with copies of boxes under way that nobody waited for");
}

}  // namespace

void set_schedule(uint64_t seed) {
  schedule = seed;
  generator.seed(seed);
}

void run_grid(dim3 grid, dim3 threads, size_t shared_bytes, const std::function<void()>& kernel) {
  const std::lock_guard<std::mutex> lock(one_grid_at_a_time);
  gridDim = grid;
  blockDim = threads;
  body = &kernel;
  std::vector<uint64_t> order(uint64_t{grid.x} * grid.y * grid.z);
  std::iota(order.begin(), order.end(), uint64_t{0});
  if (schedule == 1) std::reverse(order.begin(), order.end());
  if (schedule > 1) std::shuffle(order.begin(), order.end(), generator);
  for (const uint64_t b : order) {
    blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                static_cast<unsigned>(b / grid.x / grid.y)};
    run_block(shared_bytes);
  }
  block = nullptr;
}

void* shared_memory() { return block->shared.get(); }

int linear_thread() { return block->running; }

int lane() { return block->running % kWarp; }

void yield() {
  if (schedule <= 1 || generator() % 4 != 0) return;
  wake(block->running);
  suspend();
}

void fault(const std::string& what) { throw Fault(name_of(block->running) + " " + what); }

int count_block(bool condition, const char* where) {
  auto& waiting = block->at_barrier;
  if (!waiting.empty() && std::strcmp(block->barrier, where) != 0)
    fault("is at the barrier at " + std::string(where) + " while others are at the one at " + block->barrier);
  block->barrier = where;
  block->votes += condition;
  if (static_cast<int>(waiting.size()) + 1 < block->threads) {
    waiting.push_back(block->running);
    wait_at(where);
    return block->last_votes;  // nobody can complete the next barrier without this thread
  }
  block->last_votes = block->votes;
  block->votes = 0;
  for (const int t : waiting) wake(t);
  waiting.clear();
  wake(block->running);  // the last to come has no right to go on first
  suspend();
  return block->last_votes;
}

void sync_block(const char* where) { count_block(false, where); }

const Slot* meet_warp(uint32_t mask, const char* where, const void* payload, size_t bytes) {
  const int me = block->running, my_lane = me % kWarp;
  if ((mask >> my_lane & 1) == 0) fault("is at " + std::string(where) + " but its lane is not in the mask");
  auto& meetings = block->warp[static_cast<size_t>(me / kWarp)];
  auto found = std::find_if(meetings.begin(), meetings.end(), [&](const auto& m) { return m->mask == mask; });
  if (found == meetings.end()) {
    meetings.push_back(std::make_unique<Meeting>());
    meetings.back()->mask = mask;
    found = meetings.end() - 1;
  }
  Meeting& meeting = **found;
  if (meeting.arrived > 0 && std::strcmp(meeting.where, where) != 0)
    fault("is at " + std::string(where) + " while others of its warp are at " + meeting.where);
  meeting.where = where;
  Slot* slots = meeting.slots[meeting.generation & 1];
  std::memcpy(slots[my_lane].bytes, payload, bytes);
  if (++meeting.arrived < __builtin_popcount(mask)) {
    meeting.waiting.push_back(me);
    wait_at(where);
    return slots;
  }
  meeting.arrived = 0;
  ++meeting.generation;
  for (const int t : meeting.waiting) wake(t);
  meeting.waiting.clear();
  return slots;
}

void copy_async(void* shared, const void* global, size_t bytes, bool valid) {
  check_aligned(shared, bytes, "copies asynchronously to");
  if (valid) check_aligned(global, bytes, "copies asynchronously from");
  std::memset(shared, 0xFF, bytes);  // who reads before the wait reads NaN
  block->thread[static_cast<size_t>(block->running)].open.push_back(
      {static_cast<char*>(shared), static_cast<const char*>(global), bytes, valid});
}

void commit_copies() {
  Thread& me = block->thread[static_cast<size_t>(block->running)];
  me.groups.push_back(std::move(me.open));
  me.open.clear();
}

namespace {
void land(const Copy& copy) {
  if (copy.valid)
    std::memcpy(copy.to, copy.from, copy.bytes);
  else
    std::memset(copy.to, 0, copy.bytes);
}
}  // namespace

void wait_for_copies(int groups_left) {
  Thread& me = block->thread[static_cast<size_t>(block->running)];
  while (static_cast<int>(me.groups.size()) > groups_left) {
    me.unfenced = me.unfenced || !me.groups.front().empty();
    for (const Copy& copy : me.groups.front()) land(copy);
    me.groups.pop_front();
  }
}

void fence_copies() {
  Thread& me = block->thread[static_cast<size_t>(block->running)];
  me.unfenced = me.sees_unfenced = false;
}

void check_fenced() {
  if (block->thread[static_cast<size_t>(block->running)].sees_unfenced)
    fault("starts a matrix instruction on copies of others that it did not fence");
  for (int t = 0; t < block->threads; ++t)
    if (block->thread[static_cast<size_t>(t)].unfenced)
      fault("starts a matrix instruction while copies of " + name_of(t) + " are not fenced");
}

void defer(std::function<void()> work) {
  Thread& me = block->thread[static_cast<size_t>(block->running)];
  if (schedule > 1 && generator() % 2 == 0 && me.deferred.empty() && me.deferred_groups.empty())
    work();
  else
    me.deferred.push_back(std::move(work));
}

void commit_deferred() {
  Thread& me = block->thread[static_cast<size_t>(block->running)];
  me.deferred_groups.push_back(std::move(me.deferred));
  me.deferred.clear();
}

void wait_for_deferred(int groups_left) {
  Thread& me = block->thread[static_cast<size_t>(block->running)];
  while (static_cast<int>(me.deferred_groups.size()) > groups_left) {
    for (const auto& work : me.deferred_groups.front()) work();
    me.deferred_groups.pop_front();
  }
}

namespace {

SharedBarrier read_barrier(const uint64_t* barrier) {
  const auto offset = reinterpret_cast<const char*>(barrier) - block->shared.get();
  SharedBarrier state;
  std::memcpy(&state, barrier, sizeof state);
  if (offset < 0 || offset % 8 != 0 || state.sign != SharedBarrier::kSign)
    throw Fault("a barrier in shared memory is used that was not initialised, or was overwritten");
  return state;
}

// Ends the phase if nothing is missing.
void write_barrier(uint64_t* barrier, SharedBarrier state) {
  const bool ends = state.missing == 0 && state.bytes == 0;
  if (ends) {
    state.phase ^= 1;
    state.missing = static_cast<int16_t>(state.arrivals);
  }
  std::memcpy(barrier, &state, sizeof state);
  if (!ends) return;
  std::vector<int> waiting = std::exchange(block->waits_for_phase[barrier], {});
  for (const int t : waiting) wake(t);
}

}  // namespace

void init_barrier(uint64_t* barrier, unsigned arrivals) {
  const SharedBarrier state{SharedBarrier::kSign, 0, static_cast<uint16_t>(arrivals),
                            static_cast<int16_t>(arrivals), 0};
  std::memcpy(barrier, &state, sizeof state);
}

void arrive(uint64_t* barrier, unsigned bytes_to_come) {
  yield();
  SharedBarrier state = read_barrier(barrier);
  if (state.missing == 0) fault("arrives at a barrier in shared memory at which all had arrived");
  state.bytes += static_cast<int>(bytes_to_come);
  --state.missing;
  write_barrier(barrier, state);
}

void wait_for_phase(const uint64_t* barrier, unsigned parity, const char* where) {
  yield();
  while (read_barrier(barrier).phase == parity) {
    block->waits_for_phase[barrier].push_back(block->running);
    wait_at(where);
  }
  if (block->by_copies[barrier]) block->thread[static_cast<size_t>(block->running)].sees_unfenced = true;
}

void arrive_after_copies(uint64_t* barrier) {
  read_barrier(barrier);
  Thread& me = block->thread[static_cast<size_t>(block->running)];
  std::vector<Copy> copies = std::exchange(me.open, {});
  for (auto& group : me.groups) copies.insert(copies.end(), group.begin(), group.end());
  me.groups.clear();
  block->by_copies[barrier] = true;
  block->bulk.push_back({barrier, 0, [copies = std::move(copies)] {
                           for (const Copy& copy : copies) land(copy);
                         }});
}

int64_t boxes_copied = 0;

void copy_bulk(uint64_t* barrier, void* shared, size_t bytes, std::function<void()> work) {
  ++boxes_copied;
  read_barrier(barrier);
  std::memset(shared, 0xFF, bytes);  // who reads too early reads NaN
  block->bulk.push_back({barrier, bytes, std::move(work)});
}

namespace {
bool land_bulk() {
  auto& bulk = block->bulk;
  if (bulk.empty()) return false;
  const size_t which = schedule == 0 ? 0 : schedule == 1 ? bulk.size() - 1 : generator() % bulk.size();
  const Bulk copy = std::move(bulk[which]);
  bulk.erase(bulk.begin() + static_cast<std::ptrdiff_t>(which));
  copy.work();
  SharedBarrier state = read_barrier(copy.barrier);
  if (state.bytes < static_cast<int>(copy.bytes))
    throw Fault("a box brings bytes to a barrier in shared memory that does not expect them");
  state.bytes -= static_cast<int>(copy.bytes);
  if (copy.bytes == 0 && state.missing-- == 0)
    throw Fault("copies arrive at a barrier in shared memory at which all had arrived");
  write_barrier(copy.barrier, state);
  return true;
}
}  // namespace

void sync_some(int id, int threads) {
  PartBarrier& barrier = block->part_barriers[id];
  if (!barrier.waiting.empty() && barrier.threads != threads)
    fault("is at barrier " + std::to_string(id) + " for " + std::to_string(threads) +
          " threads while others are there for " + std::to_string(barrier.threads));
  barrier.threads = threads;
  if (static_cast<int>(barrier.waiting.size()) + 1 < threads) {
    barrier.waiting.push_back(block->running);
    return wait_at("a barrier for part of the block");
  }
  for (const int t : std::exchange(barrier.waiting, {})) wake(t);
  wake(block->running);  // the last to come has no right to go on first
  suspend();
}

void check_aligned(const void* pointer, size_t bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0)
    fault(std::string(what) + " an address that is not a multiple of " + std::to_string(bytes));
}

}  // namespace emulator
