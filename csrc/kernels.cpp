// The kernels between logits and gradient, compiled once for each instruction set: tiles.h.

#include "tiles.h"

#include <atomic>

namespace distseg {
namespace {

// The loss of a vector of pixels and what its derivatives are made of.
//
// Binary: with s = 1 − 2y, ℓ = softplus(s·z) and ∂ℓ/∂z = s·σ(s·z), both exact near 0; e = exp(−|z|).
// Softmax: `probability` holds its C vectors.
template <typename acc_t, bool binary>
struct Point {
  using Vec = Vectorized<acc_t>;
  Vec label, valid, loss, slope, curvature;
  acc_t* probability;

  // `count` lanes of the rows are there. An ignored pixel counts as logit 0, so that a NaN there reaches nothing; what
  // it gives is finite, and of no use.
  template <bool with_loss>
  void evaluate(const Rows<const acc_t>& z, int64_t channels, int64_t i, int64_t count, const acc_t* labels) {
    const Vec zero(0), one(1);
    label = Vec::loadu(labels + i);
    valid = label != Vec(static_cast<acc_t>(kIgnore));
    if constexpr (binary) {
      const Vec sign = one - label - label;
      const Vec against = sign * load(z[0] + i, count);
      const Vec e = exp(against.abs().neg());
      if constexpr (with_loss && std::is_same_v<acc_t, float>) {
        // log(1 + e) = 2 artanh(a), a = e / (2 + e) ≤ 1/3, by its series; one division serves both quotients.
        const Vec one_e = one + e, two_e = one_e + one;
        const Vec over = one / (one_e * two_e);
        sigmoid(against, e, over * two_e, sign);
        const Vec a = e * over * one_e, square = a * a;
        Vec series(2.f / 17);
        for (const float term : {2.f / 15, 2.f / 13, 2.f / 11, 2.f / 9, 2.f / 7, 2.f / 5, 2.f / 3, 2.f})
          series = at::vec::fmadd(series, square, Vec(term));
        loss = at::vec::fmadd(series, a, at::vec::clamp_min(against, zero));
      } else {
        sigmoid(against, e, one / (one + e), sign);
        if constexpr (with_loss) loss = at::vec::clamp_min(against, zero) + e.log1p();
      }
    } else {
      Vec most = load(z[0] + i, count);  // a NaN is lost here, and reaches the sum by its own exponential
      for (int64_t c = 1; c < channels; ++c) most = at::vec::clamp_min(load(z[c] + i, count), most);
      Vec sum = zero, chosen = zero;
      for (int64_t c = 0; c < channels; ++c) {
        const Vec logit = load(z[c] + i, count) - most;
        const Vec e = exp(logit);
        e.store(probability + c * Vec::size());
        sum = sum + e;
        if constexpr (with_loss) chosen = chosen + (logit & is_label(c));
      }
      if constexpr (with_loss) loss = sum.log() - chosen;
      const Vec scale = one / sum;
      for (int64_t c = 0; c < channels; ++c)
        (Vec::loadu(probability + c * Vec::size()) * scale).store(probability + c * Vec::size());
    }
  }

  void sigmoid(Vec against, Vec e, Vec over_one_e, Vec sign) {
    const Vec above = at::vec::clamp_min(e, Vec(1) & (against >= Vec(0)));  // e ≤ 1 below 0, 1 above it
    slope = sign * above * over_one_e;
    curvature = e * over_one_e * over_one_e;
  }

  // `count` values of which the ignored pixels' are 0.
  Vec load(const acc_t* from, int64_t count) const {
    return (count == Vec::size() ? Vec::loadu(from) : Vec::loadu(from, count)) & valid;
  }

  Vec is_label(int64_t c) const { return label == Vec(static_cast<acc_t>(c)); }

  Vec softmax(int64_t c) const { return Vec::loadu(probability + c * Vec::size()); }

  // ∂ℓ/∂z_c.
  Vec residual(int64_t c) const {
    if constexpr (binary) return slope;
    return softmax(c) - (Vec(1) & is_label(c));
  }

  // Of class c, or of class 1 where there is one channel; finite, and of no use, at an ignored pixel.
  Vec class_probability(int64_t c) const {
    if constexpr (binary) return slope + (Vec(1) & is_label(1));
    return softmax(c);
  }

