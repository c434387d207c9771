#include "cuda/emulator/emulator.h"

#include <stdio.h>
#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#include <unistd.h>

#include <string>
#include <utility>
#include <vector>

// A place to go on at: what the stack pointer was. swapcontext does the same with a system call, five times slower.
#if defined(__x86_64__)
extern "C" void sne_switch(void **from, void *to);
asm(R"(
.pushsection .text
.type sne_switch, @function
sne_switch:
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
.size sne_switch, .-sne_switch
.popsection
)");
#endif

namespace sne::emulator {
namespace {

#if defined(__x86_64__)
struct Context {
  void *stack = nullptr;
  void make(char *base, size_t size, void (*entry)()) {
    void **top = (void **)(base + size) - 2;  // as a call leaves it: 8 bytes off a multiple of 16
    *top = (void *)entry;
    stack = top - 6;
  }
};
void go(Context &from, const Context &to) { sne_switch(&from.stack, to.stack); }
#else
struct Context {
  ucontext_t context;
  void make(char *base, size_t size, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = base;
    context.uc_stack.ss_size = size;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
};
void go(Context &from, const Context &to) { swapcontext(&from.context, &to.context); }
#endif

constexpr int kMost = 1024, kLanes = 32, kGroup = 128, kBarriers = 16;
constexpr size_t kStack = 256 << 10;

struct Meeting {
  int arrived = 0, members = 0;
  uint64_t round = 0;
  const char *name = "";
  void *items[kMost];
};

struct Fiber {
  Context context;
  const uint64_t *round = nullptr;  // of the meeting it waits at
  uint64_t waits_for = 0;
  bool done = false;
  std::vector<std::pair<void *, const void *>> copies;  // under way, of 16 bytes
};

struct State {
  Context scheduler;
  std::vector<Fiber> fibers;
  std::vector<Meeting> warps, groups;
  Meeting block, named[kBarriers];
  char *stacks = nullptr;
  char *shared = nullptr;
  const std::function<void()> *kernel = nullptr;
  int64_t id[2], size[2];
  int count = 0, current = 0;
  bool failed = false;
  std::string error;
  uint64_t seed = 0, draws = 0;
};

thread_local State state;

void fail(const std::string &what) {
  State &s = state;
  s.failed = true;
  s.error = "block " + std::to_string(s.id[0]) + "," + std::to_string(s.id[1]) + ", thread " +
            std::to_string(s.current) + ": " + what;
  go(s.fibers[s.current].context, s.scheduler);  // and never comes back
}

void meet(Meeting &m, int place, int members, const char *name, void *item, void (*act)(void **)) {
  State &s = state;
  if (m.arrived && (m.name != name || m.members != members))
    fail(std::string("waits at ") + name + " where others wait at " + m.name);
  m.name = name;
  m.members = members;
  m.items[place] = item;
  if (++m.arrived == members) {
    m.arrived = 0;
    ++m.round;
    if (act) act(m.items);
    return;
  }
  Fiber &fiber = s.fibers[s.current];
  fiber.round = &m.round;
  fiber.waits_for = m.round + 1;
  go(fiber.context, s.scheduler);
  fiber.round = nullptr;
}

void enter() {
  (*state.kernel)();
  State &s = state;
  s.fibers[s.current].done = true;
  go(s.fibers[s.current].context, s.scheduler);
}

uint64_t draw() {  // splitmix64
  uint64_t z = state.seed + 0x9e3779b97f4a7c15u * ++state.draws;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

bool run_block() {
  State &s = state;
  for (int i = 0; i < s.count; ++i) {
    Fiber &fiber = s.fibers[i];
    fiber.context.make(s.stacks + kStack * i, kStack, enter);
    fiber.round = nullptr;
    fiber.done = false;
    fiber.copies.clear();
  }
  const auto fresh = [](Meeting &m) { m.arrived = 0; };
  for (Meeting &m : s.warps) fresh(m);
  for (Meeting &m : s.groups) fresh(m);
  for (Meeting &m : s.named) fresh(m);
  fresh(s.block);
  std::vector<int> order(s.count);
  for (int i = 0; i < s.count; ++i) order[i] = i;
  int left = s.count;
  // Runs the threads of one warp, or of all (-1), up to where each waits next. Whether any could run.
  const auto step = [&](int warp) {
    bool moved = false;
    for (int i : order) {
      Fiber &fiber = s.fibers[i];
      if (fiber.done || (fiber.round && *fiber.round < fiber.waits_for) || (warp >= 0 && i / kLanes != warp)) continue;
      s.current = i;
      go(s.scheduler, fiber.context);
      if (s.failed) break;
      moved = true;
      left -= fiber.done;
    }
    return moved && !s.failed;
  };
  while (left) {
    if (s.seed) {
      for (int i = s.count - 1; i > 0; --i) std::swap(order[i], order[draw() % (i + 1)]);
      // As often as not, one warp runs ahead of the others as far as it comes without them.
      const int warps = (s.count + kLanes - 1) / kLanes, ahead = int(draw() % (2 * warps));
      while (ahead < warps && step(ahead)) {
      }
    }
    const bool moved = !s.failed && step(-1);
    if (s.failed) return false;
    if (left && !moved) {
      s.failed = true;
      s.error = "threads wait for others that have ended or wait elsewhere";
      for (const Meeting &m : s.warps)
        if (m.arrived) s.error += std::string("; in a warp at ") + m.name;
      if (s.block.arrived) s.error += "; at sync_block";
      return false;
    }
  }
  return true;
}

}  // namespace

int thread() { return state.current; }
int threads() { return state.count; }
int64_t block(int axis) { return state.id[axis]; }
int64_t blocks(int axis) { return state.size[axis]; }
void *shared() { return state.shared; }

void meet_warp(const char *name, void *item, void (*act)(void **)) {
  const int t = state.current;
  meet(state.warps[t / kLanes], t % kLanes, kLanes, name, item, act);
}
void meet_warpgroup(const char *name, void *item, void (*act)(void **)) {
  const int t = state.current;
  meet(state.groups[t / kGroup], t % kGroup, kGroup, name, item, act);
}
void meet_block(const char *name) { meet(state.block, state.current, state.count, name, nullptr, nullptr); }
void meet_named(int barrier, int threads) {
  if (barrier < 1 || barrier >= kBarriers || threads % kLanes || threads > state.count) fail("no such barrier");
  Meeting &m = state.named[barrier];
  meet(m, m.arrived, threads, "sync_named", nullptr, nullptr);
}

void copy_async(void *to, const void *from) { state.fibers[state.current].copies.emplace_back(to, from); }
void copies_done() {
  auto &copies = state.fibers[state.current].copies;
  for (const auto &[to, from] : copies) memcpy(to, from, 16);
  copies.clear();
}

int run(int64_t x, int64_t y, int threads, size_t shared, const std::function<void()> &kernel) {
  State &s = state;
  s.failed = false;
  if (threads < 1 || threads > kMost || threads % kLanes || shared > (227 << 10)) {
    s.error = "a launch of " + std::to_string(threads) + " threads and " + std::to_string(shared) + " bytes";
    return kFailed;
  }
  const size_t page = size_t(sysconf(_SC_PAGESIZE)), pages = (shared + page - 1) / page * page;
  char *memory = (char *)mmap(nullptr, pages + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  s.stacks = (char *)mmap(nullptr, kStack * threads, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || s.stacks == MAP_FAILED) {
    s.error = "no memory";
    return kFailed;
  }
  mprotect(memory + pages, page, PROT_NONE);
  // Kernels may align what they hold to 16 bytes: the end is one such place.
  s.shared = memory + (pages - (shared + 15) / 16 * 16);
  s.kernel = &kernel;
  s.count = threads;
  s.size[0] = x, s.size[1] = y;
  s.fibers = std::vector<Fiber>(threads);
  s.warps = std::vector<Meeting>((threads + kLanes - 1) / kLanes);
  s.groups = std::vector<Meeting>((threads + kGroup - 1) / kGroup);
  for (s.id[1] = 0; s.id[1] < y && !s.failed; ++s.id[1])
    for (s.id[0] = 0; s.id[0] < x && !s.failed; ++s.id[0]) {
      memset(s.shared, 0xff, shared);
      if (!run_block()) break;
    }
  munmap(memory, pages + page);
  munmap(s.stacks, kStack * threads);
  return s.failed ? kFailed : 0;
}

const char *error() { return state.error.c_str(); }
void schedule(uint64_t seed) {
  state.seed = seed;
  state.draws = 0;
}

}  // namespace sne::emulator
