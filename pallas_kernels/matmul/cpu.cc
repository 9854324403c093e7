// x [t, i] times the transpose of w [o, i], both bfloat16, summed in float32 and returned as float32 or rounded to bfloat16.
//
// XLA's own product on CPU repacks w on every call, which for few rows of x takes longer than reading it. Here a tile
// keeps the dot products of a few rows of w with a few rows of x in registers, each as 16 partial sums, and walks along i
// once: nothing is packed. Rows of w are handed out in chunks; threads of XLA's pool take the next one when they are free.
// A gated product keeps the sums of both halves of w in the cache and returns silu(gate) * up.

#include <vector>

#include "native.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kRows = 4;         // rows of w in a tile
constexpr int64_t kTokens = 6;       // most rows of x in a tile: 4 x 6 sums, 6 of x and 1 of w fit the 32 registers
constexpr int64_t kLanes = 32;       // bfloat16 values in a register
constexpr int64_t kChunk = 64;       // rows of w that a thread takes at a time
constexpr int64_t kBlock = 128 << 10;  // values of x in a block: 256 KB, which leave room in a second-level cache
constexpr int64_t kPrefetch = 4096;  // values ahead in a dot product; the hardware fetches no further than a page

template <typename Out>
struct Product {
  const uint16_t* x;  // [num_tokens, size]
  const uint16_t* w;  // [row, size]
  Out* out;           // [num_tokens, row], `stride` apart; float, or bfloat16 as uint16_t
  int64_t num_tokens, stride, size;
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

// W rows of w with X of x. Meanwhile P rows at `ahead` are fetched into the cache.
template <int64_t W, int64_t X, int64_t P, typename Out>
void Tile(const Product<Out>& p, int64_t row, int64_t token, const uint16_t* ahead) {
  __m512 sums[W][X];
#pragma GCC unroll 8
  for (int64_t i = 0; i < W; ++i)
#pragma GCC unroll 8
    for (int64_t j = 0; j < X; ++j) sums[i][j] = _mm512_setzero_ps();
  const uint16_t* w = p.w + row * p.size;
  const uint16_t* x = p.x + token * p.size;
  const int64_t tail = p.size % kLanes, whole = p.size - tail;
  for (int64_t k = 0; k < whole; k += kLanes) {
#pragma GCC unroll 4
    for (int64_t i = 0; i < P; ++i) _mm_prefetch(reinterpret_cast<const char*>(ahead + i * p.size + k), _MM_HINT_T0);
    Step(sums, w + k, x + k, p.size, [](const uint16_t* a) { return _mm512_loadu_si512(a); });
  }
  if (tail) {
    const __mmask32 mask = (__mmask32{1} << tail) - 1;
    Step(sums, w + whole, x + whole, p.size, [mask](const uint16_t* a) { return _mm512_maskz_loadu_epi16(mask, a); });
  }
  Out* out = p.out + token * p.stride + row;
#pragma GCC unroll 8
  for (int64_t j = 0; j < X; ++j) {
    if constexpr (W == kRows) {
      Store(out + j * p.stride, Totals(sums[0][j], sums[1][j], sums[2][j], sums[3][j]));
    } else {
      StoreOne(out + j * p.stride, _mm512_reduce_add_ps(sums[0][j]));
    }
  }
}

// Rows [token, end) of x, at most kTokens.
template <int64_t W, int64_t P, typename Out>
void TileOf(const Product<Out>& p, int64_t row, int64_t token, int64_t end, const uint16_t* ahead) {
  switch (end - token) {
    case 6: return Tile<W, 6, P>(p, row, token, ahead);
    case 5: return Tile<W, 5, P>(p, row, token, ahead);
    case 4: return Tile<W, 4, P>(p, row, token, ahead);
    case 3: return Tile<W, 3, P>(p, row, token, ahead);
    case 2: return Tile<W, 2, P>(p, row, token, ahead);
    case 1: return Tile<W, 1, P>(p, row, token, ahead);
  }
}

// W rows of w with all rows of x, in tiles as even as possible. The tiles share the fetching of the next rows of
// w, so that memory is asked evenly: fetched by the first tile alone, 32 rows of x take 10 % longer.
template <int64_t W, typename Out>
void Tiles(const Product<Out>& p, int64_t row) {
  const int64_t n = (p.num_tokens + kTokens - 1) / kTokens;
  const uint16_t* ahead = p.w + (row + W) * p.size;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t begin = p.num_tokens * i / n, end = p.num_tokens * (i + 1) / n;
    if (W < kRows) TileOf<W, 0>(p, row, begin, end, ahead);
    else if (n == 1) TileOf<W, 4>(p, row, begin, end, ahead);
    else if (n < 4 && i < 2) TileOf<W, 2>(p, row, begin, end, ahead + 2 * i * p.size);
    else if (n >= 4 && i < 4) TileOf<W, 1>(p, row, begin, end, ahead + i * p.size);
    else TileOf<W, 0>(p, row, begin, end, ahead);
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

// Rows [begin, end) of w with all rows of x.
template <typename Out>
void Rows(const Product<Out>& p, int64_t begin, int64_t end) {
  int64_t row = begin;
  if (p.num_tokens == 1) {
    for (; row < end; ++row) Dot(p, row);
  }
  for (; row + kRows <= end; row += kRows) Tiles<kRows>(p, row);
  for (; row < end; ++row) Tiles<1>(p, row);
}

// How many rows of x of a size stay in the cache.
int64_t TokensInBlock(int64_t size) { return std::max<int64_t>(kBlock / size / kTokens, 1) * kTokens; }

template <typename Out, ffi::DataType kOut>
ffi::Error Run(ffi::ThreadPool pool, ffi::Buffer<ffi::BF16> x, ffi::Buffer<ffi::BF16> w, ffi::ResultBuffer<kOut> out) {
  const auto* x_data = static_cast<const uint16_t*>(x.untyped_data());
  const auto* w_data = static_cast<const uint16_t*>(w.untyped_data());
  auto* out_data = static_cast<Out*>(out->untyped_data());
  const int64_t num_tokens = x.dimensions()[0], size = x.dimensions()[1], width = w.dimensions()[0];
  native::ForEach(pool, width, kChunk, [=](int64_t begin, int64_t end) {
    const int64_t block = TokensInBlock(size);
    for (int64_t first = 0; first < num_tokens; first += block) {
      Rows(Product<Out>{.x = x_data + first * size,
                        .w = w_data,
                        .out = out_data + first * width,
                        .num_tokens = std::min(block, num_tokens - first),
                        .stride = width,
                        .size = size},
           begin, end);
    }
  });
  return ffi::Error::Success();
}

// silu(gate) * up of columns [begin, end) of `out`, from sums of the chunk: [token, gate | up], kChunk / 2 each.
void Gate(const float* sums, uint16_t* out, int64_t num_tokens, int64_t stride, int64_t begin, int64_t end) {
  for (int64_t token = 0; token < num_tokens; ++token) {
    for (int64_t column = begin; column < end; column += 16) {
      const float* at = sums + token * kChunk + column - begin;
      const __m512 gate = _mm512_loadu_ps(at), up = _mm512_loadu_ps(at + kChunk / 2);
      const __m512 power = native::PowerOfTwo(_mm512_mul_ps(gate, _mm512_set1_ps(-1.44269504f)));
      const __m512 silu = _mm512_div_ps(gate, _mm512_add_ps(power, _mm512_set1_ps(1)));
      const __mmask16 mask = end - column >= 16 ? 0xffff : (1u << (end - column)) - 1;
      _mm256_mask_storeu_epi16(out + token * stride + column, mask, (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(silu, up)));
    }
  }
}

ffi::Error RunGated(ffi::ThreadPool pool, ffi::Buffer<ffi::BF16> x, ffi::Buffer<ffi::BF16> w,
                    ffi::ResultBuffer<ffi::BF16> out) {
  const auto* x_data = reinterpret_cast<const uint16_t*>(x.typed_data());
  const auto* w_data = reinterpret_cast<const uint16_t*>(w.typed_data());
  auto* out_data = reinterpret_cast<uint16_t*>(out->typed_data());
  const int64_t num_tokens = x.dimensions()[0], size = x.dimensions()[1], width = out->dimensions()[1];
  native::ForEach(pool, width, kChunk / 2, [=](int64_t begin, int64_t end) {
    static thread_local std::vector<float> sums;
    const int64_t block = TokensInBlock(size);
    sums.resize(std::max<size_t>(sums.size(), block * kChunk));
    for (int64_t first = 0; first < num_tokens; first += block) {
      const int64_t last = std::min(first + block, num_tokens);
      for (int64_t half = 0; half < 2; ++half) {
        const Product<float> p = {.x = x_data + first * size,
                                  .w = w_data + (half * width + begin) * size,
                                  .out = sums.data() + half * kChunk / 2,
                                  .num_tokens = last - first,
                                  .stride = kChunk,
                                  .size = size};
        Rows(p, 0, end - begin);
      }
      Gate(sums.data(), out_data + first * width, last - first, width, begin, end);
    }
  });
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
XLA_FFI_DEFINE_HANDLER_SYMBOL(GatedMatmul, RunGated, Binding<ffi::BF16>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(MatmulToBFloat16, (Run<uint16_t, ffi::BF16>), Binding<ffi::BF16>());
