// csrc's CUDA kernels behind plain C functions, on the host. Storage: 0 float32, 1 bfloat16, 2 float16.

#include <algorithm>
#include <limits>
#include <numeric>
#include <random>

#include "affine_step_cuda.h"
#include "pair_statistics_cuda.h"
#include "preference_loss_cuda.h"

using namespace fastinvdpo;

namespace {

template <class Kernel, class Arguments>
void launch(Kernel kernel, const Arguments& arguments, int64_t resident, int64_t order_seed) {
  const int64_t teams = std::min<int64_t>(arguments.work.tasks(), std::max<int64_t>(1, resident / arguments.work.team));
  std::vector<int> order(static_cast<size_t>(teams));
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), std::mt19937_64(static_cast<uint64_t>(order_seed)));
  const int team = arguments.work.team;
  emulation::run(static_cast<int>(teams) * team, kThreads, team, order, [&] { kernel(arguments); });
}

template <class Body>
void for_type(bool same, Storage storage, const Body& body) {
  if (!same) return body(Any());
  if (storage == Storage::kFloat32) return body(float());
  if (storage == Storage::kBFloat16) return body(BFloat16());
  body(Float16());
}

StatisticsInputs statistics_inputs(const void* const* predictions, const int* storage, const int64_t* sizes) {
  StatisticsInputs in{};
  in.policy = predictions[0], in.reference = predictions[1], in.target = predictions[2];
  in.mask = static_cast<const float*>(predictions[3]), in.pair_mask = static_cast<const float*>(predictions[4]);
  in.policy_storage = static_cast<Storage>(storage[0]), in.target_storage = static_cast<Storage>(storage[2]);
  in.reference_storage = in.reference != nullptr ? static_cast<Storage>(storage[1]) : in.policy_storage;
  in.samples = sizes[0], in.sides = sizes[1], in.units = in.samples / in.sides, in.parts = sizes[2], in.m = sizes[3];
  in.masks = sizes[4], in.pair_masks = sizes[5];
  return in;
}

bool statistics_same_storage(const StatisticsInputs& in) {
  return in.policy_storage == in.target_storage && in.policy_storage == in.reference_storage;
}

}  // namespace

