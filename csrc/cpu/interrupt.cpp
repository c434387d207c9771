#include "cpu/interrupt.h"

#include <omp.h>
#include <time.h>

namespace sne {
namespace {

constexpr int64_t kPeriod = 50'000'000;
sne_fast_cpu_hooks registered = {};

int64_t now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return int64_t(t.tv_sec) * 1'000'000'000 + t.tv_nsec;
}

}  // namespace

Interrupt::Interrupt() : enabled_(registered.check != nullptr), hooks_(registered) {
  if (!enabled_) return;
  lock_ = hooks_.release();
  next_ = now() + kPeriod;
}

Interrupt::~Interrupt() {
  if (enabled_) hooks_.acquire(lock_);
}

bool Interrupt::ask() {
  if (omp_get_thread_num() != 0) return false;  // threads of one team ask through the flag
  const int64_t time = now();
  if (time < next_) return false;
  hooks_.acquire(lock_);
  const bool raised = hooks_.check() != 0;
  lock_ = hooks_.release();
  next_ = now() + kPeriod;
  if (raised) stopped_.store(true, std::memory_order_relaxed);
  return raised;
}

}  // namespace sne

extern "C" void sne_fast_cpu_set_hooks(const sne_fast_cpu_hooks *hooks) {
  sne::registered = hooks ? *hooks : sne_fast_cpu_hooks{};
}
