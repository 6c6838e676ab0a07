// The kernels of the label model, compiled once for each instruction set: tiles.h.

#include "tiles.h"

#include <atomic>
#include <cmath>
#include <memory>

namespace distseg {
namespace {

// ---- signed distance -------------------------------------------------------------------------------------------------
//
// The squared distance D of a pixel to the nearest one of another side, in two passes (Meijster, Roerdink and Hesselink
// 2000): g, the distance to the nearest one in its own column; then along its row the lower envelope of the parabolas
// (x − u)² + g(u)². Beyond the nearest pixel of another side in its own row, whose height is 0, no column can be nearer:
// so each run of pixels of one side is an envelope of its own, between two parabolas of height 0.
//
// With d = √D and A the object's area, the edge k/20 lies beyond the contour at d where d − 1/2 < k/20·√A. That is
// 400 D < k²A + 100 + √(400 k²A), and for integers no root is needed but one of an integer, rounded down.

constexpr int16_t kFar = INT16_MAX;   // more than the side of an image
constexpr int64_t kColumns = 256;     // that one thread takes through an image
constexpr int64_t kSides = 256;

int64_t rounded_root(int64_t square) {
  auto root = static_cast<int64_t>(std::sqrt(static_cast<double>(square)));
  while (root * root > square) --root;
  while ((root + 1) * (root + 1) <= square) ++root;
  return root;
}

// The largest D of which d − 1/2 ≤ edge/20·√area; `open`: < in place of ≤. No area is no edge.
int32_t squared_edge(int64_t edge, int64_t area, bool open) {
  const int64_t square = edge * edge * area;
  return static_cast<int32_t>((rounded_root(std::max<int64_t>(400 * square - open, 0)) + 100 + square) / 400);
}

struct Columns {
  const void* y;
  bool byte_labels;
  int64_t height, width, classes;

  // The sides of a stretch of a row.
  void read(int64_t offset, int64_t n, uint8_t* sides) const {
    const auto copy = [&](const auto* from) {
      for (int64_t i = 0; i < n; ++i) {
        const auto label = from[offset + i];
        sides[i] = label > 0 && label < classes ? static_cast<uint8_t>(label) : 0;
      }
    };
    byte_labels ? copy(static_cast<const uint8_t*>(y)) : copy(static_cast<const int64_t*>(y));
  }

  // Sides, g and the area of each class in columns [left, left + n) of an image.
  void run(int64_t image, int64_t left, int64_t n, uint8_t* sides, int16_t* g, int64_t* areas) const {
    for (int64_t row = 0; row < height; ++row) {
      const int64_t at = (image * height + row) * width + left;
      uint8_t* own = sides + at;
      int16_t* distance = g + at;
      read(at, n, own);
      for (int64_t side = 1; side < classes; ++side) {
        int32_t count = 0;
        for (int64_t i = 0; i < n; ++i) count += own[i] == side;
        areas[side] += count;
      }
      if (row == 0) {
        std::fill_n(distance, n, kFar);
      } else {
        for (int64_t i = 0; i < n; ++i) distance[i] = beyond(own[i], own[i - width], distance[i - width]);
      }
    }
    std::vector<int16_t> below(n, kFar);
    for (int64_t row = height - 2; row >= 0; --row) {
      const int64_t at = (image * height + row) * width + left;
      const uint8_t* own = sides + at;
      int16_t* distance = g + at;
      for (int64_t i = 0; i < n; ++i) {
        below[i] = beyond(own[i], own[i + width], below[i]);
        distance[i] = std::min(distance[i], below[i]);
      }
    }
  }

  // An ignored pixel has no bin.
  void mark_ignored(int64_t offset, int64_t n, uint8_t* bins) const {
    const auto mark = [&](const auto* from) {
      for (int64_t i = 0; i < n; ++i) bins[i] = from[offset + i] == kIgnore ? static_cast<uint8_t>(kIgnore) : bins[i];
    };
    byte_labels ? mark(static_cast<const uint8_t*>(y)) : mark(static_cast<const int64_t*>(y));
  }

