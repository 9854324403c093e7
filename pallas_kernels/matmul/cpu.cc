// x [t, i] times the transpose of w [o, i], both bfloat16, summed in float32 and returned as float32 or rounded to bfloat16.
//
// XLA's own product on CPU repacks w on every call, which for few rows of x takes longer than reading it. Here a tile
// keeps the dot products of a few rows of w with a few rows of x in registers, each as 16 partial sums, and walks along i
// once: nothing is packed. Rows of w are handed out in chunks; threads of XLA's pool take the next one when they are free.

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kRows = 4;         // rows of w in a tile
constexpr int64_t kTokens = 6;       // most rows of x in a tile: 4 x 6 sums, 6 of x and 1 of w fit the 32 registers
constexpr int64_t kLanes = 32;       // bfloat16 values in a register
constexpr int64_t kChunk = 64;       // rows of w that a thread takes at a time
constexpr int64_t kPrefetch = 4096;  // values ahead; what the hardware fetches by itself ends at the next page

template <typename Out>
struct Product {
  const uint16_t* x;  // [num_tokens, size]
  const uint16_t* w;  // [num_rows, size]
  Out* out;           // [num_tokens, num_rows]; float, or bfloat16 as uint16_t
  int64_t num_tokens, num_rows, size;
  std::atomic<int64_t> next_row{0};
  std::atomic<int64_t> num_done{0};
};

// Adds the products of the next values of W rows of w and X rows of x.
template <int64_t W, int64_t X, typename Load>
[[gnu::always_inline]] inline void Step(__m512 (&sums)[W][X], const uint16_t* w, const uint16_t* x, int64_t size,
                                        Load load) {
  __m512bh xs[X];
#pragma GCC unroll 8
  for (int64_t j = 0; j < X; ++j) xs[j] = (__m512bh)load(x + j * size);
#pragma GCC unroll 8
  for (int64_t i = 0; i < W; ++i) {
    _mm_prefetch(reinterpret_cast<const char*>(w + i * size + kPrefetch), _MM_HINT_T0);
    const __m512bh wi = (__m512bh)load(w + i * size);
#pragma GCC unroll 8
    for (int64_t j = 0; j < X; ++j) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], wi, xs[j]);
  }
}

// The totals of four registers, in order.
inline __m128 Totals(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 abcd = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

inline void Store(float* out, __m128 four) { _mm_storeu_ps(out, four); }
inline void Store(uint16_t* out, __m128 four) { _mm_storel_epi64((__m128i*)out, (__m128i)_mm_cvtneps_pbh(four)); }
inline void StoreOne(float* out, float one) { *out = one; }
inline void StoreOne(uint16_t* out, float one) {
  *out = _mm_extract_epi16((__m128i)_mm_cvtneps_pbh(_mm_set_ss(one)), 0);
}

template <int64_t W, int64_t X, typename Out>
void Tile(const Product<Out>& p, int64_t row, int64_t token) {
  __m512 sums[W][X];
#pragma GCC unroll 8
  for (int64_t i = 0; i < W; ++i)
#pragma GCC unroll 8
    for (int64_t j = 0; j < X; ++j) sums[i][j] = _mm512_setzero_ps();
  const uint16_t* w = p.w + row * p.size;
  const uint16_t* x = p.x + token * p.size;
  const int64_t tail = p.size % kLanes, whole = p.size - tail;
  for (int64_t k = 0; k < whole; k += kLanes)
    Step(sums, w + k, x + k, p.size, [](const uint16_t* a) { return _mm512_loadu_si512(a); });
  if (tail) {
    const __mmask32 mask = (__mmask32{1} << tail) - 1;
    Step(sums, w + whole, x + whole, p.size, [mask](const uint16_t* a) { return _mm512_maskz_loadu_epi16(mask, a); });
  }
  Out* out = p.out + token * p.num_rows + row;
#pragma GCC unroll 8
  for (int64_t j = 0; j < X; ++j) {
    if constexpr (W == kRows) {
      Store(out + j * p.num_rows, Totals(sums[0][j], sums[1][j], sums[2][j], sums[3][j]));
    } else {
      StoreOne(out + j * p.num_rows, _mm512_reduce_add_ps(sums[0][j]));
    }
  }
}

template <int64_t W, typename Out>
void TilesOfRows(const Product<Out>& p, int64_t row) {
  int64_t token = 0;
  for (; token + kTokens <= p.num_tokens; token += kTokens) Tile<W, kTokens>(p, row, token);
  switch (p.num_tokens - token) {
    case 5: return Tile<W, 5>(p, row, token);
    case 4: return Tile<W, 4>(p, row, token);
    case 3: return Tile<W, 3>(p, row, token);
    case 2: return Tile<W, 2>(p, row, token);
    case 1: return Tile<W, 1>(p, row, token);
  }
}

// One row of x with one row of w. For a single row of x this beats a tile, because w is then read as one stream.
template <typename Out>
void Dot(const Product<Out>& p, int64_t row) {
  constexpr int64_t kSums = 4;
  __m512 sums[kSums];
  for (__m512& sum : sums) sum = _mm512_setzero_ps();
  const uint16_t* w = p.w + row * p.size;
  int64_t k = 0;
  for (; k + kSums * kLanes <= p.size; k += kSums * kLanes) {
#pragma GCC unroll 8
    for (int64_t j = 0; j < kSums; ++j) {
      const uint16_t* wj = w + k + j * kLanes;
      _mm_prefetch(reinterpret_cast<const char*>(wj + kPrefetch), _MM_HINT_T0);
      sums[j] = _mm512_dpbf16_ps(sums[j], (__m512bh)_mm512_loadu_si512(wj),
                                 (__m512bh)_mm512_loadu_si512(p.x + k + j * kLanes));
    }
  }
  for (; k < p.size; k += kLanes) {
    const __mmask32 mask = p.size - k >= kLanes ? ~__mmask32{0} : (__mmask32{1} << (p.size - k)) - 1;
    sums[0] = _mm512_dpbf16_ps(sums[0], (__m512bh)_mm512_maskz_loadu_epi16(mask, w + k),
                               (__m512bh)_mm512_maskz_loadu_epi16(mask, p.x + k));
  }
  const __m512 total = _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3]));
  StoreOne(p.out + row, _mm512_reduce_add_ps(total));
}

