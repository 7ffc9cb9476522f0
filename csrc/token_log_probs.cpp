// token_log_probs on the CPU: logits exist in blocks of rows and of the vocabulary. Their products are BLAS's; around them each block is
// turned into exponentials in place, with their sums and the target's logit.

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "isa.h"
#include "results.h"
//
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

namespace fastinvdpo {
namespace {

#define FID_LOOPS "token_log_probs_cpu.h"
#include "each_isa.h"

constexpr int64_t kRows = 512, kColumns = 1024;  // of a block of logits: 2 MiB
constexpr int64_t kRowGrain = 8;                 // rows of a block that are worth a thread

// `rows` × `columns` numbers of a dense matrix of rows of `pitch` numbers, from element `from` on; or their transpose.
Tensor block_of(const Tensor& matrix, int64_t rows, int64_t columns, int64_t pitch, int64_t from, bool transposed = false) {
  const int64_t sizes[2] = {transposed ? columns : rows, transposed ? rows : columns};
  const int64_t strides[2] = {transposed ? 1 : pitch, transposed ? pitch : 1};
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(matrix.get(), 2, sizes, strides, from, &handle));
  return Tensor(handle);
}

// out ← out + a·b, or a·b where there is nothing in it yet.
void product(const Tensor& out, const Tensor& a, const Tensor& b, bool add) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), add ? 1.0 : 0.0, 1.0));
}

Tensor matrix(const Tensor& beside, int64_t rows, int64_t columns) {
  const int64_t sizes[2] = {rows, columns};
  return new_contiguous(beside, 2, sizes, aoti_torch_dtype_float32());
}

Tensor vector_of(const Tensor& beside, int64_t size) { return new_contiguous(beside, 1, &size, aoti_torch_dtype_float32()); }

float* numbers(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

// The arguments, checked, and their blocks.
struct Head {
  const Tensor &hidden, &weight;
  int64_t tokens, width, start, stop;
  const int64_t* targets;
  Tensor logits, converted;  // a block of logits; a block of the weight in float32, where it is not
  bool converts;

  Head(const Tensor& h, const Tensor& w, const Tensor& t, int64_t first, int64_t end)
      : hidden(h),
        weight(w),
        tokens(h.size(0)),
        width(h.size(1)),
        start(first),
        stop(end),
        targets(static_cast<const int64_t*>(t.const_data_ptr())),
        logits(matrix(h, std::min(tokens, kRows), std::min(end - first, kColumns))),
        converted(matrix(h, w.scalar_type() == ScalarType::Float ? 0 : std::min(end - first, kColumns), width)),
        converts(w.scalar_type() != ScalarType::Float) {
    STD_TORCH_CHECK(h.dim() == 2 && h.scalar_type() == ScalarType::Float && h.is_contiguous(), "hidden: float32 rows expected");
    STD_TORCH_CHECK(w.dim() == 2 && w.is_contiguous() && w.size(1) == width && width > 0, "weight: rows of the hidden size expected");
    STD_TORCH_CHECK(0 <= start && start < stop && stop <= w.size(0), "columns: a range of the weight's rows expected");
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long && t.numel() == tokens && t.is_contiguous(), "targets: one int64 a token expected");
    storage_of(w, "weight");
    for (int64_t i = 0; i < tokens; ++i) STD_TORCH_CHECK(start <= targets[i] && targets[i] < stop, "targets: a column of the range expected");
  }

  Tensor rows(const Tensor& of, int64_t row, int64_t count) const { return block_of(of, count, width, width, row * width); }

  // Calls body(column, columns, weight block) for every block of columns.
  template <class Body>
  void each_columns(const Body& body) {
    for (int64_t column = start; column < stop; column += kColumns) {
      const int64_t columns = std::min(kColumns, stop - column);
      Tensor block = rows(weight, column, columns);
      if (converts) {
        Tensor wide = rows(converted, 0, columns);
        torch::stable::copy_(wide, block);
        block = wide;
      }
      body(column, columns, block);
    }
  }

  template <class Body>
  void each_rows(const Body& body) const {
    for (int64_t row = 0; row < tokens; row += kRows) body(row, std::min(kRows, tokens - row));
  }

  // The block of logits of these rows with a block of the weight, and calls body(token, its logits) for each on all threads.
  template <class Body>
  Tensor each_logits(int64_t row, int64_t count, const Tensor& block, int64_t columns, const Body& body) {
    const Tensor result = block_of(logits, count, columns, columns, 0);
    product(result, rows(hidden, row, count), block_of(block, columns, width, width, 0, true), false);
    float* const data = numbers(result);
    torch::stable::parallel_for(0, count, kRowGrain, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) body(row + i, data + i * columns);
    });
    return result;
  }
};

