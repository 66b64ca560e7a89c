// Owns: device memory with guard pages, the images of __shared__ variables, and the subset of the CUDA runtime API that
// tests need, under NVIDIA's prototypes.
// Must not know: scheduling, races.
#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <map>

#include "state.h"

namespace cuda_sim {
namespace {

// All bytes set is NaN in every floating type, so that what was never written shows in the result.
constexpr int kPoison = 0xFF;

std::map<char*, size_t> allocations;
std::vector<char> host_plain_shared;
Block* plain_shared_owner;
thread_local char
    in_plain_shared;  // lies in the same block of thread-local storage as the kernels' __shared__ variables

char* page_of(const void* address) {
  return reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(address) & ~uintptr_t{kPage - 1});
}
size_t rounded(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

bool in_allocation(const void* address, size_t bytes) {
  auto after = allocations.upper_bound(static_cast<char*>(const_cast<void*>(address)));
  if (after == allocations.begin()) return false;
  const auto& [start, size] = *std::prev(after);
  return static_cast<const char*>(address) + bytes <= start + size;
}

}  // namespace

// An allocation ends at a guard page (up to alignment to 16 bytes) and is never used again.
char* arena_allocate(size_t bytes) {
  initialise();
  const size_t body = rounded(std::max<size_t>(bytes, 1), kPage);
  if (!g.arena) {
    g.arena =
        static_cast<char*>(mmap(nullptr, g.arena_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  }
  if (g.arena_used + body + 2 * kPage > g.arena_bytes) return nullptr;
  char* page = g.arena + g.arena_used + kPage;
  g.arena_used += body + kPage;
  mprotect(page, body, PROT_READ | PROT_WRITE);
  memset(page, kPoison, body);
  char* address = page + body - rounded(bytes, 16);
  allocations[address] = bytes;
  mark_allocated(address, bytes);
  return address;
}

bool arena_free(char* address) {
  const auto found = allocations.find(address);
  if (found == allocations.end()) return false;
  const size_t bytes = found->second;
  char *first = page_of(address), *end = address + rounded(bytes, 16);
  const auto poisoned = [](char byte) { return static_cast<unsigned char>(byte) == kPoison; };
  if (!std::all_of(first, address, poisoned) || !std::all_of(address + bytes, end, poisoned)) {
    record_failure(cudaErrorIllegalAddress, "the canary around a device allocation was overwritten");
  }
  mark_freed(address, bytes);
  if (end > first) {
    madvise(first, end - first, MADV_DONTNEED);
    mprotect(first, end - first, PROT_NONE);
  }
  allocations.erase(found);
  return true;
}

std::string describe(const void* where) {
  char* address = static_cast<char*>(const_cast<void*>(where));
  char text[160];
  const auto after = allocations.upper_bound(address);
  if (after != allocations.begin()) {
    const auto& [start, bytes] = *std::prev(after);
    if (address < start + bytes + kPage) {
      snprintf(text, sizeof text, "%p = offset %td of an allocation of %zu bytes", where, address - start, bytes);
      return text;
    }
  }
  if (after != allocations.end() && after->first - address < static_cast<ptrdiff_t>(2 * kPage)) {
    snprintf(text, sizeof text, "%p = %td bytes before an allocation of %zu bytes", where, after->first - address,
             after->second);
    return text;
  }
  snprintf(text, sizeof text, "%p (no live device allocation near)", where);
  return text;
}

cudaError_t host_access(const void* address, size_t bytes, bool write) {
  const bool known = in_allocation(address, bytes);
  if (!known || (!write && !is_initialised(address, bytes))) {
    record_failure(cudaErrorIllegalAddress, std::string("the host ") + (write ? "writes" : "reads") +
                                                (known ? " uninitialised memory: " : " outside an allocation: ") +
                                                describe(address));
    return cudaErrorIllegalAddress;
  }
  if (write) mark_initialised(address, bytes, true);
  return cudaSuccess;
}

// ------------------------------------------------------------------------------------------------ shared memory
void find_plain_shared() {
  *const_cast<volatile char*>(&in_plain_shared) = 0;  // a library's thread-local storage exists from the first use on
  const auto visit = [](dl_phdr_info* image, size_t, void*) {
    for (int i = 0; i < image->dlpi_phnum; ++i) {
      if (image->dlpi_phdr[i].p_type != PT_TLS || !image->dlpi_tls_data) continue;
      char* start = static_cast<char*>(image->dlpi_tls_data);
      const size_t bytes = image->dlpi_phdr[i].p_memsz;
      if (&in_plain_shared >= start && &in_plain_shared < start + bytes && bytes > 16) {
        g.plain_shared = start;
        g.plain_shared_bytes = bytes;
      }
    }
    return 0;
  };
  dl_iterate_phdr(visit, nullptr);
  host_plain_shared.resize(g.plain_shared_bytes);
}

void switch_plain_shared(Block* block) {
  if (!g.plain_shared_bytes || plain_shared_owner == block) return;
  memcpy(plain_shared_owner ? plain_shared_owner->plain_shared : host_plain_shared.data(), g.plain_shared,
         g.plain_shared_bytes);
  memcpy(g.plain_shared, block ? block->plain_shared : host_plain_shared.data(), g.plain_shared_bytes);
  plain_shared_owner = block;
}

void protect_shared(Block* block, bool accessible) {
  if (!block->dynamic_shared) return;
  char* first = page_of(block->dynamic_shared);
  const size_t bytes = rounded(block->dynamic_shared + block->dynamic_shared_bytes - first, kPage);
  mprotect(first, bytes, accessible ? PROT_READ | PROT_WRITE : PROT_NONE);
}

void* dynamic_shared() {
  if (!g.current->block->dynamic_shared) {
    fail(cudaErrorLaunchFailure, "dynamic shared memory is used, and none was asked for at the launch");
  }
  return g.current->block->dynamic_shared;
}

namespace {
char* shared_array(Block* block, const void* tag, size_t bytes) {
  for (const Block::Array& array : block->arrays) {
    if (array.tag == tag) return array.data;
  }
  char* data = arena_allocate(bytes);
  block->arrays.push_back({tag, data, bytes});
  return data;
}
}  // namespace

void* static_shared(const void* tag, size_t bytes) { return shared_array(g.current->block, tag, bytes); }

void* map_rank(const void* where, unsigned rank) {
  Block* block = g.current->block;
  const auto& blocks = block->cluster->blocks;
  const char* address = static_cast<const char*>(where);
  if (rank >= blocks.size()) {
    fail(cudaErrorLaunchFailure, "map_shared_rank: rank %u of %zu", rank, blocks.size());
  }
  Block* other = blocks[rank].get();
  if (!other->alive) fail(cudaErrorLaunchFailure, "map_shared_rank: the block of rank %u has exited", rank);
  // One past the end is an address too.
  const auto offset_in = [&](const char* start, size_t bytes) -> ptrdiff_t {
    return start && address >= start && address <= start + bytes ? address - start : -1;
  };
  if (const ptrdiff_t offset = offset_in(block->dynamic_shared, block->dynamic_shared_bytes); offset >= 0) {
    return other->dynamic_shared + offset;
  }
  for (const Block::Array& array : block->arrays) {
    const ptrdiff_t offset = offset_in(array.data, array.bytes);
    if (offset >= 0) return shared_array(other, array.tag, array.bytes) + offset;
  }
  if (const ptrdiff_t offset = offset_in(g.plain_shared, g.plain_shared_bytes); offset >= 0) {
    return other == block ? const_cast<void*>(where) : other->plain_shared + offset;
  }
  fail(cudaErrorLaunchFailure, "map_shared_rank: %p is not an address in this block's shared memory", where);
}

unsigned cluster_rank() { return g.current->block->rank; }
unsigned cluster_size() { return g.current->block->cluster->blocks.size(); }
unsigned block_linear() { return g.current->block->grid_index; }
unsigned thread_linear() { return g.current->block_index; }
unsigned lane_index() { return g.current->lane; }

}  // namespace cuda_sim

// ------------------------------------------------------------------------------------------------ the runtime API
using namespace cuda_sim;

extern "C" {

cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  *pointer = arena_allocate(bytes);
  return *pointer ? cudaSuccess : cudaErrorMemoryAllocation;
}

cudaError_t cudaFree(void* pointer) {
  return !pointer || arena_free(static_cast<char*>(pointer)) ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  const bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
  const bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
  if ((to_device && !in_allocation(to, bytes)) || (from_device && !in_allocation(from, bytes))) {
    fprintf(stderr, "[cuda_sim] cudaMemcpy outside a device allocation\n");
    return cudaErrorInvalidValue;
  }
  memcpy(to, from, bytes);
  if (to_device) mark_initialised(to, bytes, kind == cudaMemcpyHostToDevice || is_initialised(from, bytes));
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
  return cudaMemcpy(to, from, bytes, kind);
}

cudaError_t cudaMemset(void* address, int value, size_t bytes) {
  if (!in_allocation(address, bytes)) return cudaErrorInvalidValue;
  memset(address, value, bytes);
  mark_initialised(address, bytes, true);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t) {
  return cudaMemset(address, value, bytes);
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = kMultiprocessors;
      return cudaSuccess;
    case cudaDevAttrClusterLaunch:
      *value = 1;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = 232448;
      return cudaSuccess;
    default:
      return cudaErrorInvalidValue;
  }
}

// Every launch has run to its end, and reported its error, when it returns.
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }

const char* cudaGetErrorString(cudaError_t error) {
  static char text[32];
  snprintf(text, sizeof text, "CUDA error %d", static_cast<int>(error));
  return text;
}

}  // extern "C"
