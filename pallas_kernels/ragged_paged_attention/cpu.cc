// Ragged paged attention for float32 and bfloat16. See op.py for what the arguments mean.
//
// The queries of a row are cut into tiles of consecutive tokens; all query heads of a KV head are in one tile. A tile
// reads its keys and values in chunks: they are packed once per chunk, and a few query rows at a time take scores, weights
// and weighted sums while all of it is in the nearest cache. Tiles are handed to threads one by one, the longest first.
//
// Both products are the same loop over *units* of 32 bits, one float32 or a pair of bfloat16: a unit of a row on the left
// is broadcast, and multiplied with the units of 16 columns on the right (with bfloat16, two products are added at once).

#include <array>
#include <cmath>
#include <cstring>
#include <vector>

#include "native.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kKeys = 128;       // keys in a chunk
constexpr int64_t kTileTokens = 64;  // most tokens in a tile,
constexpr int64_t kTileRows = 512;   // or about so many query rows
constexpr int64_t kRows = 6;         // rows in a product: 6 x 4 sums, 4 of the right and 1 of the left fit the registers
constexpr int64_t kLanes = 16;       // units in a register
constexpr int64_t kWidth = 4 * kLanes;
constexpr float kLog2E = 1.44269504f;
constexpr float kMasked = -1e30f;  // finite, so that exp(kMasked - kMasked) is a number

int64_t RoundUp(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

__mmask16 FirstLanes(int64_t count) { return count >= kLanes ? 0xffff : count <= 0 ? 0 : (1u << count) - 1; }

struct Float32 {
  using Value = float;
  static constexpr int64_t kPerUnit = 1;

  static __m512 MultiplyAdd(__m512 sum, int32_t left, __m512i right) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_set1_epi32(left)), _mm512_castsi512_ps(right), sum);
  }
  static void Store(float* out, __mmask16 mask, __m512 x) { _mm512_mask_storeu_ps(out, mask, x); }
  // The units of 2 x 16 columns; value pointers may be null, which counts as zeros.
  static void PackValues(__m512i* out, const float* const* value, __mmask16 low, __mmask16 high) {
    out[0] = value[0] ? _mm512_maskz_loadu_epi32(low, value[0]) : _mm512_setzero_si512();
    out[1] = value[0] ? _mm512_maskz_loadu_epi32(high, value[0] + kLanes) : _mm512_setzero_si512();
  }
};

struct BFloat16 {
  using Value = uint16_t;
  static constexpr int64_t kPerUnit = 2;