  // The element of `factors`, one a class, that belongs to the label; 0 at an ignored pixel.
  Vec class_weight(const acc_t* factors, int64_t channels) const {
    Vec factor(0);
    for (int64_t c = 0; c < std::max<int64_t>(2, channels); ++c) factor = factor + (Vec(factors[c]) & is_label(c));
    return factor;
  }

  Vec aligned(const Rows<const acc_t>& t, int64_t channels, int64_t i, int64_t count) const {
    Vec sum(0);
    for (int64_t c = 0; c < channels; ++c) sum = at::vec::fmadd(residual(c), load(t[c] + i, count), sum);
    return sum;
  }
};

template <typename acc_t>
struct ImageWeights {
  using Vec = Vectorized<acc_t>;
  const acc_t* map;
  Vec scale, level;

  ImageWeights(const Weights& weights, int64_t image, int64_t pixels)
      : map(weights.map ? static_cast<const acc_t*>(weights.map) + image * pixels : nullptr),
        scale(static_cast<const acc_t*>(weights.scale)[image]),
        level(static_cast<const acc_t*>(weights.level)[image]) {}

  Vec at(int64_t pixel, int64_t count, Vec valid) const {
    const Vec weight = map ? at::vec::fmadd(scale, Vec::loadu(map + pixel, count), level) : level;
    return weight & valid;
  }
};

// ΣU, ΣU⁺, Σ(U⁺)², valid, zero over a tile.
template <typename acc_t>
struct Sums {
  using Vec = Vectorized<acc_t>;
  Vec aligned{0}, positive{0}, squares{0}, valid{0}, zeros{0};

  void add(Vec u, Vec u_positive, Vec is_valid) {
    const Vec zero(0), one(1);
    aligned = aligned + u;
    positive = positive + u_positive;
    squares = at::vec::fmadd(u_positive, u_positive, squares);
    valid = valid + (one & is_valid);
    zeros = zeros + (one & is_valid & (u_positive == zero));
  }

