// The inner loops of pair_statistics. Included once per instruction set, inside its namespace and target region (see simd.h).

#include "simd.h"

static constexpr int64_t kBlock = 512;  // elements that are widened at a time where types differ

// Two vectors of a row from element `at` on, of which `left` elements are there; zeros stand for the others.
template <Storage kStorage, bool kAlternate>
static inline void load_some(const void* row, int64_t at, int64_t left, vf* two) {
  if (left >= 2 * kLanes) return load_two<kStorage, kAlternate>(row, at, two);
  two[0] = load_tail<kStorage>(row, at, std::min<int64_t>(left, kLanes));
  two[1] = vf{};
}

// totals[which] += the sums over the elements [begin, end) of a sample, or of a winner and its loser. A sample's sums have the same bits
// with and without a partner.
template <Storage kStorage, bool kReference, bool kPair, bool kMask>
static void add_sums(const StatisticsRows& rows, int64_t begin, int64_t end, Totals* totals) {
  constexpr bool kAlternate = kStorage == Storage::kBFloat16 && !kMask;
  constexpr int kSides = kPair ? 2 : 1;
  vf sums[kStatistics] = {};
  const auto add = [&](int64_t at, int64_t left) __attribute__((always_inline)) {
    vf e[kSides][2];
    for (int side = 0; side < kSides; ++side) {
      vf* const sum = sums + side * kOfSample;
      vf p[2], t[2], r[2] = {}, k[2] = {};
      load_some<kStorage, kAlternate>(rows.policy[side], at, left, p);
      load_some<kStorage, kAlternate>(rows.target[side], at, left, t);
      vf weighted[2] = {e[side][0] = p[0] - t[0], e[side][1] = p[1] - t[1]};
      if (kMask) {
        load_some<Storage::kFloat32, false>(rows.mask[side], at, left, k);
        sum[kMaskMean] += k[0] + k[1];
        weighted[0] *= k[0], weighted[1] *= k[1];
      }
      sum[kPolicyMse] += multiply_add(weighted[0], e[side][0], weighted[1] * e[side][1]);
      if (!kReference) continue;
      load_some<kStorage, kAlternate>(rows.reference[side], at, left, r);
      const vf d[2] = {p[0] - r[0], p[1] - r[1]};
      sum[kCross] += multiply_add(weighted[0], d[0], weighted[1] * d[1]);
      sum[kShiftMse] += kMask ? multiply_add(k[0] * d[0], d[0], k[1] * d[1] * d[1]) : multiply_add(d[0], d[0], d[1] * d[1]);
    }
    if (!kPair) return;
    vf weighted[2] = {e[0][0], e[0][1]}, k[2];
    if (kMask) {
      load_some<Storage::kFloat32, false>(rows.pair_mask, at, left, k);
      weighted[0] *= k[0], weighted[1] *= k[1];
    }
    sums[kPairCross] += multiply_add(weighted[0], e[kSides - 1][0], weighted[1] * e[kSides - 1][1]);
  };
  const auto widen_sums = [&]() __attribute__((always_inline)) {
    for (int which = 0; which < kStatistics; ++which) {
      totals[which].add(sums[which]);
      sums[which] = vf{};
    }
  };
  int64_t at = begin;
  while (at + 2 * kLanes <= end) {
    const int64_t run = std::min(end, at + 2 * kLanes * kFloatRun);
    for (; at + 2 * kLanes <= run; at += 2 * kLanes) add(at, 2 * kLanes);
    widen_sums();
  }
  for (; at < end; at += kLanes) add(at, std::min<int64_t>(end - at, kLanes));
  widen_sums();
}

// gradient = k·(of_error·e + of_shift·d) + k_pair·of_partner·e_partner, element by element.
template <Storage kStorage, bool kReference, bool kPair, bool kMask, bool kStream>
static void write_gradients(const GradientRows& rows, int64_t begin, int64_t end) {
  constexpr bool kAlternate = kStorage == Storage::kBFloat16 && !kMask;
  constexpr int kSides = kPair ? 2 : 1;
  const auto differentiate = [&](int64_t at, int64_t left, vf (*gradient)[2]) __attribute__((always_inline)) {
    vf e[kSides][2];
    for (int side = 0; side < kSides; ++side) {
      vf p[2], t[2], r[2], k[2];
      load_some<kStorage, kAlternate>(rows.policy[side], at, left, p);
      load_some<kStorage, kAlternate>(rows.target[side], at, left, t);
      if (kReference) load_some<kStorage, kAlternate>(rows.reference[side], at, left, r);
      if (kMask) load_some<Storage::kFloat32, false>(rows.mask[side], at, left, k);
      for (int half = 0; half < 2; ++half) {
        e[side][half] = p[half] - t[half];
        vf& g = gradient[side][half];
        g = rows.of_error[side] * e[side][half];
        if (kReference) g = multiply_add(rows.of_shift[side], p[half] - r[half], g);
        if (kMask) g *= k[half];
      }
    }
    if (!kPair) return;
    vf k[2];
    if (kMask) load_some<Storage::kFloat32, false>(rows.pair_mask, at, left, k);
    for (int half = 0; half < 2; ++half) {
      const vf weight = kMask ? rows.of_partner * k[half] : rows.of_partner - vf{};
      gradient[0][half] = multiply_add(weight, e[kSides - 1][half], gradient[0][half]);
      gradient[kSides - 1][half] = multiply_add(weight, e[0][half], gradient[kSides - 1][half]);
    }
  };
  int64_t at = begin;
  for (; at + 2 * kLanes <= end; at += 2 * kLanes) {
    vf gradient[kSides][2];
    differentiate(at, 2 * kLanes, gradient);
    for (int side = 0; side < kSides; ++side) {
      if (kStream) {
        stream_two<kStorage, kAlternate>(rows.gradient[side], at, gradient[side]);
      } else {
        store_two<kStorage, kAlternate>(rows.gradient[side], at, gradient[side]);
      }
    }
  }
  if (kStream) streamed();
  for (; at < end; at += kLanes) {
    const int64_t left = std::min<int64_t>(end - at, kLanes);
    vf gradient[kSides][2];
    differentiate(at, left, gradient);
    for (int side = 0; side < kSides; ++side) store_tail<kStorage>(rows.gradient[side], at, left, gradient[side][0]);
  }
}