  // The distance to another side, from that of the neighbour.
  static int16_t beyond(uint8_t own, uint8_t neighbour, int16_t distance) {
    const int16_t further = static_cast<int16_t>(distance + (distance < kFar));
    return own == neighbour ? further : int16_t(1);
  }
};

// One row at a time: D of its pixels.
class Envelope {
 public:
  explicit Envelope(int64_t width) : sites_(width + 2), starts_(width + 2), heights_(width + 2) {}

  // D of pixels [first, last), which are of one side; the pixels beside them, if there are any, are of others.
  void run(const int16_t* g, int32_t first, int32_t last, int32_t width, int32_t* squared) {
    size_ = 0;
    if (first > 0) add(first - 1, 0, first, last);
    for (int32_t x = first; x < last; ++x)
      if (g[x] < kFar) add(x, int32_t(g[x]) * g[x], first, last);
    if (last < width) add(last, 0, first, last);
    int32_t end = last;
    for (int64_t k = size_ - 1; k >= 0; --k) {
      for (int32_t x = starts_[k]; x < end; ++x) squared[x] = (x - sites_[k]) * (x - sites_[k]) + heights_[k];
      end = starts_[k];
    }
    if (size_ == 0) std::fill(squared + first, squared + last, INT32_MAX);
  }

 private:
  void add(int32_t site, int32_t height, int32_t first, int32_t last) {
    const auto at = [&](int64_t k) { return (starts_[k] - sites_[k]) * (starts_[k] - sites_[k]) + heights_[k]; };
    while (size_ && at(size_ - 1) > (starts_[size_ - 1] - site) * (starts_[size_ - 1] - site) + height) --size_;
    int32_t start = first;
    if (size_) {
      const int32_t other = sites_[size_ - 1];
      start = 1 + (site * site - other * other + height - heights_[size_ - 1]) / (2 * (site - other));
      if (start >= last) return;
    }
    sites_[size_] = site, starts_[size_] = start, heights_[size_] = height, ++size_;
  }

  std::vector<int32_t> sites_, starts_, heights_;  // of the parabolas, and the first pixel that each is lowest at
  int64_t size_ = 0;
};

void signed_distance_bins(
    const void* y, bool byte_labels, int64_t images, int64_t height, int64_t width, int64_t classes,
    const std::vector<int64_t>& outside, const std::vector<int64_t>& inside, int64_t given, uint8_t* bins) {
  const int64_t pixels = height * width, blocks = (width + kColumns - 1) / kColumns;
  if (images * pixels == 0) return;
  const std::unique_ptr<uint8_t[]> sides(new uint8_t[images * pixels]);
  const std::unique_ptr<int16_t[]> g(new int16_t[images * pixels]);
  std::vector<int64_t> areas(images * blocks * kSides);
  const Columns columns{y, byte_labels, height, width, classes};
  at::parallel_for(0, images * blocks, std::max<int64_t>(1, kGrain / (height * std::min(width, kColumns))), [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t left = index % blocks * kColumns;
      columns.run(index / blocks, left, std::min(kColumns, width - left), sides.get(), g.get(), &areas[index * kSides]);
    }
  });
  // Of each side of each image, its edges: side 0 lies outside the objects.
  const size_t count = std::max(outside.size(), inside.size());
  std::vector<int32_t> edges(images * kSides * count);
  std::vector<char> empty(images);
  for (int64_t image = 0; image < images; ++image) {
    int64_t all = 0;
    for (int64_t side = 1; side < classes; ++side) {
      int64_t area = 0;
      for (int64_t block = 0; block < blocks; ++block) area += areas[(image * blocks + block) * kSides + side];
      for (size_t k = 0; k < inside.size(); ++k)
        edges[(image * kSides + side) * count + k] = squared_edge(inside[k], given ? given : area, false);
      all += area;
    }
    for (size_t k = 0; k < outside.size(); ++k)
      edges[image * kSides * count + k] = squared_edge(outside[k], given ? given : all, true);
    empty[image] = all == 0;
  }
  const int64_t within = inside.size() + 1, without = outside.size() + 1;
  at::parallel_for(0, images * height, std::max<int64_t>(1, kGrain / width), [&](int64_t begin, int64_t end) {
    Envelope envelope(width);
    std::vector<int32_t> squared(width);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t image = row / height;
      const uint8_t* side = sides.get() + row * width;
      uint8_t* out = bins + row * width;
      if (empty[image]) {
        std::fill_n(out, width, static_cast<uint8_t>(without + within * (classes - 1)));
      } else {
        for (int64_t first = 0, last = 0; first < width; first = last) {
          while (last < width && side[last] == side[first]) ++last;
          envelope.run(g.get() + row * width, first, last, width, squared.data());
          const int32_t* edge = &edges[(image * kSides + side[first]) * count];
          const int64_t lowest = side[first] ? without + within * (side[first] - 1) : 0;
          const size_t steps = side[first] ? inside.size() : outside.size();
          std::fill(out + first, out + last, static_cast<uint8_t>(lowest));
          for (size_t k = 0; k < steps; ++k) {
            if (side[first]) {
              for (int64_t x = first; x < last; ++x) out[x] += squared[x] > edge[k];
            } else {
              for (int64_t x = first; x < last; ++x) out[x] += squared[x] <= edge[k];
            }
          }
        }
      }
      columns.mark_ignored(row * width, width, out);
    }
  });
}

