// out = act(residual + scatter(y · scale + shift → channels index)),   act: none or ReLU; NaN stays NaN
//
// Two layouts of residual and out, both dense:
//   planar       [outer, C, inner]: a channel is a plane of `inner` elements; y is [outer, K, inner]
//   interleaved  [rows, C]: channels are innermost (channels_last, tokens); y is [rows, K]
// Threads: planes or rows, in parts of equal bytes. Bytes moved: residual and y are read once, out is written
// once. Arithmetic is in float32 (float64 for float64), rounded once at the end.
#include <type_traits>

#include "index_list.h"
#include "mvp/arguments.h"
#include "mvp/ops.h"
#include "mvp/simd.h"
#include "split_work.h"

namespace mvp::MVP_ISA {
namespace {

typedef double DoubleVec __attribute__((vector_size(4 * kLanes)));

inline DoubleVec load(const double* p) {
  DoubleVec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(double* p, DoubleVec v) { std::memcpy(p, &v, sizeof v); }

template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;
template <typename T>
constexpr int64_t kWidth = kLanes * sizeof(float) / sizeof(Accumulator<T>);

// Calls piece(offset) for vectors that cover out[0, n): between the first and the last they are aligned, as
// stores across cache lines are dear; both ends overlap their neighbours (inputs and output are distinct, so
// doing an element twice is harmless). Returns false if n is less than one vector.
template <typename T, typename Piece>
inline bool cover(const T* out, int64_t n, const Piece& piece) {
  if (n < kWidth<T>) return false;
  const int64_t ahead = (reinterpret_cast<uintptr_t>(out) / sizeof(T)) % kWidth<T>;
  int64_t i = 0;
  if (ahead != 0) {
    piece(0);
    i = kWidth<T> - ahead;
  }
  for (; i + kWidth<T> <= n; i += kWidth<T>) piece(i);
  if (i < n) piece(n - kWidth<T>);
  return true;
}

template <typename T>
inline Accumulator<T> widen_one(const T* p) {
  if constexpr (std::is_same_v<T, double>)
    return *p;
  else
    return to_float(*p);
}

template <typename T>
inline void narrow_one(T* p, Accumulator<T> value) {
  if constexpr (std::is_same_v<T, Accumulator<T>>)
    *p = value;
  else
    store(p, broadcast(value), 1);
}

// NaN is not below zero, so it passes.
template <bool relu, typename V>
inline V activate(V v) {
  if constexpr (relu) return v < 0 ? V{} : v;
  return v;
}

template <bool relu, typename T>
void add_nothing(const T* residual, T* out, int64_t n) {
  if (cover(out, n, [&](int64_t i) { store(out + i, activate<relu>(load(residual + i))); })) return;
  for (int64_t i = 0; i < n; ++i) narrow_one(out + i, activate<relu>(widen_one(residual + i)));
}

template <bool relu, typename T>
void add_plain(const T* residual, const T* y, T* out, int64_t n) {
  if (cover(out, n, [&](int64_t i) { store(out + i, activate<relu>(load(residual + i) + load(y + i))); }))
    return;
  for (int64_t i = 0; i < n; ++i)
    narrow_one(out + i, activate<relu>(widen_one(residual + i) + widen_one(y + i)));
}

template <bool relu, typename T, typename A>
void add_affine(const T* residual, const T* y, A scale, A shift, T* out, int64_t n) {
  const auto piece = [&](int64_t i) {
    store(out + i, activate<relu>(load(residual + i) + (load(y + i) * scale + shift)));
  };
  if (cover(out, n, piece)) return;
  for (int64_t i = 0; i < n; ++i)
    narrow_one(out + i, activate<relu>(widen_one(residual + i) + (widen_one(y + i) * scale + shift)));
}

// Which channels of one vector are kept, and where their values lie in a row of y.
struct Group {
  int32_t source[kLanes] = {};  // of each lane, counted from offset
  uint16_t lanes = 0;           // the kept ones
  uint16_t packed = 0;          // as many, from lane 0 on
  int32_t offset = 0;
};

// What all threads share: where each channel of the full width comes from.
template <typename A>
struct Channels {
  int64_t full, kept;
  const IndexList* index;         // null: all
  std::vector<int64_t> position;  // of each full channel in y, −1 where it was removed
  std::vector<A> scale, shift;    // by full channel, 0 where it was removed; empty: none
  std::vector<Group> groups;      // by vector of channels; empty where the index does not ascend

  bool affine() const { return !scale.empty(); }
};

template <typename A>
Channels<A> find_channels(const TensorView& scale, const TensorView& shift, const IndexList* index,
                          int64_t full, int64_t kept) {
  Channels<A> channels{full, kept, index, std::vector<int64_t>(full, -1), {}, {}, {}};
  for (int64_t k = 0; k < kept; ++k) channels.position[index == nullptr ? k : index->at[k]] = k;
  if (scale.defined() || shift.defined()) {
    channels.scale.assign(full, A{0});
    channels.shift.assign(full, A{0});
    for (int64_t c = 0; c < full; ++c) {
      const int64_t k = channels.position[c];
      if (k < 0) continue;
      channels.scale[c] = scale.defined() ? scale.ptr<const A>()[k * scale.stride[0]] : A{1};
      channels.shift[c] = shift.defined() ? shift.ptr<const A>()[k * shift.stride[0]] : A{0};
    }
  }
#if defined(__AVX512F__)
  if (std::is_same_v<A, float> && index != nullptr && index->ascending) {
    channels.groups.assign((full + kLanes - 1) / kLanes, Group{});
    for (int64_t c : index->at)
      channels.groups[c / kLanes].lanes |= static_cast<uint16_t>(1u << (c % kLanes));
    int32_t offset = 0;
    for (Group& group : channels.groups) {
      const int count = __builtin_popcount(group.lanes);
      group.packed = static_cast<uint16_t>((1u << count) - 1);
      group.offset = offset;
      offset += count;
      for (int lane = 0, next = 0; lane < kLanes; ++lane)
        group.source[lane] = group.lanes >> lane & 1 ? next++ : 0;
    }
  }
#endif
  return channels;
}

template <bool relu, typename T, typename A>
void planes(const T* residual, const T* y, T* out, const Channels<A>& channels, int64_t inner, int64_t first,
            int64_t last) {
  while (first < last) {
    const int64_t outer = first / channels.full, c = first % channels.full, k = channels.position[c];
    const int64_t end = std::min(last - first, channels.full - c) + c;
    // Small planes would drown in overhead: take neighbours along that are treated alike.
    int64_t next = c + 1;
    if (k < 0)
      while (next < end && channels.position[next] < 0) ++next;
    else if (!channels.affine())
      while (next < end && channels.position[next] == k + next - c) ++next;
    const int64_t count = (next - c) * inner, offset = first * inner;
    first += next - c;
    if (k < 0) {
      add_nothing<relu>(residual + offset, out + offset, count);
      continue;
    }
    const T* const from = y + (outer * channels.kept + k) * inner;
    if (channels.affine())
      add_affine<relu>(residual + offset, from, channels.scale[c], channels.shift[c], out + offset, count);
    else
      add_plain<relu>(residual + offset, from, out + offset, count);
  }
}

#if defined(__AVX512F__)
inline Vec load_some(const float* p, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, p); }
inline Vec load_some(const Bf16* p, __mmask16 lanes) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, p)), 16));
}
inline Vec load_some(const F16* p, __mmask16 lanes) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, p));
}
inline void store_some(float* p, Vec v, __mmask16 lanes) { _mm512_mask_storeu_ps(p, lanes, v); }
template <typename T>
inline void store_some(T* p, Vec v, __mmask16 lanes) {
  T all[kLanes];
  store(all, v);
  _mm256_mask_storeu_epi16(p, lanes, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(all)));
}
#endif