// Rows of any types as rows of float32, block by block: body(rows, number of elements).
template <class Body>
static void in_blocks(const GradientRows& rows, int64_t begin, int64_t end, const Body& body) {
  float policy[2][kBlock], reference[2][kBlock], target[2][kBlock], gradient[2][kBlock];
  const bool narrowed = rows.policy_storage != Storage::kFloat32;
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t count = std::min(end - at, kBlock);
    GradientRows wide = rows;
    for (int side = 0; side < rows.sides; ++side) {
      wide.policy[side] = widen(rows.policy[side], rows.policy_storage, at, count, policy[side]);
      wide.target[side] = widen(rows.target[side], rows.target_storage, at, count, target[side]);
      if (rows.has_reference) wide.reference[side] = widen(rows.reference[side], rows.reference_storage, at, count, reference[side]);
      if (rows.has_mask) wide.mask[side] += at;
      wide.gradient[side] = narrowed ? gradient[side] : static_cast<float*>(rows.gradient[side]) + at;
    }
    if (rows.pair_mask != nullptr) wide.pair_mask += at;
    body(wide, count);
    if (!narrowed || rows.gradient[0] == nullptr) continue;
    for (int side = 0; side < rows.sides; ++side) narrow(rows.gradient[side], rows.policy_storage, at, count, gradient[side]);
  }
}

// body(whether there is a reference, whether there are two rows), known to the compiler.
template <class Body>
static void with_kinds(const StatisticsRows& rows, const Body& body) {
  const auto with_sides = [&](auto reference) {
    rows.sides == 2 ? body(reference, std::true_type()) : body(reference, std::false_type());
  };
  rows.has_reference ? with_sides(std::true_type()) : with_sides(std::false_type());
}

static bool of_one_type(const StatisticsRows& rows) {
  return rows.policy_storage == rows.target_storage && (!rows.has_reference || rows.policy_storage == rows.reference_storage);
}

static void sum_chunk(const GradientRows& rows, int64_t begin, int64_t end, double* sums) {
  Totals totals[kStatistics];
  with_kinds(rows, [&](auto reference, auto pair) {
    if (of_one_type(rows) && !rows.has_mask) {
      return with_storage(rows.policy_storage,
                          [&](auto storage) { add_sums<storage(), reference(), pair(), false>(rows, begin, end, totals); });
    }
    in_blocks(rows, begin, end, [&](const GradientRows& wide, int64_t count) {
      if (rows.has_mask) return add_sums<Storage::kFloat32, reference(), pair(), true>(wide, 0, count, totals);
      add_sums<Storage::kFloat32, reference(), pair(), false>(wide, 0, count, totals);
    });
  });
  for (int which = 0; which < kStatistics; ++which) sums[which] = totals[which].sum();
}

static void gradient_chunk(const GradientRows& rows, int64_t begin, int64_t end) {
  bool stream = rows.past_caches;
  for (int side = 0; side < rows.sides; ++side) {
    stream = stream && can_stream(static_cast<const char*>(rows.gradient[side]) + begin * bytes_of(rows.policy_storage));
  }
  with_kinds(rows, [&](auto reference, auto pair) {
    if (of_one_type(rows) && !rows.has_mask) {
      return with_storage(rows.policy_storage, [&](auto storage) {
        if (stream) return write_gradients<storage(), reference(), pair(), false, true>(rows, begin, end);
        write_gradients<storage(), reference(), pair(), false, false>(rows, begin, end);
      });
    }
    in_blocks(rows, begin, end, [&](const GradientRows& wide, int64_t count) {
      if (rows.has_mask) return write_gradients<Storage::kFloat32, reference(), pair(), true, false>(wide, 0, count);
      write_gradients<Storage::kFloat32, reference(), pair(), false, false>(wide, 0, count);
    });
  });
}
