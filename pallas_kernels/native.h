// What our C++ kernels for CPU share: the check of the processor, and a loop that XLA's threads work on together.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace native {

// Calls body(begin, end) until [begin, end) have covered [0, count) in pieces of `chunk`; returns when all are done.
// The calling thread and those of the pool take the next piece when they are free.
template <typename Body>
void ForEach(xla::ffi::ThreadPool pool, int64_t count, int64_t chunk, Body body) {
  struct Loop {
    Body body;
    int64_t count, chunk;
    std::atomic<int64_t> next{0}, num_done{0};

    Loop(Body body, int64_t count, int64_t chunk) : body(std::move(body)), count(count), chunk(chunk) {}

    void Work() {
      for (;;) {
        const int64_t begin = next.fetch_add(chunk);
        if (begin >= count) return;
        const int64_t end = std::min(begin + chunk, count);
        body(begin, end);
        if (num_done.fetch_add(end - begin) + end - begin == count) num_done.notify_all();
      }
    }
  };
  // Shared: a helper may wake up after this call has returned. It finds nothing left to do then, and touches no buffer.
  auto loop = std::make_shared<Loop>(std::move(body), count, chunk);
  const int64_t num_helpers = std::min(pool.num_threads(), (count + chunk - 1) / chunk) - 1;
  for (int64_t i = 0; i < num_helpers; ++i) pool.Schedule([loop] { loop->Work(); });
  loop->Work();
  for (int64_t done; (done = loop->num_done.load()) < count;) loop->num_done.wait(done);
}

// 2 to the power of x, also where that is infinite or zero. Relative error below 2e-7.
inline __m512 PowerOfTwo(__m512 x) {
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 part = _mm512_sub_ps(x, whole);
  __m512 sum = _mm512_set1_ps(1.5403530e-4f);
  for (const float next : {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f})
    sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(next));
  return _mm512_scalef_ps(sum, whole);
}

}  // namespace native

// Whether this processor has the instructions that the kernels are compiled for.
extern "C" bool IsSupported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bf16");
}