// log p of the targets, the logarithm of the sum of exponentials, and with `mean` the mean of the weight's rows under p.
std::tuple<Tensor, Tensor, Tensor> forward(Tensor hidden, Tensor weight, Tensor targets, int64_t start, int64_t stop, bool mean) {
  Head head(hidden, weight, targets, start, stop);
  const int64_t width = head.width;
  Tensor log_probs = vector_of(hidden, head.tokens), log_sums = vector_of(hidden, head.tokens);
  Tensor means = matrix(hidden, mean ? head.tokens : 0, mean ? width : 0);
  float *const chosen = numbers(log_probs), *const of_sums = numbers(log_sums), *const of_means = numbers(means);
  const auto most_of = FID_FOR_THIS_CPU(largest);
  const auto exponentiate = FID_FOR_THIS_CPU(exponentiate);
  const auto multiply = FID_FOR_THIS_CPU(multiply);
  std::vector<float> most(static_cast<size_t>(head.tokens), -std::numeric_limits<float>::infinity());
  std::vector<double> sums(static_cast<size_t>(head.tokens));
  head.each_rows([&](int64_t row, int64_t count) {
    head.each_columns([&](int64_t column, int64_t columns, const Tensor& block) {
      const Tensor weights = head.each_logits(row, count, block, columns, [&](int64_t token, float* logits) {
        const int64_t target = head.targets[token] - column;
        if (0 <= target && target < columns) chosen[token] = logits[target];
        float& shift = most[static_cast<size_t>(token)];
        double& sum = sums[static_cast<size_t>(token)];
        const float higher = std::max(shift, most_of(logits, columns));
        if (higher > shift) {
          const float factor = std::exp(shift - higher);
          sum *= factor;
          if (mean && column > head.start) multiply(of_means + token * width, width, factor);
          shift = higher;
        }
        sum += exponentiate(logits, columns, shift, 1.0f);
      });
      if (mean) product(head.rows(means, row, count), weights, block, column > head.start);
    });
  });
  torch::stable::parallel_for(0, head.tokens, kRowGrain, [&](int64_t from, int64_t to) {
    for (int64_t token = from; token < to; ++token) {
      const double log_sum = most[static_cast<size_t>(token)] + std::log(sums[static_cast<size_t>(token)]);
      chosen[token] = static_cast<float>(chosen[token] - log_sum);
      of_sums[token] = static_cast<float>(log_sum);
      if (mean) multiply(of_means + token * width, width, static_cast<float>(1.0 / sums[static_cast<size_t>(token)]));
    }
  });
  return {log_probs, log_sums, means};
}

// The gradients with respect to hidden and weight, in float32 and in the weight's type, of g_t·logit_target + s_t·log Σ exp, or (0, 0).
std::tuple<Tensor, Tensor> backward(Tensor of_target, Tensor of_sum, Tensor hidden, Tensor weight, Tensor targets, Tensor log_sums,
                                    int64_t start, int64_t stop, bool of_hidden, bool of_weight) {
  Head head(hidden, weight, targets, start, stop);
  const int64_t width = head.width, tokens = head.tokens;
  STD_TORCH_CHECK(is_float32_vector(of_target, tokens) && is_float32_vector(of_sum, tokens) && is_float32_vector(log_sums, tokens),
                  "gradients and log_sums: one float32 a token expected");
  const float *const by_target = numbers(of_target), *const by_sum = numbers(of_sum), *const shift = numbers(log_sums);
  const Tensor to_hidden = matrix(hidden, of_hidden ? tokens : 0, of_hidden ? width : 0);
  const int64_t rows = of_weight ? weight.size(0) : 0, sizes[2] = {rows, of_weight ? width : 0};
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(weight.get(), &dtype));
  Tensor to_weight = new_contiguous(weight, 2, sizes, dtype);
  const Tensor sums = matrix(hidden, of_weight && head.converts ? std::min(stop - start, kColumns) : 0, width);
  if (of_weight && (start > 0 || stop < rows)) torch::stable::zero_(to_weight);
  const auto exponentiate = FID_FOR_THIS_CPU(exponentiate);
  head.each_columns([&](int64_t column, int64_t columns, const Tensor& block) {
    const Tensor summed = head.converts && of_weight ? head.rows(sums, 0, columns) : block;
    Tensor result = of_weight ? head.rows(to_weight, column, columns) : block;
    head.each_rows([&](int64_t row, int64_t count) {
      const Tensor slopes = head.each_logits(row, count, block, columns, [&](int64_t token, float* logits) {
        exponentiate(logits, columns, shift[token], by_sum[token]);
        const int64_t target = head.targets[token] - column;
        if (0 <= target && target < columns) logits[target] += by_target[token];
      });
      if (of_hidden) product(head.rows(to_hidden, row, count), slopes, block, column > start);
      if (of_weight) {
        const Tensor transposed = block_of(slopes, count, columns, columns, 0, true);
        product(head.converts ? summed : result, transposed, head.rows(hidden, row, count), row > 0);
      }
    });
    if (of_weight && head.converts) torch::stable::copy_(result, summed);
  });
  return {to_hidden, to_weight};
}

}  // namespace
}  // namespace fastinvdpo

STABLE_TORCH_LIBRARY_FRAGMENT(fastinvdpo_native, m) {
  m.def("token_log_probs(Tensor hidden, Tensor weight, Tensor targets, int start, int stop, bool mean) -> (Tensor, Tensor, Tensor)");
  m.def(
      "token_log_probs_backward(Tensor of_target, Tensor of_sum, Tensor hidden, Tensor weight, Tensor targets, Tensor log_sums, int start, "
      "int stop, bool of_hidden, bool of_weight) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastinvdpo_native, CPU, m) {
  m.impl("token_log_probs", TORCH_BOX(&fastinvdpo::forward));
  m.impl("token_log_probs_backward", TORCH_BOX(&fastinvdpo::backward));
}