  static __m512 MultiplyAdd(__m512 sum, int32_t left, __m512i right) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(left), (__m512bh)right);
  }
  static void Store(uint16_t* out, __mmask16 mask, __m512 x) {
    _mm256_mask_storeu_epi16(out, mask, (__m256i)_mm512_cvtneps_pbh(x));
  }
  static void PackValues(__m512i* out, const uint16_t* const* value, __mmask16 low, __mmask16 high) {
    __m512i rows[2];
    const __mmask32 mask = low | static_cast<__mmask32>(high) << kLanes;
    for (int i = 0; i < 2; ++i)
      rows[i] = value[i] ? _mm512_maskz_loadu_epi16(mask, value[i]) : _mm512_setzero_si512();
    for (int half = 0; half < 2; ++half) {
      // Column c of the first row and of the second, side by side.
      const __m512i column = _mm512_cvtepu8_epi32(_mm_set_epi8(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
      const __m512i first = _mm512_add_epi32(column, _mm512_set1_epi32(half * kLanes));
      const __m512i both = _mm512_or_si512(first, _mm512_slli_epi32(_mm512_add_epi32(first, _mm512_set1_epi32(32)), 16));
      out[half] = _mm512_permutex2var_epi16(rows[0], both, rows[1]);
    }
  }
};

template <typename Kind>
struct Call {
  using Value = typename Kind::Value;
  const Value *q, *k, *v;           // [token, n, h], [token, num_kv_heads, h] twice
  Value* pages;                     // [page, kv head, slot, key | value of h]
  const int32_t *table, *q_start, *kv_len;
  Value* out;                       // [token, n, h]
  int64_t num_tokens, num_rows, table_width, num_kv_heads, group, page_size, head_size;
  const float* sinks;               // [n], or null
  float* lse;                       // [token, n], or null
  float scale, soft_cap;            // 0: no cap
  int64_t window;                   // 0: none

  int64_t num_units() const { return head_size / Kind::kPerUnit; }
  int64_t out_width() const { return RoundUp(head_size, kWidth); }
  // The key of a slot of a row's page; its value follows.
  Value* key_of(int64_t row, int64_t kv_head, int64_t page, int64_t slot) const {
    return pages + ((table[row * table_width + page] * num_kv_heads + kv_head) * page_size + slot) * 2 * head_size;
  }
};

// Consecutive tokens of one row.
struct Tile {
  int64_t row, token, num_tokens, position;  // of the first token, in q and in the row
  int64_t cost() const { return num_tokens * (position + num_tokens); }
};

// What a thread works with; kept between calls, and grown when needed.
struct Scratch {
  std::vector<int32_t> queries;               // [query row, unit]
  std::vector<int32_t> keys;                  // [unit, kKeys]
  std::vector<int32_t> values;                // [unit of keys, out_width]
  std::vector<float> sums;                    // [query row, out_width]
  std::vector<float> tops, totals;            // [query row]
  alignas(64) float scores[kRows * kKeys];
  alignas(64) int32_t weights[kRows * kKeys];  // [row, unit of keys]
};

// sums[i] += left[i] x right, for R rows on the left and 64 columns on the right.
template <typename Kind, int64_t R>
[[gnu::always_inline]] inline void MultiplyAdd(__m512 (&sums)[R][4], const int32_t* left, int64_t left_stride,
                                               const int32_t* right, int64_t right_stride, int64_t num_units) {
  for (int64_t u = 0; u < num_units; ++u) {
    __m512i columns[4];
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) columns[c] = _mm512_loadu_si512(right + u * right_stride + c * kLanes);
#pragma GCC unroll 8
    for (int64_t r = 0; r < R; ++r) {
      const int32_t unit = left[r * left_stride + u];
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) sums[r][c] = Kind::MultiplyAdd(sums[r][c], unit, columns[c]);
    }
  }
}

// Scores x become soft_cap * tanh(x * scale / soft_cap).
inline void Cap(float* scores, int64_t num_keys, float scale, float soft_cap) {
  const __m512 factor = _mm512_set1_ps(2 * kLog2E * scale / soft_cap), one = _mm512_set1_ps(1);
  for (int64_t key = 0; key < num_keys; key += kLanes) {
    const __m512 power = native::PowerOfTwo(_mm512_mul_ps(_mm512_load_ps(scores + key), factor));
    const __m512 tanh = _mm512_sub_ps(one, _mm512_div_ps(_mm512_set1_ps(2), _mm512_add_ps(power, one)));
    _mm512_store_ps(scores + key, _mm512_mul_ps(tanh, _mm512_set1_ps(soft_cap)));
  }
}

// Scores of one query with the keys [begin, end) of a chunk become weights; the others get none. Returns the factor by
// which earlier sums shrink.
template <typename Kind>
float Weigh(const float* scores, int32_t* weights, int64_t begin, int64_t end, int64_t num_keys, float scale, float* top,
            float* total) {
  const auto seen = [=](int64_t key) -> __mmask16 { return FirstLanes(end - key) & ~FirstLanes(begin - key); };
  __m512 highest = _mm512_set1_ps(kMasked);
  for (int64_t key = 0; key < num_keys; key += kLanes)
    highest = _mm512_mask_max_ps(highest, seen(key), highest, _mm512_load_ps(scores + key));
  const float before = *top;
  *top = std::max(before, _mm512_reduce_max_ps(highest) * scale);
  const __m512 shift = _mm512_set1_ps(-*top), factor = _mm512_set1_ps(scale);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t key = 0; key < num_keys; key += kLanes) {
    const __m512 weight = _mm512_maskz_mov_ps(
        seen(key), native::PowerOfTwo(_mm512_fmadd_ps(_mm512_load_ps(scores + key), factor, shift)));
    sum = _mm512_add_ps(sum, weight);
    Kind::Store(reinterpret_cast<typename Kind::Value*>(weights) + key, 0xffff, weight);
  }
  const float shrink = std::exp2(before - *top);
  *total = *total * shrink + _mm512_reduce_add_ps(sum);
  return shrink;
}