template <typename Out>
void Work(Product<Out>& p) {
  for (;;) {
    const int64_t begin = p.next_row.fetch_add(kChunk);
    if (begin >= p.num_rows) return;
    const int64_t end = std::min(begin + kChunk, p.num_rows);
    int64_t row = begin;
    if (p.num_tokens == 1) {
      for (; row < end; ++row) Dot(p, row);
    }
    for (; row + kRows <= end; row += kRows) TilesOfRows<kRows>(p, row);
    for (; row < end; ++row) TilesOfRows<1>(p, row);
    if (p.num_done.fetch_add(end - begin) + end - begin == p.num_rows) p.num_done.notify_all();
  }
}

template <typename Out, ffi::DataType kOut>
ffi::Error Run(ffi::ThreadPool pool, ffi::Buffer<ffi::BF16> x, ffi::Buffer<ffi::BF16> w, ffi::ResultBuffer<kOut> out) {
  // Shared: a helper may wake up after this call has returned. It finds no row left then, and touches no buffer.
  auto p = std::make_shared<Product<Out>>();
  p->x = static_cast<const uint16_t*>(x.untyped_data());
  p->w = static_cast<const uint16_t*>(w.untyped_data());
  p->out = static_cast<Out*>(out->untyped_data());
  p->num_tokens = x.dimensions()[0];
  p->num_rows = w.dimensions()[0];
  p->size = w.dimensions()[1];
  const int64_t num_helpers = std::min(pool.num_threads(), (p->num_rows + kChunk - 1) / kChunk) - 1;
  for (int64_t i = 0; i < num_helpers; ++i) pool.Schedule([p] { Work(*p); });
  Work(*p);
  for (int64_t done; (done = p->num_done.load()) < p->num_rows;) p->num_done.wait(done);
  return ffi::Error::Success();
}

template <ffi::DataType kOut>
auto Binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<ffi::Buffer<ffi::BF16>>()
      .Arg<ffi::Buffer<ffi::BF16>>()
      .template Ret<ffi::Buffer<kOut>>();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(MatmulToFloat32, (Run<float, ffi::F32>), Binding<ffi::F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(MatmulToBFloat16, (Run<uint16_t, ffi::BF16>), Binding<ffi::BF16>());

// Whether this processor has the instructions that the file is compiled for.
extern "C" bool IsSupported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bf16");
}