// One row of y at full width. Removed channels of `wide` are 0 from the start and are never written with
// anything else.
template <typename T, typename A>
inline void widen_row(const T* y, const Channels<A>& channels, A* wide) {
  for (int64_t k = 0; k < channels.kept; ++k)
    wide[channels.index == nullptr ? k : channels.index->at[k]] = widen_one(y + k);
}

template <bool relu, bool affine, typename T, typename A>
inline void add_row(const T* residual, const A* wide, const Channels<A>& channels, T* out) {
  const A* const scale = channels.scale.data();
  const A* const shift = channels.shift.data();
  const auto piece = [&](int64_t i) {
    auto term = load(wide + i);
    if constexpr (affine) term = term * load(scale + i) + load(shift + i);
    store(out + i, activate<relu>(load(residual + i) + term));
  };
  if (cover(out, channels.full, piece)) return;
  for (int64_t c = 0; c < channels.full; ++c) {
    A term = wide[c];
    if constexpr (affine) term = term * scale[c] + shift[c];
    narrow_one(out + c, activate<relu>(widen_one(residual + c) + term));
  }
}

#if defined(__AVX512F__)
// The same without `wide`: the packed values of a vector are loaded and spread over its lanes in registers.
// (By vpermps: vexpandps does just that, but takes twice as long on AMD's cores.)
template <bool relu, bool affine, typename T>
void add_expanded(const T* residual, const T* y, const Channels<float>& channels, T* out, int64_t row_count) {
  const int64_t full = channels.full, kept = channels.kept, whole = full / kLanes;
  const __mmask16 rest = static_cast<__mmask16>((1u << (full % kLanes)) - 1);
  const Group* const groups = channels.groups.data();
  const float* const scale = channels.scale.data();
  const float* const shift = channels.shift.data();
  for (int64_t row = 0; row < row_count; ++row, residual += full, y += kept, out += full) {
    const auto sum = [&](int64_t g, Vec stream, __mmask16 lanes) {
      if (groups[g].lanes == 0) return activate<relu>(stream);  // also: y may end here
      const __m512i source = _mm512_loadu_si512(groups[g].source);
      const Vec packed = load_some(y + groups[g].offset, groups[g].packed);
      Vec term = _mm512_maskz_permutexvar_ps(groups[g].lanes, source, packed);
      if constexpr (affine)
        term = term * load_some(scale + g * kLanes, lanes) + load_some(shift + g * kLanes, lanes);
      return activate<relu>(stream + term);
    };
    for (int64_t g = 0; g < whole; ++g) store(out + g * kLanes, sum(g, load(residual + g * kLanes), 0xffff));
    if (rest != 0)
      store_some(out + whole * kLanes, sum(whole, load_some(residual + whole * kLanes, rest), rest), rest);
  }
}
#endif