  void write(double* sums) const {
    sums[0] = total(aligned), sums[1] = total(positive), sums[2] = total(squares);
    sums[3] = total(valid), sums[4] = total(zeros);
  }
};

// Runs body(point, rows of z, image, first pixel, pixels, sums) over all tiles; false if a label is no class id.
template <typename scalar_t, bool binary, typename Body>
bool over_tiles(const Logits& in, int64_t count, double* sums, const Body& body) {
  using acc_t = acc_of<scalar_t>;
  const Layout<scalar_t> layout(in);
  std::atomic<bool> good{true};
  for_each_tile(
      in.batch, in.pixels, layout.tile, in.channels * layout.tile, count, sums,
      [&](int64_t begin, int64_t end, const auto& run) {
        std::vector<acc_t> labels(layout.tile), buffer(layout.buffer_size());
        std::vector<acc_t> probability(in.channels * Vectorized<acc_t>::size());
        Point<acc_t, binary> point;
        point.probability = probability.data();
        auto worker = body(layout);
        for (int64_t index = begin; index < end; ++index) {
          run(index, [&](int64_t image, int64_t first, int64_t n, double* partial) {
            if (!read_labels(in.y, in.byte_labels, image * in.pixels + first, n, std::max<int64_t>(2, in.channels), labels.data()))
              good = false;
            worker(point, layout.read(in.z, image, first, n, buffer.data()), labels.data(), image, first, n, partial);
          });
        }
      });
  return good;
}

// ---- the operators ---------------------------------------------------------------------------------------------------

bool alignment(const Logits& in, const void* t, bool clamp, void* map, double* sums) {
  return dispatch(in, [&](auto scalar, auto binary) {
    using scalar_t = decltype(scalar);
    using acc_t = acc_of<scalar_t>;
    using Vec = Vectorized<acc_t>;
    return over_tiles<scalar_t, binary.value>(in, kSums, sums, [&](const Layout<scalar_t>& layout) {
      return [&, tangents = std::vector<acc_t>(layout.buffer_size())](
                 auto& point, const auto& z, const acc_t* labels, int64_t image, int64_t first, int64_t n, double* partial) mutable {
        const auto rows = layout.read(t, image, first, n, tangents.data());
        acc_t* out = static_cast<acc_t*>(map) + image * in.pixels + first;
        Sums<acc_t> tile;
        for_each_vector<Vec>(n, [&](int64_t i, auto lanes) {
          point.template evaluate<false>(z, in.channels, i, lanes, labels);
          const Vec u = point.aligned(rows, in.channels, i, lanes);
          const Vec positive = at::vec::clamp_min(u, Vec(0));
          (clamp ? positive : u).store(out + i, lanes);
          tile.add(u, positive, point.valid);
        });
        tile.write(partial);
      };
    });
  });
}

bool pixel_loss(const Logits& in, void* loss) {
  return dispatch(in, [&](auto scalar, auto binary) {
    using scalar_t = decltype(scalar);
    using acc_t = acc_of<scalar_t>;
    using Vec = Vectorized<acc_t>;
    return over_tiles<scalar_t, binary.value>(in, 0, nullptr, [&](const Layout<scalar_t>&) {
      return [&](auto& point, const auto& z, const acc_t* labels, int64_t image, int64_t first, int64_t n, double*) {
        acc_t* out = static_cast<acc_t*>(loss) + image * in.pixels + first;
        for_each_vector<Vec>(n, [&](int64_t i, auto lanes) {
          point.template evaluate<true>(z, in.channels, i, lanes, labels);
          (point.loss & point.valid).store(out + i, lanes);
        });
      };
    });
  });
}

bool weighted_loss(const Logits& in, const Weights& weights, void* loss, void* gradient) {
  return dispatch(in, [&](auto scalar, auto binary) {
    using scalar_t = decltype(scalar);
    using acc_t = acc_of<scalar_t>;
    using Vec = Vectorized<acc_t>;
    std::vector<double> sums(in.batch);
    const bool good = over_tiles<scalar_t, binary.value>(in, 1, sums.data(), [&](const Layout<scalar_t>& layout) {
      return [&, gradients = std::vector<acc_t>(layout.buffer_size())](
                 auto& point, const auto& z, const acc_t* labels, int64_t image, int64_t first, int64_t n, double* partial) mutable {
        const ImageWeights<acc_t> weight(weights, image, in.pixels);
        const auto out = gradient ? layout.target(gradient, image, first, gradients.data()) : Rows<acc_t>{nullptr, 0};
        Vec sum(0);
        for_each_vector<Vec>(n, [&](int64_t i, auto lanes) {
          point.template evaluate<true>(z, in.channels, i, lanes, labels);
          const Vec w = weight.at(first + i, lanes, point.valid);
          sum = at::vec::fmadd(w, point.loss, sum);
          if (gradient)
            for (int64_t c = 0; c < in.channels; ++c) (w * point.residual(c)).store(out[c] + i, lanes);
        });
        *partial = total(sum);
        if (gradient) layout.write(gradient, image, first, n, gradients.data());
      };
    });
    std::copy(sums.begin(), sums.end(), static_cast<acc_t*>(loss));
    return good;
  });
}

bool weighted_loss_double_backward(
    const Logits& in, const Weights& weights, const void* upstream, const void* cotangent,
    void* cot_z, void* cot_w, void* cot_upstream) {
  return dispatch(in, [&](auto scalar, auto binary) {
    using scalar_t = decltype(scalar);
    using acc_t = acc_of<scalar_t>;
    using Vec = Vectorized<acc_t>;
    std::vector<double> sums(in.batch);
    const bool good = over_tiles<scalar_t, binary.value>(in, 1, sums.data(), [&](const Layout<scalar_t>& layout) {
      return [&, cotangents = std::vector<acc_t>(layout.buffer_size()), results = std::vector<acc_t>(layout.buffer_size())](
                 auto& point, const auto& z, const acc_t* labels, int64_t image, int64_t first, int64_t n, double* partial) mutable {
        const ImageWeights<acc_t> weight(weights, image, in.pixels);
        const Vec up(static_cast<const acc_t*>(upstream)[image]);
        const auto rows = layout.read(cotangent, image, first, n, cotangents.data());
        const auto out = cot_z ? layout.target(cot_z, image, first, results.data()) : Rows<acc_t>{nullptr, 0};
        acc_t* out_w = static_cast<acc_t*>(cot_w) + image * in.pixels + first;
        Vec sum(0);
        for_each_vector<Vec>(n, [&](int64_t i, auto lanes) {
          point.template evaluate<false>(z, in.channels, i, lanes, labels);
          const Vec aligned = point.aligned(rows, in.channels, i, lanes);
          const Vec w = weight.at(first + i, lanes, point.valid);
          (up * weight.scale * aligned).store(out_w + i, lanes);
          sum = at::vec::fmadd(w, aligned, sum);
          if (!cot_z) return;
          if constexpr (binary.value) {
            (up * w * point.curvature * point.load(rows[0] + i, lanes)).store(out[0] + i, lanes);
          } else {
            Vec mean(0);
            for (int64_t c = 0; c < in.channels; ++c)
              mean = at::vec::fmadd(point.softmax(c), point.load(rows[c] + i, lanes), mean);
            for (int64_t c = 0; c < in.channels; ++c)
              (up * w * point.softmax(c) * (point.load(rows[c] + i, lanes) - mean)).store(out[c] + i, lanes);
          }
        });
        *partial = total(sum);
        if (cot_z) layout.write(cot_z, image, first, n, results.data());
      };
    });
    std::copy(sums.begin(), sums.end(), static_cast<acc_t*>(cot_upstream));
    return good;
  });
}

// The C accumulators of a tile, one vector of pixels each.
template <typename acc_t>
struct ChannelSums {
  using Vec = Vectorized<acc_t>;
  std::vector<acc_t> lanes;

