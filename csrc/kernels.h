// What a kernel is told, and the table of kernels of one instruction set. Pointers only: the tensors, their checks and
// their allocation are in operators.cpp.
//
// z logits, t tangents or cotangents: (B, C, P) in `type`, P = H·W pixels, contiguous or, if `channels_last`, (B, P, C).
// y masks: (B, P) uint8 or int64, 255 = ignored. Maps (B, P) and vectors (B,) are in acc: double for double logits, else
// float. C = 1 is binary, C ≥ 2 a softmax. Weights are w̃ = scale·w + level at valid pixels, w = 0 without a map.
#pragma once

#include <c10/core/ScalarType.h>
#include <cstdint>
#include <vector>

namespace distseg {

struct Logits {
  const void* z;
  c10::ScalarType type;
  int64_t batch, channels, pixels;
  bool channels_last;
  const void* y;
  bool byte_labels;
};

struct Weights {
  const void* map;  // may be null
  const void* scale;
  const void* level;
};

// Of each image: ΣU, ΣU⁺, Σ(U⁺)², valid pixels, valid pixels where U⁺ = 0.
constexpr int64_t kSums = 5;

// Kernels that read labels return false when one of them is no class id; what they wrote is then meaningless.
struct Kernels {
  const char* name;
  bool (*alignment)(const Logits&, const void* t, bool clamp, void* map, double* sums);
  bool (*pixel_loss)(const Logits&, void* loss);
  bool (*weighted_loss)(const Logits&, const Weights&, void* loss, void* gradient);  // gradient may be null
  bool (*weighted_loss_double_backward)(
      const Logits&, const Weights&, const void* upstream, const void* cotangent,
      void* cot_z, void* cot_w, void* cot_upstream);  // cot_z may be null
  // class_weights (B, max(2, C)); sums (B, 2 + 3C): Σ w̃·v·ℓ, Σ w̃, and by channel Σ w̃·p where it is the label, Σ w̃·p,
  // Σ w̃ where it is the label. inside, outside (B, C): the slope in p is outside, and inside more where it is the label.
  bool (*dice_cross_entropy_sums)(const Logits&, const Weights&, const void* class_weights, double* sums);
  bool (*dice_cross_entropy_gradient)(
      const Logits&, const Weights&, const void* class_weights, const void* inside, const void* outside,
      void* gradient);
  void (*positive_part)(
      const void* u, bool is_double, const void* y, bool byte_labels, int64_t batch, int64_t height, int64_t width,
      int64_t cell, void* map, double* sums);
  void (*normalise)(
      const Weights&, bool is_double, const void* y, bool byte_labels, int64_t batch, int64_t pixels, void* map);
};

// The most pixels of a side of a mask: squared distances between any two fit an int.
constexpr int64_t kLongestSide = 16384;

// What R annotators drew of each image: bins (B, R, P), their numbers (B, R), and tables (A, K, M) in acc, K = max(2, C).
struct Annotations {
  const uint8_t* bins;
  const int64_t* annotators;
  int64_t count;
  const void* tables;
  int64_t tables_count, bin_count;
};

// Of the label model. A pixel's side is its class where an object of one of the classes below `classes` was drawn, else 0.
struct LabelKernels {
  // bins (N, H, W) from masks y (N, H, W); edges in twentieths of the object's size, outside and inside its contour.
  // `given`: the area of all objects, that their sizes are of; 0: their own.
  void (*signed_distance_bins)(
      const void* y, bool byte_labels, int64_t images, int64_t height, int64_t width, int64_t classes,
      const std::vector<int64_t>& outside, const std::vector<int64_t>& inside, int64_t given,
      uint8_t* bins);
  // calibration (K,) in acc; labels (B, P) like y, counts (B, R, K, M).
  bool (*correct_labels)(
      const Logits&, const Annotations&, const void* calibration, void* labels, double* counts);
};

extern const Kernels kernels_DEFAULT;
extern const LabelKernels label_kernels_DEFAULT;
#ifdef DISTSEG_X86
extern const Kernels kernels_AVX2;
extern const Kernels kernels_AVX512;
extern const LabelKernels label_kernels_AVX2;
extern const LabelKernels label_kernels_AVX512;
#endif

}  // namespace distseg