// Transposes 16 x 16 units.
inline void Transpose(__m512i (&m)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(m[i], m[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(m[i], m[i + 1]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 4) {
    m[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    m[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    m[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    m[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(m[i], m[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(m[i], m[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(m[i + 8], m[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(m[i + 8], m[i + 12], 0xdd);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    m[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    m[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

// Packs keys and values of a chunk. Keys that are not there (null) get values of zero; their scores are never looked at.
template <typename Kind>
void Pack(const Call<Kind>& call, const std::array<const typename Kind::Value*, kKeys>& key, int64_t num_keys, Scratch& s) {
  const int64_t num_units = call.num_units(), width = call.out_width();
  for (int64_t begin = 0; begin < num_keys; begin += kLanes) {
    for (int64_t u = 0; u < num_units; u += kLanes) {
      const __mmask16 mask = FirstLanes(num_units - u);
      __m512i m[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        m[i] = key[begin + i] ? _mm512_maskz_loadu_epi32(mask, key[begin + i] + u * Kind::kPerUnit) : _mm512_setzero_si512();
      Transpose(m);
      for (int64_t i = 0; i < std::min(kLanes, num_units - u); ++i)
        _mm512_storeu_si512(&s.keys[(u + i) * kKeys + begin], m[i]);
    }
  }
  for (int64_t unit = 0; unit * Kind::kPerUnit < num_keys; ++unit) {
    const typename Kind::Value* value[Kind::kPerUnit];
    for (int64_t i = 0; i < Kind::kPerUnit; ++i) {
      const auto* at = key[unit * Kind::kPerUnit + i];
      value[i] = at ? at + call.head_size : nullptr;
    }
    for (int64_t h = 0; h < call.head_size; h += 2 * kLanes) {
      __m512i two[2];
      Kind::PackValues(two, value, FirstLanes(call.head_size - h), FirstLanes(call.head_size - h - kLanes));
      for (int i = 0; i < 2; ++i) {
        _mm512_storeu_si512(&s.values[unit * width + h + i * kLanes], two[i]);
        for (auto& one : value) one = one ? one + kLanes : nullptr;
      }
    }
  }
}

// Query rows [row, row + R) of a tile with one packed chunk that begins at key `base` of the row.
template <typename Kind, int64_t R>
void Absorb(const Call<Kind>& call, const Tile& tile, int64_t row, int64_t base, Scratch& s) {
  const int64_t num_units = call.num_units(), width = call.out_width();
  const auto position = [&](int64_t r) { return tile.position + (row + r) / call.group; };
  const int64_t num_keys = std::min(kKeys, position(R - 1) + 1 - base);  // what the last row sees, which sees most
  if (num_keys <= 0) return;
  for (int64_t begin = 0; begin < num_keys; begin += kWidth) {
    __m512 sums[R][4] = {};
    MultiplyAdd<Kind, R>(sums, &s.queries[row * num_units], num_units, &s.keys[begin], kKeys, num_units);
#pragma GCC unroll 8
    for (int64_t r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) _mm512_store_ps(s.scores + r * kKeys + begin + c * kLanes, sums[r][c]);
  }
  float shrink[R];
  for (int64_t r = 0; r < R; ++r) {
    const int64_t end = position(r) + 1 - base, begin = call.window ? end - call.window : 0;
    float* scores = s.scores + r * kKeys;
    if (call.soft_cap > 0) Cap(scores, num_keys, call.scale, call.soft_cap);
    const float scale = kLog2E * (call.soft_cap > 0 ? 1 : call.scale);  // for weights that are powers of two
    shrink[r] = Weigh<Kind>(scores, s.weights + r * kKeys, begin, end, num_keys, scale, &s.tops[row + r],
                            &s.totals[row + r]);
  }
  for (int64_t h = 0; h < call.head_size; h += kWidth) {
    float* out = &s.sums[row * width + h];
    __m512 sums[R][4];
#pragma GCC unroll 8
    for (int64_t r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c)
        sums[r][c] = _mm512_mul_ps(_mm512_loadu_ps(out + r * width + c * kLanes), _mm512_set1_ps(shrink[r]));
    MultiplyAdd<Kind, R>(sums, s.weights, kKeys, &s.values[h], width, (num_keys + Kind::kPerUnit - 1) / Kind::kPerUnit);
#pragma GCC unroll 8
    for (int64_t r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) _mm512_storeu_ps(out + r * width + c * kLanes, sums[r][c]);
  }
}

template <typename Kind>
void Absorb(const Call<Kind>& call, const Tile& tile, int64_t num_rows, int64_t base, Scratch& s) {
  const int64_t num_parts = (num_rows + kRows - 1) / kRows;
  for (int64_t part = 0; part < num_parts; ++part) {  // as even as possible: few rows leave the processor waiting
    const int64_t begin = num_rows * part / num_parts, end = num_rows * (part + 1) / num_parts;
    switch (end - begin) {
      case 1: Absorb<Kind, 1>(call, tile, begin, base, s); break;
      case 2: Absorb<Kind, 2>(call, tile, begin, base, s); break;
      case 3: Absorb<Kind, 3>(call, tile, begin, base, s); break;
      case 4: Absorb<Kind, 4>(call, tile, begin, base, s); break;
      case 5: Absorb<Kind, 5>(call, tile, begin, base, s); break;
      case 6: Absorb<Kind, 6>(call, tile, begin, base, s); break;
    }
  }
}

template <typename T>
void Reserve(std::vector<T>& scratch, size_t size) {
  if (scratch.size() < size) scratch.resize(size);
}

// One tile with all its keys, for one KV head.
template <typename Kind>
void Attend(const Call<Kind>& call, const Tile& tile, int64_t kv_head) {
  using Value = typename Kind::Value;
  static thread_local Scratch s;
  const int64_t num_rows = tile.num_tokens * call.group, num_units = call.num_units(), width = call.out_width();
  Reserve(s.queries, num_rows * num_units);
  Reserve(s.keys, num_units * kKeys);
  Reserve(s.values, kKeys / Kind::kPerUnit * width);
  for (auto* empty : {&s.sums, &s.totals, &s.tops}) {
    const int64_t size = empty == &s.sums ? num_rows * width : num_rows;
    Reserve(*empty, size);
    std::fill_n(empty->begin(), size, empty == &s.tops ? kMasked : 0.0f);
  }
  if (call.sinks) {
    for (int64_t row = 0; row < num_rows; ++row) {
      s.tops[row] = kLog2E * call.sinks[kv_head * call.group + row % call.group];
      s.totals[row] = 1;
    }
  }

  const auto heads_of = [&](auto* tokens, int64_t token) {  // the group's heads of a token lie side by side
    return tokens + ((tile.token + token) * call.num_kv_heads + kv_head) * call.group * call.head_size;
  };
  const int64_t heads_size = call.group * num_units;
  for (int64_t t = 0; t < tile.num_tokens; ++t)
    std::memcpy(&s.queries[t * heads_size], heads_of(call.q, t), heads_size * sizeof(int32_t));

  const int64_t end = tile.position + tile.num_tokens;
  const int64_t begin = call.window ? std::max<int64_t>(tile.position - call.window + 1, 0) : 0;
  int64_t page = begin / call.page_size, slot = begin % call.page_size;
  std::array<const Value*, kKeys> key, next_key;
  const auto locate = [&](std::array<const Value*, kKeys>& key, int64_t base) {
    for (int64_t i = 0; i < kKeys; ++i) {
      key[i] = nullptr;
      if (base + i >= end) continue;
      key[i] = call.key_of(tile.row, kv_head, page, slot);
      for (int64_t h = 0; h < 2 * call.head_size; h += 64 / sizeof(Value))  // pages lie scattered in memory
        _mm_prefetch(reinterpret_cast<const char*>(key[i] + h), _MM_HINT_T1);
      if (++slot == call.page_size) slot = 0, ++page;
    }
  };
  locate(key, begin);
  for (int64_t base = begin; base < end; base += kKeys, key = next_key) {
    locate(next_key, base + kKeys);
    Pack(call, key, std::min(kKeys, end - base), s);
    Absorb(call, tile, num_rows, base, s);
  }

  for (int64_t row = 0; row < num_rows; ++row) {
    Value* out = heads_of(call.out, row / call.group) + row % call.group * call.head_size;
    const __m512 total = _mm512_set1_ps(s.totals[row]);
    for (int64_t h = 0; h < call.head_size; h += kLanes)
      Kind::Store(out + h, FirstLanes(call.head_size - h), _mm512_div_ps(_mm512_loadu_ps(&s.sums[row * width + h]), total));
    if (call.lse) {
      const int64_t head = kv_head * call.group + row % call.group;
      call.lse[(tile.token + row / call.group) * call.num_kv_heads * call.group + head] =
          (s.tops[row] + std::log2(s.totals[row])) / kLog2E;
    }
  }
}

// Puts the keys and values of a row's new tokens into their slots.
template <typename Kind>
void Write(const Call<Kind>& call, int64_t row) {
  const int64_t size = call.head_size, first = call.kv_len[row] - (call.q_start[row + 1] - call.q_start[row]);
  for (int64_t token = call.q_start[row]; token < call.q_start[row + 1]; ++token) {
    const int64_t position = first + token - call.q_start[row];
    for (int64_t head = 0; head < call.num_kv_heads; ++head) {
      auto* key = call.key_of(row, head, position / call.page_size, position % call.page_size);
      const int64_t source = (token * call.num_kv_heads + head) * size;
      std::memcpy(key, call.k + source, size * sizeof(*key));
      std::memcpy(key + size, call.v + source, size * sizeof(*key));
    }
  }
}

template <typename Kind>
ffi::Error Run(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::AnyBuffer,
               ffi::Buffer<ffi::S32> table, ffi::Buffer<ffi::S32> q_start, ffi::Buffer<ffi::S32> kv_len,
               ffi::Buffer<ffi::F32> sinks, float scale, float soft_cap, int64_t window, ffi::Result<ffi::AnyBuffer> out,
               ffi::Result<ffi::AnyBuffer> pages, ffi::ResultBuffer<ffi::F32> lse) {
  using Value = typename Kind::Value;
  const auto pages_shape = pages->dimensions();
  const Call<Kind> call = {
      .q = static_cast<const Value*>(q.untyped_data()),
      .k = static_cast<const Value*>(k.untyped_data()),
      .v = static_cast<const Value*>(v.untyped_data()),
      .pages = static_cast<Value*>(pages->untyped_data()),  // the same buffer as the pool that came in
      .table = table.typed_data(),
      .q_start = q_start.typed_data(),
      .kv_len = kv_len.typed_data(),
      .out = static_cast<Value*>(out->untyped_data()),
      .num_tokens = q.dimensions()[0],
      .num_rows = kv_len.dimensions()[0],
      .table_width = table.dimensions()[1],
      .num_kv_heads = pages_shape[1],
      .group = q.dimensions()[1] / pages_shape[1],
      .page_size = pages_shape[2],
      .head_size = pages_shape[3] / 2,
      .sinks = sinks.element_count() ? sinks.typed_data() : nullptr,
      .lse = lse->element_count() ? lse->typed_data() : nullptr,
      .scale = scale,
      .soft_cap = soft_cap,
      .window = window,
  };
  std::vector<Tile> tiles;
  const int64_t tile_tokens = std::clamp<int64_t>(kTileRows / call.group, 1, kTileTokens);
  for (int64_t row = 0; row < call.num_rows; ++row) {
    Write(call, row);
    const int64_t begin = call.q_start[row], end = call.q_start[row + 1];
    for (int64_t token = begin; token < end; token += tile_tokens)
      tiles.push_back({row, token, std::min(tile_tokens, end - token), call.kv_len[row] - (end - token)});
  }
  std::sort(tiles.begin(), tiles.end(), [](const Tile& a, const Tile& b) { return a.cost() > b.cost(); });

  const int64_t token_size = call.num_kv_heads * call.group * call.head_size, num_real = call.q_start[call.num_rows];
  std::memset(call.out + num_real * token_size, 0, (call.num_tokens - num_real) * token_size * sizeof(Value));
  const int64_t num_heads = call.num_kv_heads * call.group;
  if (call.lse) std::fill_n(call.lse + num_real * num_heads, (call.num_tokens - num_real) * num_heads, kMasked);

  const int64_t count = static_cast<int64_t>(tiles.size()) * call.num_kv_heads;
  native::ForEach(pool, count, 1, [call, tiles = std::move(tiles)](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) Attend(call, tiles[i / call.num_kv_heads], i % call.num_kv_heads);
  });
  return ffi::Error::Success();
}

auto Binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::Buffer<ffi::S32>>()
      .Arg<ffi::Buffer<ffi::S32>>()
      .Arg<ffi::Buffer<ffi::S32>>()
      .Arg<ffi::Buffer<ffi::F32>>()
      .Attr<float>("scale")
      .Attr<float>("soft_cap")
      .Attr<int64_t>("window")
      .Ret<ffi::AnyBuffer>()
      .Ret<ffi::AnyBuffer>()
      .Ret<ffi::Buffer<ffi::F32>>();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(AttendFloat32, Run<Float32>, Binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(AttendBFloat16, Run<BFloat16>, Binding());