  explicit ChannelSums(int64_t channels) : lanes(channels * Vec::size()) {}
  void clear() { std::fill(lanes.begin(), lanes.end(), acc_t(0)); }
  void add(int64_t c, Vec value) { (Vec::loadu(at(c)) + value).store(at(c)); }
  double sum(int64_t c) { return total(Vec::loadu(at(c))); }
  acc_t* at(int64_t c) { return lanes.data() + c * Vec::size(); }
};

bool dice_cross_entropy_sums(const Logits& in, const Weights& weights, const void* class_weights, double* sums) {
  return dispatch(in, [&](auto scalar, auto binary) {
    using scalar_t = decltype(scalar);
    using acc_t = acc_of<scalar_t>;
    using Vec = Vectorized<acc_t>;
    const int64_t channels = in.channels;
    return over_tiles<scalar_t, binary.value>(in, 2 + 3 * channels, sums, [&](const Layout<scalar_t>&) {
      return [&, both = ChannelSums<acc_t>(channels), predicted = ChannelSums<acc_t>(channels),
              labelled = ChannelSums<acc_t>(channels)](
                 auto& point, const auto& z, const acc_t* labels, int64_t image, int64_t first, int64_t n, double* partial) mutable {
        const ImageWeights<acc_t> weight(weights, image, in.pixels);
        const acc_t* factors = static_cast<const acc_t*>(class_weights) + image * std::max<int64_t>(2, channels);
        for (auto* each : {&both, &predicted, &labelled}) each->clear();
        Vec loss(0), mass(0);
        for_each_vector<Vec>(n, [&](int64_t i, auto lanes) {
          point.template evaluate<true>(z, channels, i, lanes, labels);
          const Vec w = weight.at(first + i, lanes, point.valid);
          mass = mass + w;
          loss = at::vec::fmadd(w * point.class_weight(factors, channels), point.loss, loss);
          for (int64_t c = 0; c < channels; ++c) {
            const Vec is_class = point.is_label(binary.value ? 1 : c), wp = w * point.class_probability(c);
            both.add(c, wp & is_class);
            predicted.add(c, wp);
            labelled.add(c, w & is_class);
          }
        });
        partial[0] = total(loss), partial[1] = total(mass);
        for (int64_t c = 0; c < channels; ++c) {
          partial[2 + c] = both.sum(c);
          partial[2 + channels + c] = predicted.sum(c);
          partial[2 + 2 * channels + c] = labelled.sum(c);
        }
      };
    });
  });
}

bool dice_cross_entropy_gradient(
    const Logits& in, const Weights& weights, const void* class_weights, const void* inside, const void* outside,
    void* gradient) {
  return dispatch(in, [&](auto scalar, auto binary) {
    using scalar_t = decltype(scalar);
    using acc_t = acc_of<scalar_t>;
    using Vec = Vectorized<acc_t>;
    const int64_t channels = in.channels;
    return over_tiles<scalar_t, binary.value>(in, 0, nullptr, [&](const Layout<scalar_t>& layout) {
      return [&, gradients = std::vector<acc_t>(layout.buffer_size())](
                 auto& point, const auto& z, const acc_t* labels, int64_t image, int64_t first, int64_t n, double*) mutable {
        const ImageWeights<acc_t> weight(weights, image, in.pixels);
        const acc_t* factors = static_cast<const acc_t*>(class_weights) + image * std::max<int64_t>(2, channels);
        const acc_t* in_class = static_cast<const acc_t*>(inside) + image * channels;
        const acc_t* anywhere = static_cast<const acc_t*>(outside) + image * channels;
        const auto out = layout.target(gradient, image, first, gradients.data());
        for_each_vector<Vec>(n, [&](int64_t i, auto lanes) {
          point.template evaluate<false>(z, channels, i, lanes, labels);
          const Vec w = weight.at(first + i, lanes, point.valid);
          const Vec v = point.class_weight(factors, channels);
          const auto slope = [&](int64_t c) {  // of the Dice term by the probability of class c
            return (Vec(in_class[c]) & point.is_label(binary.value ? 1 : c)) + Vec(anywhere[c]);
          };
          if constexpr (binary.value) {
            (w * at::vec::fmadd(v, point.slope, slope(0) * point.curvature)).store(out[0] + i, lanes);
          } else {
            Vec mean(0);
            for (int64_t c = 0; c < channels; ++c) mean = at::vec::fmadd(point.softmax(c), slope(c), mean);
            for (int64_t c = 0; c < channels; ++c)
              (w * at::vec::fmadd(v, point.residual(c), point.softmax(c) * (slope(c) - mean))).store(out[c] + i, lanes);
          }
        });
        layout.write(gradient, image, first, n, gradients.data());
      };
    });
  });
}

// No class is looked at, so any label that is not 255 is a valid pixel.
constexpr int64_t kAnyClass = INT32_MAX;

template <typename acc_t>
void clamp_map(const acc_t* u, const void* y, bool byte_labels, int64_t batch, int64_t pixels, acc_t* map, double* sums) {
  using Vec = Vectorized<acc_t>;
  const int64_t size = tile_pixels(1);
  for_each_tile(batch, pixels, size, size, kSums, sums, [&](int64_t begin, int64_t end, const auto& run) {
    std::vector<acc_t> labels(size);
    for (int64_t index = begin; index < end; ++index)
      run(index, [&](int64_t image, int64_t first, int64_t n, double* partial) {
        const int64_t offset = image * pixels + first;
        read_labels(y, byte_labels, offset, n, kAnyClass, labels.data());
        Sums<acc_t> tile;
        for_each_vector<Vec>(n, [&](int64_t i, auto lanes) {
          const Vec valid = Vec::loadu(labels.data() + i) != Vec(static_cast<acc_t>(kIgnore));
          const Vec aligned = Vec::loadu(u + offset + i, lanes) & valid;
          const Vec positive = at::vec::clamp_min(aligned, Vec(0));
          positive.store(map + offset + i, lanes);
          tile.add(aligned, positive, valid);
        });
        tile.write(partial);
      });
  });
}

// One band of patches at a time: its columns are summed over the band's rows, lanes wide, and then patch by patch.
template <typename acc_t>
void patch_shares(
    const acc_t* u, const void* y, bool byte_labels, int64_t batch, int64_t height, int64_t width, int64_t cell,
    acc_t* map, double* sums) {
  std::fill_n(sums, batch * kSums, 0.0);
  if (height == 0 || width == 0) return;
  cell = std::min(cell, std::max(height, width));  // a patch larger than the image is the image
  const int64_t bands = (height + cell - 1) / cell;
  std::vector<double> partial(batch * bands * kSums);
  const int64_t grain = std::max<int64_t>(1, kGrain / (std::min(cell, height) * width));
  at::parallel_for(0, batch * bands, grain, [&](int64_t begin, int64_t end) {
    std::vector<acc_t> labels((width + kLanes - 1) / kLanes * kLanes), column(width), count(width);
    for (int64_t index = begin; index < end; ++index) {
      const int64_t image = index / bands, top = index % bands * cell, bottom = std::min(top + cell, height);
      double* own = partial.data() + index * kSums;
      std::fill(column.begin(), column.end(), acc_t(0));
      std::fill(count.begin(), count.end(), acc_t(0));
      for (int64_t row = top; row < bottom; ++row) {
        const int64_t offset = (image * height + row) * width;
        read_labels(y, byte_labels, offset, width, kAnyClass, labels.data());
        for (int64_t x = 0; x < width; ++x) {
          const bool valid = labels[x] != acc_t(kIgnore);
          column[x] += valid ? u[offset + x] : acc_t(0);
          count[x] += valid ? acc_t(1) : acc_t(0);
        }
      }
      for (int64_t left = 0; left < width; left += cell) {
        const int64_t right = std::min(left + cell, width);
        acc_t sum = 0, valid = 0;
        for (int64_t x = left; x < right; ++x) sum += column[x], valid += count[x];
        const acc_t positive = sum < 0 ? acc_t(0) : sum;  // a NaN stays one
        const acc_t share = positive / std::max(valid, acc_t(1));
        std::fill(column.begin() + left, column.begin() + right, share);
        own[0] += sum, own[1] += share * valid, own[2] += double(share) * share * valid;
        own[3] += valid, own[4] += share == 0 ? valid : acc_t(0);
      }
      for (int64_t row = top; row < bottom; ++row) {
        const int64_t offset = (image * height + row) * width;
        read_labels(y, byte_labels, offset, width, kAnyClass, labels.data());
        for (int64_t x = 0; x < width; ++x) map[offset + x] = labels[x] != acc_t(kIgnore) ? column[x] : acc_t(0);
      }
    }
  });
  for (int64_t index = 0; index < batch * bands; ++index)
    for (int64_t i = 0; i < kSums; ++i) sums[index / bands * kSums + i] += partial[index * kSums + i];
}

void positive_part(
    const void* u, bool is_double, const void* y, bool byte_labels, int64_t batch, int64_t height, int64_t width,
    int64_t cell, void* map, double* sums) {
  const auto run = [&](auto acc) {
    using acc_t = decltype(acc);
    const acc_t* from = static_cast<const acc_t*>(u);
    acc_t* to = static_cast<acc_t*>(map);
    if (cell == 1) return clamp_map(from, y, byte_labels, batch, height * width, to, sums);
    patch_shares(from, y, byte_labels, batch, height, width, cell, to, sums);
  };
  is_double ? run(double()) : run(float());
}

void normalise(const Weights& weights, bool is_double, const void* y, bool byte_labels, int64_t batch, int64_t pixels, void* map) {
  const auto run = [&](auto acc) {
    using acc_t = decltype(acc);
    using Vec = Vectorized<acc_t>;
    const int64_t size = tile_pixels(1);
    for_each_tile(batch, pixels, size, size, 0, nullptr, [&](int64_t begin, int64_t end, const auto& tiles) {
      std::vector<acc_t> labels(size);
      for (int64_t index = begin; index < end; ++index)
        tiles(index, [&](int64_t image, int64_t first, int64_t n, double*) {
          const ImageWeights<acc_t> weight(weights, image, pixels);
          read_labels(y, byte_labels, image * pixels + first, n, kAnyClass, labels.data());
          acc_t* out = static_cast<acc_t*>(map) + image * pixels + first;
          for_each_vector<Vec>(n, [&](int64_t i, auto lanes) {
            const Vec valid = Vec::loadu(labels.data() + i) != Vec(static_cast<acc_t>(kIgnore));
            weight.at(first + i, lanes, valid).store(out + i, lanes);
          });
        });
    });
  };
  is_double ? run(double()) : run(float());
}

}  // namespace

#define DISTSEG_TEXT_(word) #word
#define DISTSEG_TEXT(word) DISTSEG_TEXT_(word)

const Kernels DISTSEG_JOIN(kernels_, CPU_CAPABILITY) = {
    DISTSEG_TEXT(CPU_CAPABILITY), alignment, pixel_loss, weighted_loss, weighted_loss_double_backward,
    dice_cross_entropy_sums, dice_cross_entropy_gradient, positive_part, normalise,
};

}  // namespace distseg