extern "C" {

// sizes: pairs, timesteps, n, largest team, resident blocks, seed of the order, pitch of the timestep weights; storage: policy, reference,
// target.
// Returns the ticket that the kernel left.
int64_t forward(const void* policy, const void* reference, const void* target, const int* storage, const float* pair_weight,
                const float* timestep_weight, const int64_t* sizes, float beta, int utility, float label_smoothing, float* results[4]) {
  ForwardArguments a{};
  a.pairs = {pair_weight, timestep_weight, sizes[6], sizes[0], sizes[1], beta, label_smoothing, static_cast<Utility>(utility)};
  const int64_t rows = 2 * sizes[0] * sizes[1], n = sizes[2];
  a.work = reduction_work(rows, n, static_cast<int>(sizes[3]));
  a.policy = policy, a.reference = reference, a.target = target;
  a.policy_storage = static_cast<Storage>(storage[0]);
  a.reference_storage = static_cast<Storage>(storage[1]);
  a.target_storage = target != nullptr ? static_cast<Storage>(storage[2]) : a.reference_storage;
  a.loss = results[0], a.margin = results[1], a.policy_mse = results[2], a.reference_mse = results[3];
  a.inverse_n = 1.0 / static_cast<double>(n);
  std::vector<double> workspace(static_cast<size_t>(rows + a.work.tasks() * kSums), std::numeric_limits<double>::quiet_NaN());
  unsigned ticket = 0;
  a.delta = workspace.data(), a.partial = workspace.data() + rows, a.ticket = &ticket;
  const bool same = a.policy_storage == a.reference_storage && a.policy_storage == a.target_storage;
  for_type(same, a.policy_storage, [&](auto type) {
    using T = decltype(type);
    const bool cluster = a.work.team > 1;
    if (target != nullptr) {
      launch(cluster ? preference_loss_forward<T, true, true> : preference_loss_forward<T, true, false>, a, sizes[4], sizes[5]);
    } else {
      launch(cluster ? preference_loss_forward<T, false, true> : preference_loss_forward<T, false, false>, a, sizes[4], sizes[5]);
    }
  });
  return ticket;
}

void backward(const float* gradients[3], const void* policy, const void* target, const int* storage, const float* margin,
              const float* pair_weight, const float* timestep_weight, const int64_t* sizes, float beta, int utility,
              float label_smoothing, void* gradient) {
  BackwardArguments a{};
  a.pairs = {pair_weight, timestep_weight, sizes[6], sizes[0], sizes[1], beta, label_smoothing, static_cast<Utility>(utility)};
  a.work = elementwise_work(2 * sizes[0] * sizes[1], sizes[2]);
  a.policy = policy, a.target = target, a.gradient = gradient, a.margin = margin;
  a.policy_storage = static_cast<Storage>(storage[0]), a.target_storage = static_cast<Storage>(storage[1]);
  a.grad_loss = gradients[0], a.grad_margin = gradients[1], a.grad_policy_mse = gradients[2];
  a.two_over_n = 2.0 / static_cast<double>(sizes[2]);
  for_type(a.policy_storage == a.target_storage, a.policy_storage,
           [&](auto type) { launch(preference_loss_backward<decltype(type)>, a, sizes[4], sizes[5]); });
}

// predictions: policy, reference or null, target, mask or null, pair mask or null; sizes: samples, sides, parts, m, rows of the mask and of the
// pair mask, resident blocks, seed of the order; storage: policy, reference, target; results: those of samples, in their order in memory, and
// of pairs. Returns the ticket that the kernel left.
int64_t pair_statistics(const void* const* predictions, const int* storage, const int64_t* sizes, float* const* results) {
  StatisticsArguments a{};
  a.in = statistics_inputs(predictions, storage, sizes);
  a.work = statistics_work(a.in.units * a.in.parts, a.in.parts, a.in.m, kMaxReductionChunk);
  std::copy(results, results + kOfSample, a.of_sample);
  a.of_pair = results[kOfSample], a.inverse_n = 1.0 / static_cast<double>(a.in.parts * a.in.m);
  std::vector<double> partial(static_cast<size_t>(a.work.tasks() * kStatistics), std::numeric_limits<double>::quiet_NaN());
  unsigned ticket = 0;
  a.partial = partial.data(), a.ticket = &ticket;
  for_type(statistics_same_storage(a.in), a.in.policy_storage, [&](auto type) {
    using T = decltype(type);
    if (a.in.mask != nullptr) {
      launch(a.in.sides == 2 ? pair_statistics_forward<T, true, true> : pair_statistics_forward<T, false, true>, a, sizes[6], sizes[7]);
    } else {
      launch(a.in.sides == 2 ? pair_statistics_forward<T, true, false> : pair_statistics_forward<T, false, false>, a, sizes[6], sizes[7]);
    }
  });
  return ticket;
}

void pair_statistics_backward(const float* const* grads, const void* const* predictions, const int* storage, const int64_t* sizes,
                              void* gradient) {
  StatisticsGradientArguments a{};
  a.in = statistics_inputs(predictions, storage, sizes);
  a.work = statistics_work(a.in.samples * a.in.parts, a.in.parts, a.in.m, kMaxElementwiseChunk);
  a.gradient = gradient, a.inverse_n = 1.0 / static_cast<double>(a.in.parts * a.in.m);
  a.grad_policy_mse = grads[0], a.grad_cross = grads[1], a.grad_shift_mse = grads[2], a.grad_pair_cross = grads[3];
  for_type(statistics_same_storage(a.in), a.in.policy_storage, [&](auto type) {
    using T = decltype(type);
    launch(a.in.mask != nullptr ? fastinvdpo::pair_statistics_backward<T, true> : fastinvdpo::pair_statistics_backward<T, false>, a, sizes[6],
           sizes[7]);
  });
}

// sizes: rows, n, outputs, resident blocks, seed, offset, then the pitches of sample, result, trajectory and the outputs; storage:
// sample, trajectory, outputs.
void affine_step(void* sample, void* const* outputs, const int* storage, const float* coefficients, const bool* active,
                 const float* noise_scale, const int64_t* noise_index, const int64_t* sizes, void* result, void* trajectory) {
  StepLaunch launched{};
  StepArguments& a = launched.step;
  a.samples = sizes[0], a.n = sizes[1], a.outputs = static_cast<int>(sizes[2]);
  launched.work = elementwise_work(a.samples, a.n);
  a.sample = {static_cast<char*>(sample), sizes[6], static_cast<Storage>(storage[0])};
  a.result = {static_cast<char*>(result), sizes[7], a.sample.storage};
  a.trajectory = {static_cast<char*>(trajectory), sizes[8], static_cast<Storage>(storage[1])};
  for (int j = 0; j < a.outputs; ++j) a.output[j] = {static_cast<char*>(outputs[j]), sizes[9 + j], static_cast<Storage>(storage[2 + j])};
  a.coefficients = coefficients, a.active = active, a.noise_scale = noise_scale, a.noise_index = noise_index;
  a.seed = static_cast<uint64_t>(sizes[4]), a.offset = static_cast<uint32_t>(sizes[5]);
  for_type(same_storage(a), a.sample.storage, [&](auto type) {
    using T = decltype(type);
    const auto run = [&](auto most) {
      constexpr int kMost = decltype(most)::value;
      launch(noise_scale != nullptr ? affine_step_kernel<T, kMost, true> : affine_step_kernel<T, kMost, false>, launched, sizes[3], 0);
    };
    if (std::is_same<T, Any>::value || a.outputs > 2) {
      run(Constant<kMaxOutputs>());
    } else if (a.outputs == 2) {
      run(Constant<2>());
    } else {
      run(Constant<1>());
    }
  });
}

// sizes: rows, n, gradients, columns of the table, resident blocks, pitch of grad, whether it has one number for each row, then the
// column and the pitch of every gradient; storage: grad, gradients.
void affine_step_backward(void* grad, void* const* gradients, const int* storage, const float* coefficients, const bool* active,
                          const int64_t* sizes) {
  StepBackwardLaunch launched{};
  StepBackwardArguments& a = launched.step;
  a.samples = sizes[0], a.n = sizes[1], a.gradients = static_cast<int>(sizes[2]), a.columns = static_cast<int>(sizes[3]);
  launched.work = elementwise_work(a.samples, a.n);
  a.grad = {static_cast<char*>(grad), sizes[5], static_cast<Storage>(storage[0])};
  a.constant = sizes[6] != 0;
  for (int k = 0; k < a.gradients; ++k) {
    a.column[k] = static_cast<int>(sizes[7 + 2 * k]);
    a.gradient[k] = {static_cast<char*>(gradients[k]), sizes[8 + 2 * k], static_cast<Storage>(storage[1 + k])};
  }
  a.coefficients = coefficients, a.active = active;
  for_type(same_storage(a), a.grad.storage,
           [&](auto type) { launch(affine_step_backward_kernel<decltype(type)>, launched, sizes[4], 0); });
}

// The elements that every thread block takes of a row: begin and end of each (span, rank), for tests of the arithmetic alone.
int64_t ranges(int64_t rows, int64_t n, int largest_team, int64_t head, int64_t* description, int64_t* begin_end, int64_t room) {
  const Work work = largest_team > 0 ? reduction_work(rows, n, largest_team) : elementwise_work(rows, n);
  description[0] = work.chunk, description[1] = work.spans, description[2] = work.team;
  for (int64_t i = 0; i < work.spans * work.team && i < room; ++i) {
    const Range range = chunk_range(work, i / work.team, static_cast<int>(i % work.team), head);
    begin_end[2 * i] = range.begin, begin_end[2 * i + 1] = range.end;
  }
  return work.spans * work.team;
}
}