// ---- correction ------------------------------------------------------------------------------------------------------

constexpr int64_t kBins = 256;           // of a row of a table: a bin that there is not says nothing
constexpr int64_t kPixelsOfCount = 16;   // at least, for each number that a thread counts

// The posterior of each tile's pixels; the classes are rows of pixels, as those of the logits are.
template <typename acc_t, bool binary>
void posterior(
    const Rows<const acc_t>& z, const acc_t* calibration, int64_t classes, int64_t n, int64_t tile, acc_t* labels,
    acc_t* rows) {
  using Vec = Vectorized<acc_t>;
  for_each_vector<Vec>(n, [&](int64_t i, auto lanes) {
    const Vec label = Vec::loadu(labels + i), valid = label != Vec(static_cast<acc_t>(kIgnore));
    const auto logit = [&](int64_t c) {
      return (lanes == Vec::size() ? Vec::loadu(z[c] + i) : Vec::loadu(z[c] + i, lanes)) & valid;
    };
    const Vec first = binary ? Vec(0) : logit(0), scale(calibration[0]);
    Vec most, best(0);
    for (int64_t c = 0; c < classes; ++c) {
      acc_t* row = rows + c * tile + i;
      Vec u = Vec::loadu(row);
      if (c > 0) u = at::vec::fmadd(scale, logit(binary ? 0 : c) - first, Vec(calibration[c])) + u;
      else if constexpr (!binary) u = scale * (first - first) + u;  // a NaN stays one
      u.store(row);
      best = c ? Vec::blendv(best, Vec(static_cast<acc_t>(c)), u > most) : best;
      most = c ? at::vec::clamp_min(u, most) : u;  // a NaN is lost here, and reaches the sum by its own exponential
    }
    Vec sum(0);
    for (int64_t c = 0; c < classes; ++c) {
      acc_t* row = rows + c * tile + i;
      const Vec e = exp(Vec::loadu(row) - most);
      e.store(row);
      sum = sum + e;
    }
    const Vec share = Vec(1) / sum;
    for (int64_t c = 0; c < classes; ++c) {
      acc_t* row = rows + c * tile + i;
      ((Vec::loadu(row) * share) & valid).store(row);
    }
    Vec::blendv(label, best, valid & (sum == sum)).store(labels + i);
  });
}

