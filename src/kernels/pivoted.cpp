#include "pivoted_impl.hpp"

#include <stdlib.h>
#include <string.h>

namespace spcache {

void PivotedWorkspace::Free::operator()(void* p) const { free(p); }

void* PivotedWorkspace::allocate(int64_t bytes) {
  bytes = (bytes + 63) / 64 * 64 + 64;
  void* p = aligned_alloc(64, size_t(bytes));
  if (!p) throw std::bad_alloc();
  memory.emplace_back(p);
  nbytes += bytes;
  return p;
}

void* PivotedWorkspace::buffer(Use use, int64_t bytes) {
  if (bytes > sizes[use]) {
    buffers[use].reset();
    nbytes -= sizes[use];
    sizes[use] = 0;
    allocate(bytes);
    buffers[use] = std::move(memory.back());
    memory.pop_back();
    sizes[use] = (bytes + 63) / 64 * 64 + 64;
  }
  return buffers[use].get();
}

int64_t pivoted_solve(const PivotedFactors& factors, const void* b, void* x, int64_t count, int64_t stride, int64_t width,
                  const int64_t* select, bool adjoint, const Schedule& schedule, PivotedWorkspace* const* work, int workspaces,
                  int threads) {
  std::atomic<int64_t> most{0};
  std::atomic<bool> good{true};
  share_or_throw(count, workspaces, [&](int64_t p, int thread) {
    const int64_t f = select ? select[p] : factors.failed.size() == 1 ? 0 : p;
    char* to = static_cast<char*>(x) + p * stride;
    if (factors.failed[f] >= 0) {
      memset(to, 0xff, size_t(stride));  // a NaN in every scalar type
      return;
    }
    int64_t steps = factors.solve(f, static_cast<const char*>(b) + p * stride, to, width, adjoint, schedule, *work[thread],
                                  workspaces > 1 ? 1 : threads);
    if (steps < 0) good = false, steps = ~steps;
    for (int64_t seen = most; seen < steps && !most.compare_exchange_weak(seen, steps);) {}
  });
  return good ? int64_t(most) : ~int64_t(most);
}

void magnitudes(const Assembly& assembly, Dtype dtype, const void* values, int64_t slots, double* out) {
  auto run = [&](auto* typed) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
    std::vector<T> a(slots, T(0));
    assemble(assembly, 0, typed, a.data());
    for (int64_t e = 0; e < slots; e++) out[e] = double(part(a[e]));
  };
  switch (dtype) {
    case FLOAT32: return run(static_cast<const float*>(values));
    case FLOAT64: return run(static_cast<const double*>(values));
    case COMPLEX64: return run(static_cast<const Complex<float>*>(values));
    default: return run(static_cast<const Complex<double>*>(values));
  }
}

}  // namespace spcache
