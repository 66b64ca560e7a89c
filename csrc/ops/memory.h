// Owns: the host's memory of a call: the workspace that a thread keeps, large pages for large results.
// Must not know: what lies in it.
#pragma once

#include <c10/core/impl/alloc_cpu.h>

#include <cstddef>
#include <cstdint>
#include <memory>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace rnnfast::ops {

// Smaller pieces malloc has at hand mostly; larger ones it maps anew each time.
constexpr size_t kMapped = 32 << 20;

// Newly mapped memory takes a fault for each page that is written first, and those of small pages take a layer of many
// rows as long as some of its products. Asks for large ones; nothing but speed depends on the answer.
inline void prefer_large_pages([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#if defined(MADV_HUGEPAGE)
  if (bytes < kMapped) return;
  static const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory), end = begin + bytes;
  const uintptr_t first = (begin + page - 1) / page * page, last = end / page * page;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// New memory at every call can cost more than the call. So a thread keeps a workspace from call to call, as large as it
// has needed so far; the work in a larger one outweighs that.
class Workspace {
 public:
  explicit Workspace(size_t bytes) {
    if (bytes > kMapped) {
      passing_.reset(c10::alloc_cpu(bytes));
    } else if (bytes > kept_bytes_) {
      kept_bytes_ = 0;
      kept_.reset();
      kept_.reset(c10::alloc_cpu(bytes));
      kept_bytes_ = bytes;
    }
  }
  void* data() { return passing_ ? passing_.get() : kept_.get(); }  // the allocator aligns to 64, too

 private:
  struct Free {
    void operator()(void* memory) const { c10::free_cpu(memory); }
  };
  using Memory = std::unique_ptr<void, Free>;
  static inline thread_local Memory kept_;
  static inline thread_local size_t kept_bytes_ = 0;
  Memory passing_;
};

}  // namespace rnnfast::ops