// What an annotation of an image says in each bin: K rows of kBins numbers, 0 where it says nothing.
template <typename acc_t>
void copy_table(const Annotations& drawn, int64_t classes, int64_t annotator, acc_t* said) {
  std::fill_n(said, classes * kBins, acc_t(0));
  if (annotator < 0 || annotator >= drawn.tables_count) return;
  const acc_t* table = static_cast<const acc_t*>(drawn.tables) + annotator * classes * drawn.bin_count;
  for (int64_t c = 0; c < classes; ++c) std::copy_n(table + c * drawn.bin_count, drawn.bin_count, said + c * kBins);
}

bool correct_labels(
    const Logits& in, const Annotations& all, const void* calibration, void* labels, double* counts) {
  const int64_t classes = std::max<int64_t>(2, in.channels), annotations = all.count, bin_count = all.bin_count;
  const int64_t numbers = annotations * classes * bin_count;
  return dispatch(in, [&](auto scalar, auto binary) {
    using scalar_t = decltype(scalar);
    using acc_t = acc_of<scalar_t>;
    const Layout<scalar_t> layout(in);
    const int64_t tile = layout.tile;
    // A thread's counts are few beside the pixels that it counts.
    const int64_t span = std::max<int64_t>(1, (kPixelsOfCount * numbers + tile - 1) / tile) * tile;
    std::atomic<bool> good{true};
    for_each_tile(in.batch, in.pixels, span, in.channels * span, numbers, counts, [&](int64_t begin, int64_t end, const auto& run) {
      std::vector<acc_t> drawn(tile), buffer(layout.buffer_size()), rows(classes * tile);
      std::vector<acc_t> said(annotations * classes * kBins);
      std::vector<double> counted(annotations * kBins * classes);
      for (int64_t index = begin; index < end; ++index) {
        run(index, [&](int64_t image, int64_t start, int64_t size, double* partial) {
          for (int64_t r = 0; r < annotations; ++r)
            copy_table(all, classes, all.annotators[image * annotations + r], said.data() + r * classes * kBins);
          std::fill(counted.begin(), counted.end(), 0.0);
          for (int64_t first = start; first < start + size; first += tile) {
            const int64_t n = std::min(tile, start + size - first), offset = image * in.pixels + first;
            if (!read_labels(in.y, in.byte_labels, offset, n, classes, drawn.data())) good = false;
            for (int64_t c = 0; c < classes; ++c) {
              acc_t* row = rows.data() + c * tile;
              std::fill_n(row, tile, acc_t(0));
              for (int64_t r = 0; r < annotations; ++r) {
                const uint8_t* bin = all.bins + (image * annotations + r) * in.pixels + first;
                const acc_t* own = said.data() + (r * classes + c) * kBins;
                for (int64_t i = 0; i < n; ++i) row[i] += own[bin[i]];
              }
            }
            posterior<acc_t, binary.value>(
                layout.read(in.z, image, first, n, buffer.data()),
                static_cast<const acc_t*>(calibration), classes, n, tile, drawn.data(), rows.data());
            for (int64_t r = 0; r < annotations; ++r) {
              const uint8_t* bin = all.bins + (image * annotations + r) * in.pixels + first;
              double* own = counted.data() + r * kBins * classes;
              for (int64_t i = 0; i < n; ++i)
                for (int64_t c = 0; c < classes; ++c) own[bin[i] * classes + c] += rows[c * tile + i];
            }
            const auto write = [&](auto* to) {
              for (int64_t i = 0; i < n; ++i) to[offset + i] = static_cast<std::decay_t<decltype(*to)>>(drawn[i]);
            };
            in.byte_labels ? write(static_cast<uint8_t*>(labels)) : write(static_cast<int64_t*>(labels));
          }
          for (int64_t r = 0; r < annotations; ++r)
            for (int64_t c = 0; c < classes; ++c)
              for (int64_t m = 0; m < bin_count; ++m)
                partial[(r * classes + c) * bin_count + m] = counted[(r * kBins + m) * classes + c];
        });
      }
    });
    return good.load();
  });
}

}  // namespace

const LabelKernels DISTSEG_JOIN(label_kernels_, CPU_CAPABILITY) = {signed_distance_bins, correct_labels};

}  // namespace distseg
