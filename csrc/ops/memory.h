// Owns: the host's memory of a call: the workspace that a thread keeps, large pages for what comes anew.
// Must not know: what lies in it.
#pragma once

#include <c10/core/impl/alloc_cpu.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <memory>

namespace rnnfast::ops {

// Memory that comes anew from the system is mapped as it is first written, one fault a page, and for a layer of many
// rows the faults of small pages take as long as some of its products. Asks for large ones; nothing but speed depends
// on the answer.
inline void prefer_large_pages([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr size_t kLeast = 4 << 20;  // the allocator has smaller pieces at hand mostly
  if (bytes < kLeast) return;
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
    constexpr size_t kMostKept = 32 << 20;
    if (bytes > kMostKept) {
      passing_ = allocate(bytes);
    } else if (bytes > kept_bytes_) {
      kept_bytes_ = 0;
      kept_.reset();
      kept_ = allocate(bytes);
      kept_bytes_ = bytes;
    }
  }
  void* data() { return passing_ ? passing_.get() : kept_.get(); }  // the allocator aligns to 64, too

 private:
  struct Free {
    void operator()(void* memory) const { c10::free_cpu(memory); }
  };
  using Memory = std::unique_ptr<void, Free>;
  static Memory allocate(size_t bytes) {
    Memory memory(c10::alloc_cpu(bytes));
    prefer_large_pages(memory.get(), bytes);
    return memory;
  }
  static inline thread_local Memory kept_;
  static inline thread_local size_t kept_bytes_ = 0;
  Memory passing_;
};

}  // namespace rnnfast::ops