template <bool relu, typename T, typename A>
void rows(const T* residual, const T* y, T* out, const Channels<A>& channels, int64_t first, int64_t last) {
  const int64_t full = channels.full;
  if (channels.kept == 0)
    return add_nothing<relu>(residual + first * full, out + first * full, (last - first) * full);
  if (channels.index == nullptr && !channels.affine())
    return add_plain<relu>(residual + first * full, y + first * full, out + first * full,
                           (last - first) * full);
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<A, float>) {
    if (!channels.groups.empty()) {
      const auto add = channels.affine() ? &add_expanded<relu, true, T> : &add_expanded<relu, false, T>;
      return add(residual + first * full, y + first * channels.kept, channels, out + first * full,
                 last - first);
    }
  }
#endif
  std::vector<A> wide(full, A{0});
  for (int64_t row = first; row < last; ++row) {
    widen_row(y + row * channels.kept, channels, wide.data());
    if (channels.affine())
      add_row<relu, true>(residual + row * full, wide.data(), channels, out + row * full);
    else
      add_row<relu, false>(residual + row * full, wide.data(), channels, out + row * full);
  }
}

template <typename T, bool relu>
void residual_add(const TensorView& residual, const TensorView& y, const TensorView& scale,
                  const TensorView& shift, const IndexList* index, int64_t dim, const TensorView& out,
                  int threads) {
  const int64_t full = residual.shape[dim], kept = y.shape[dim];
  if (residual.numel() == 0) return;
  const auto channels = find_channels<Accumulator<T>>(scale, shift, index, full, kept);
  const T *from = residual.ptr<const T>(), *added = y.ptr<const T>();
  T* const to = out.ptr<T>();
  Worklist work;
  if (full > 1 && out.stride[dim] == 1) {
    const int64_t row_count = out.numel() / full;
    work.add(row_count, (2 * full + kept) * sizeof(T));
    work.run(threads, [&](int64_t, int64_t first, int64_t last) {
      rows<relu>(from, added, to, channels, first, last);
    });
  } else {
    int64_t inner = 1;
    for (int64_t d = dim + 1; d < out.ndim; ++d) inner *= out.shape[d];
    const int64_t plane_count = out.numel() / inner;
    work.add(plane_count, 3 * inner * sizeof(T));
    work.run(threads, [&](int64_t, int64_t first, int64_t last) {
      planes<relu>(from, added, to, channels, inner, first, last);
    });
  }
}

}  // namespace

void residual_add_cpu(const TensorView& residual, const TensorView& y, const TensorView& index,
                      const TensorView& scale, const TensorView& shift, bool relu, int64_t dim,
                      const TensorView& out, int threads) {
  check_residual_add({}, residual, y, index, scale, shift, dim, out);
  IndexLists lists;
  const IndexList* const list = lists.get(index, residual.shape[dim], true, "residual_add", "index");
  const auto run = [&](auto with_relu, auto without) {
    (relu ? with_relu : without)(residual, y, scale, shift, list, dim, out, threads);
  };
  switch (out.dtype) {
    case DType::f32:
      return run(&residual_add<float, true>, &residual_add<float, false>);
    case DType::f64:
      return run(&residual_add<double, true>, &residual_add<double, false>);
    case DType::bf16:
      return run(&residual_add<Bf16, true>, &residual_add<Bf16, false>);
    case DType::f16:
      return run(&residual_add<F16, true>, &residual_add<F16, false>);
    default:
      MVP_CHECK(false, "residual_add", "expected a floating dtype");
  }
}

}  // namespace mvp::MVP_ISA
