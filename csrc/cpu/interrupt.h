// Interrupts: long calls ask Python about signals between tiles, and stop where a handler raises.
#pragma once

#include <stdint.h>

#include <atomic>

#include "sne_fast/cpu_abi.h"

namespace sne {

// One per call of an exported function. With hooks (sne_fast_cpu_set_hooks) it releases Python's lock while it lives.
class Interrupt {
 public:
  Interrupt();
  ~Interrupt();
  Interrupt(const Interrupt &) = delete;
  Interrupt &operator=(const Interrupt &) = delete;
  // Called by every thread between tiles: returns whether the call should end. Only the thread that made the call asks
  // Python, at most every 50 ms.
  bool stop() {
    if (stopped_.load(std::memory_order_relaxed)) return true;
    return enabled_ && ask();
  }
  bool stopped() const { return stopped_.load(std::memory_order_relaxed); }
  // Status of a call whose loops are over.
  int status(bool failed) const { return failed ? SNE_FAST_NO_MEMORY : stopped() ? SNE_FAST_INTERRUPTED : SNE_FAST_OK; }

 private:
  bool ask();
  std::atomic<bool> stopped_{false};
  bool enabled_;
  sne_fast_cpu_hooks hooks_;
  void *lock_ = nullptr;
  int64_t next_ = 0;  // nanoseconds
};

}  // namespace sne
