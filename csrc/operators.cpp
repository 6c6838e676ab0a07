// The CPU's operators, registered with the dispatcher: check, bring into shape, allocate, run. What they compute is said
// in distseg/ops/reference.py; how, in kernels.cpp.

#include "kernels.h"

#include <ATen/ATen.h>
#include <ATen/Version.h>
#include <torch/library.h>
#include <torch/python.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>

namespace distseg {
namespace {

using at::Tensor;

struct Chosen {
  const Kernels* kernels = &kernels_DEFAULT;
  const LabelKernels* label_kernels = &label_kernels_DEFAULT;

  Chosen() {
    [[maybe_unused]] const std::string capability = at::get_cpu_capability();  // the processor's, or ATEN_CPU_CAPABILITY
#ifdef DISTSEG_X86
    if (capability == "AVX512") kernels = &kernels_AVX512, label_kernels = &label_kernels_AVX512;
    if (capability == "AVX2") kernels = &kernels_AVX2, label_kernels = &label_kernels_AVX2;
#endif
  }
};

const Chosen& chosen() {
  static const Chosen instance;
  return instance;
}

const Kernels& kernels() { return *chosen().kernels; }
const LabelKernels& label_kernels() { return *chosen().label_kernels; }

at::ScalarType acc_type(const Tensor& z) { return z.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// Tensors in the layout that the kernels read, held for as long as `view` points into them.
struct Batch {
  Tensor z, y;
  at::MemoryFormat format;
  Logits view;

  Batch(const Tensor& logits, const Tensor& masks) {
    TORCH_CHECK(logits.dim() == 4, "logits are ", logits.sizes(), ": need (B, C, H, W)");
    const auto type = logits.scalar_type();
    TORCH_CHECK(
        type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf, "logits are ", type,
        ": need float16, bfloat16, float32 or float64");
    TORCH_CHECK(
        masks.dim() == 3 && masks.size(0) == logits.size(0) && masks.size(1) == logits.size(2) &&
            masks.size(2) == logits.size(3),
        "masks are ", masks.sizes(), " for logits ", logits.sizes(), ": need (B, H, W)");
    check_labels(masks);
    TORCH_CHECK(logits.size(1) > 0, "logits have no channel");
    format = logits.size(1) > 1 ? logits.suggest_memory_format() : at::MemoryFormat::Contiguous;
    z = logits.contiguous(format);
    y = masks.contiguous();
    view = {z.const_data_ptr(), type, z.size(0), z.size(1), z.size(2) * z.size(3),
            format == at::MemoryFormat::ChannelsLast, y.const_data_ptr(), y.scalar_type() == at::kByte};
  }

  static void check_labels(const Tensor& masks) {
    TORCH_CHECK(
        masks.scalar_type() == at::kByte || masks.scalar_type() == at::kLong, "masks are ", masks.scalar_type(),
        ": need uint8 or int64");
  }

  Tensor like_logits(const Tensor& tensor, const char* name) const {
    TORCH_CHECK(
        tensor.sizes() == z.sizes() && tensor.scalar_type() == z.scalar_type(), name, " are ", tensor.scalar_type(),
        tensor.sizes(), ": need the logits' ", z.scalar_type(), z.sizes());
    return tensor.contiguous(format);
  }

  Tensor empty_map() const { return at::empty(y.sizes(), z.options().dtype(acc_type(z))); }
  Tensor empty_vector() const { return at::empty({z.size(0)}, z.options().dtype(acc_type(z))); }
  Tensor empty_logits() const { return at::empty(z.sizes(), z.options(), format); }
};

Tensor checked(const Tensor& tensor, at::IntArrayRef sizes, at::ScalarType type, const char* name) {
  TORCH_CHECK(
      tensor.sizes() == sizes && tensor.scalar_type() == type, name, " is ", tensor.scalar_type(), tensor.sizes(),
      ": need ", type, sizes);
  return tensor.contiguous();
}

struct WeightTensors {
  std::optional<Tensor> map;
  Tensor scale, level;
  Weights view;

  WeightTensors(
      const std::optional<Tensor>& w, const Tensor& scale_, const Tensor& level_, const Tensor& y, at::ScalarType type) {
    if (w) map = checked(*w, y.sizes(), type, "the weight map");
    scale = checked(scale_, {y.size(0)}, type, "scale");
    level = checked(level_, {y.size(0)}, type, "level");
    view = {map ? map->const_data_ptr() : nullptr, scale.const_data_ptr(), level.const_data_ptr()};
  }
};

void check_classes(bool good, const Batch& batch) {
  TORCH_CHECK_VALUE(
      good, "masks hold a label that is neither a class id below ", std::max<int64_t>(2, batch.view.channels),
      " nor 255 (ignore)");
}

std::tuple<Tensor, Tensor> alignment(const Tensor& logits, const Tensor& tangents, const Tensor& masks, bool clamp) {
  const Batch batch(logits, masks);
  const Tensor t = batch.like_logits(tangents, "tangents");
  Tensor map = batch.empty_map();
  Tensor sums = at::empty({logits.size(0), kSums}, logits.options().dtype(at::kDouble));
  check_classes(
      kernels().alignment(batch.view, t.const_data_ptr(), clamp, map.mutable_data_ptr(), sums.mutable_data_ptr<double>()),
      batch);
  return {map, sums};
}

Tensor pixel_loss(const Tensor& logits, const Tensor& masks) {
  const Batch batch(logits, masks);
  Tensor loss = batch.empty_map();
  check_classes(kernels().pixel_loss(batch.view, loss.mutable_data_ptr()), batch);
  return loss;
}

std::tuple<Tensor, Tensor> weighted_loss(
    const Tensor& logits, const Tensor& masks, const std::optional<Tensor>& w, const Tensor& scale, const Tensor& level,
    bool gradient) {
  const Batch batch(logits, masks);
  const WeightTensors weights(w, scale, level, batch.y, acc_type(logits));
  Tensor loss = batch.empty_vector();
  Tensor dz = gradient ? batch.empty_logits() : at::empty({0}, logits.options());
  check_classes(
      kernels().weighted_loss(
          batch.view, weights.view, loss.mutable_data_ptr(), gradient ? dz.mutable_data_ptr() : nullptr),
      batch);
  return {loss, dz};
}

std::tuple<Tensor, Tensor, Tensor> weighted_loss_double_backward(
    const Tensor& logits, const Tensor& masks, const std::optional<Tensor>& w, const Tensor& scale, const Tensor& level,
    const Tensor& upstream, const Tensor& cotangent, bool for_logits) {
  const Batch batch(logits, masks);
  const WeightTensors weights(w, scale, level, batch.y, acc_type(logits));
  const Tensor up = checked(upstream, {logits.size(0)}, acc_type(logits), "upstream");
  const Tensor c = batch.like_logits(cotangent, "cotangents");
  Tensor cot_z = for_logits ? batch.empty_logits() : at::empty({0}, logits.options());
  Tensor cot_w = batch.empty_map(), cot_upstream = batch.empty_vector();
  check_classes(
      kernels().weighted_loss_double_backward(
          batch.view, weights.view, up.const_data_ptr(), c.const_data_ptr(),
          for_logits ? cot_z.mutable_data_ptr() : nullptr, cot_w.mutable_data_ptr(), cot_upstream.mutable_data_ptr()),
      batch);
  return {cot_z, cot_w, cot_upstream};
}

Tensor dice_cross_entropy_sums(
    const Tensor& logits, const Tensor& masks, const std::optional<Tensor>& w, const Tensor& scale, const Tensor& level,
    const Tensor& class_weights) {
  const Batch batch(logits, masks);
  const WeightTensors weights(w, scale, level, batch.y, acc_type(logits));
  const int64_t images = logits.size(0), channels = logits.size(1);
  const Tensor v = checked(class_weights, {images, std::max<int64_t>(2, channels)}, acc_type(logits), "class_weights");
  Tensor sums = at::empty({images, 2 + 3 * channels}, logits.options().dtype(at::kDouble));
  check_classes(
      kernels().dice_cross_entropy_sums(
          batch.view, weights.view, v.const_data_ptr(), sums.mutable_data_ptr<double>()),
      batch);
  return sums;
}

Tensor dice_cross_entropy_gradient(
    const Tensor& logits, const Tensor& masks, const std::optional<Tensor>& w, const Tensor& scale, const Tensor& level,
    const Tensor& class_weights, const Tensor& inside, const Tensor& outside) {
  const Batch batch(logits, masks);
  const WeightTensors weights(w, scale, level, batch.y, acc_type(logits));
  const int64_t images = logits.size(0), channels = logits.size(1);
  const Tensor v = checked(class_weights, {images, std::max<int64_t>(2, channels)}, acc_type(logits), "class_weights");
  const Tensor in = checked(inside, {images, channels}, acc_type(logits), "inside");
  const Tensor out = checked(outside, {images, channels}, acc_type(logits), "outside");
  Tensor gradient = batch.empty_logits();
  check_classes(
      kernels().dice_cross_entropy_gradient(
          batch.view, weights.view, v.const_data_ptr(), in.const_data_ptr(), out.const_data_ptr(),
          gradient.mutable_data_ptr()),
      batch);
  return gradient;
}

std::tuple<Tensor, Tensor> positive_part(const Tensor& u, const Tensor& masks, int64_t cell) {
  TORCH_CHECK(u.scalar_type() == at::kFloat || u.scalar_type() == at::kDouble, "the map is ", u.scalar_type(), ": need float32 or float64");
  TORCH_CHECK(u.dim() == 3 && masks.sizes() == u.sizes(), "map ", u.sizes(), " and masks ", masks.sizes(), ": need (B, H, W)");
  TORCH_CHECK(cell > 0, "cell is ", cell, ": need at least 1");
  Batch::check_labels(masks);
  const Tensor from = u.contiguous(), y = masks.contiguous();
  Tensor map = at::empty_like(from);
  Tensor sums = at::empty({u.size(0), kSums}, u.options().dtype(at::kDouble));
  kernels().positive_part(
      from.const_data_ptr(), u.scalar_type() == at::kDouble, y.const_data_ptr(), y.scalar_type() == at::kByte, u.size(0),
      u.size(1), u.size(2), cell, map.mutable_data_ptr(), sums.mutable_data_ptr<double>());
  return {map, sums};
}

Tensor normalise(const std::optional<Tensor>& w, const Tensor& masks, const Tensor& scale, const Tensor& level) {
  TORCH_CHECK(scale.scalar_type() == at::kFloat || scale.scalar_type() == at::kDouble, "scale is ", scale.scalar_type(), ": need float32 or float64");
  TORCH_CHECK(masks.dim() == 3, "masks are ", masks.sizes(), ": need (B, H, W)");
  Batch::check_labels(masks);
  const Tensor y = masks.contiguous();
  const WeightTensors weights(w, scale, level, y, scale.scalar_type());
  Tensor map = at::empty(y.sizes(), scale.options());
  kernels().normalise(
      weights.view, scale.scalar_type() == at::kDouble, y.const_data_ptr(), y.scalar_type() == at::kByte, y.size(0),
      y.size(1) * y.size(2), map.mutable_data_ptr());
  return map;
}

Tensor signed_distance_bins(
    const Tensor& masks, int64_t classes, std::vector<int64_t> outside, std::vector<int64_t> inside, int64_t area) {
  TORCH_CHECK(masks.dim() == 3, "masks are ", masks.sizes(), ": need (N, H, W)");
  TORCH_CHECK(classes > 1 && classes < 256, classes, " classes: need 2 to 255");
  Batch::check_labels(masks);
  TORCH_CHECK(
      masks.size(1) <= kLongestSide && masks.size(2) <= kLongestSide, "masks are ", masks.sizes(), ": at most ",
      kLongestSide, " pixels a side");
  const Tensor y = masks.contiguous();
  Tensor bins = at::empty(y.sizes(), y.options().dtype(at::kByte));
  label_kernels().signed_distance_bins(
      y.const_data_ptr(), y.scalar_type() == at::kByte, y.size(0), y.size(1), y.size(2), classes, outside, inside,
      area, bins.mutable_data_ptr<uint8_t>());
  return bins;
}

std::tuple<Tensor, Tensor> correct_labels(
    const Tensor& logits, const Tensor& masks, const Tensor& bins, const Tensor& annotators, const Tensor& tables,
    const Tensor& calibration) {
  const Batch batch(logits, masks);
  const int64_t images = logits.size(0), classes = std::max<int64_t>(2, logits.size(1));
  TORCH_CHECK(bins.dim() == 4, "bins are ", bins.sizes(), ": need (B, R, H, W)");
  TORCH_CHECK(tables.dim() == 3 && tables.size(2) < 256, "tables are ", tables.sizes(), ": need (A, K, M), M < 256");
  const int64_t annotations = bins.size(1), bin_count = tables.size(2);
  const Tensor drawn = checked(bins, {images, annotations, logits.size(2), logits.size(3)}, at::kByte, "bins");
  const Tensor owners = checked(annotators, {images, annotations}, at::kLong, "annotators");
  const Tensor said = checked(tables, {tables.size(0), classes, bin_count}, acc_type(logits), "tables");
  const Tensor fit = checked(calibration, {classes}, acc_type(logits), "calibration");
  Tensor labels = at::empty_like(batch.y);
  Tensor counts = at::empty({images, annotations, classes, bin_count}, said.options().dtype(at::kDouble));
  const Annotations view{
      drawn.const_data_ptr<uint8_t>(), owners.const_data_ptr<int64_t>(), annotations,
      said.const_data_ptr(), tables.size(0), bin_count};
  check_classes(
      label_kernels().correct_labels(
          batch.view, view, fit.const_data_ptr(), labels.mutable_data_ptr(), counts.mutable_data_ptr<double>()),
      batch);
  return {labels, counts};
}

}  // namespace

TORCH_LIBRARY(distseg, m) {
  m.def("alignment(Tensor logits, Tensor tangents, Tensor masks, bool clamp) -> (Tensor, Tensor)");
  m.def("pixel_loss(Tensor logits, Tensor masks) -> Tensor");
  m.def(
      "weighted_loss(Tensor logits, Tensor masks, Tensor? weights, Tensor scale, Tensor level, bool gradient)"
      " -> (Tensor, Tensor)");
  m.def(
      "weighted_loss_double_backward(Tensor logits, Tensor masks, Tensor? weights, Tensor scale, Tensor level,"
      " Tensor upstream, Tensor cotangent, bool for_logits) -> (Tensor, Tensor, Tensor)");
  m.def(
      "dice_cross_entropy_sums(Tensor logits, Tensor masks, Tensor? weights, Tensor scale, Tensor level,"
      " Tensor class_weights) -> Tensor");
  m.def(
      "dice_cross_entropy_gradient(Tensor logits, Tensor masks, Tensor? weights, Tensor scale, Tensor level,"
      " Tensor class_weights, Tensor inside, Tensor outside) -> Tensor");
  m.def("positive_part(Tensor alignment, Tensor masks, int cell) -> (Tensor, Tensor)");
  m.def("normalise(Tensor? positive, Tensor masks, Tensor scale, Tensor level) -> Tensor");
  m.def("signed_distance_bins(Tensor masks, int classes, int[] outside, int[] inside, int area=0) -> Tensor");
  m.def(
      "correct_labels(Tensor logits, Tensor masks, Tensor bins, Tensor annotators, Tensor tables, Tensor calibration)"
      " -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(distseg, CPU, m) {
  m.impl("alignment", alignment);
  m.impl("pixel_loss", pixel_loss);
  m.impl("weighted_loss", weighted_loss);
  m.impl("weighted_loss_double_backward", weighted_loss_double_backward);
  m.impl("dice_cross_entropy_sums", dice_cross_entropy_sums);
  m.impl("dice_cross_entropy_gradient", dice_cross_entropy_gradient);
  m.impl("positive_part", positive_part);
  m.impl("normalise", normalise);
  m.impl("signed_distance_bins", signed_distance_bins);
  m.impl("correct_labels", correct_labels);
}

}  // namespace distseg

PYBIND11_MODULE(_C, m) {
  m.def("instruction_set", []() { return distseg::kernels().name; }, "What the kernels in use were compiled for.");
}
