// How the kernels move and share out tiles of pixels. Included by what is compiled once for each instruction set
// (setup.py): CPU_CAPABILITY names it, and at::vec follows.
//
// Work is cut into tiles of pixels of one image, by the sizes of the input alone, so that every sum is the same for any
// number of threads. Lanes run over pixels. A tile of contiguous logits in their own arithmetic type is read and written
// in place; half precision and channels-last go through a small buffer, channel by channel.
#pragma once

#include "kernels.h"

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#define DISTSEG_JOIN_(a, b) a##b
#define DISTSEG_JOIN(a, b) DISTSEG_JOIN_(a, b)

namespace distseg {
namespace {

using at::vec::Vectorized;

constexpr int64_t kIgnore = 255;
constexpr int64_t kTileElements = 2048;  // of one (C, pixels) tile: 8 KiB in float, so that a few fit the L1 cache
constexpr int64_t kLanes = 64;           // tiles are multiples of every vector's size
constexpr int64_t kGrain = 16384;        // elements that are worth a thread

template <typename scalar_t>
using acc_of = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

int64_t tile_pixels(int64_t channels) {
  return std::max(kLanes, kTileElements / channels / kLanes * kLanes);
}

// ---- moving a tile ---------------------------------------------------------------------------------------------------

template <typename scalar_t>
void widen(const scalar_t* from, acc_of<scalar_t>* to, int64_t n) {
  if constexpr (std::is_same_v<scalar_t, acc_of<scalar_t>>) {
    std::copy_n(from, n, to);
  } else {
    using Vec = Vectorized<scalar_t>;
    for (int64_t i = 0; i < n; i += Vec::size()) {
      auto [low, high] = at::vec::convert_to_float<scalar_t>(Vec::loadu(from + i, std::min<int64_t>(Vec::size(), n - i)));
      low.store(to + i);
      high.store(to + i + low.size());
    }
  }
}

template <typename scalar_t>
void narrow(const acc_of<scalar_t>* from, scalar_t* to, int64_t n) {
  if constexpr (std::is_same_v<scalar_t, acc_of<scalar_t>>) {
    std::copy_n(from, n, to);
  } else {
    using Vec = Vectorized<scalar_t>;
    for (int64_t i = 0; i < n; i += Vec::size()) {
      const auto low = Vectorized<float>::loadu(from + i), high = Vectorized<float>::loadu(from + i + low.size());
      at::vec::convert_from_float<scalar_t>(low, high).store(to + i, std::min<int64_t>(Vec::size(), n - i));
    }
  }
}

// The channels of a tile as rows of pixels: channel c starts at data + c·stride.
template <typename acc_t>
struct Rows {
  acc_t* data;
  int64_t stride;
  acc_t* operator[](int64_t channel) const { return data + channel * stride; }
};

template <typename scalar_t>
struct Layout {
  using acc_t = acc_of<scalar_t>;
  int64_t channels, pixels, tile;
  bool channels_last;

  explicit Layout(const Logits& in)
      : channels(in.channels), pixels(in.pixels), tile(tile_pixels(in.channels)), channels_last(in.channels_last) {}

  bool in_place() const { return std::is_same_v<scalar_t, acc_t> && !channels_last; }
  int64_t buffer_size() const { return in_place() ? 0 : channels * tile; }

  Rows<const acc_t> read(const void* tensor, int64_t image, int64_t first, int64_t n, acc_t* buffer) const {
    const scalar_t* from = static_cast<const scalar_t*>(tensor) + image * channels * pixels;
    if constexpr (std::is_same_v<scalar_t, acc_t>) {
      if (!channels_last) return {from + first, pixels};
    }
    for (int64_t c = 0; c < channels; ++c) {
      acc_t* row = buffer + c * tile;
      if (channels_last) {
        for (int64_t i = 0; i < n; ++i) row[i] = static_cast<acc_t>(from[(first + i) * channels + c]);
      } else {
        widen(from + c * pixels + first, row, n);
      }
    }
    return {buffer, tile};
  }

  // Where to write a tile, and then its way home from there.
  Rows<acc_t> target(void* tensor, int64_t image, int64_t first, acc_t* buffer) const {
    if constexpr (std::is_same_v<scalar_t, acc_t>) {
      if (!channels_last) return {static_cast<scalar_t*>(tensor) + image * channels * pixels + first, pixels};
    }
    return {buffer, tile};
  }

  void write(void* tensor, int64_t image, int64_t first, int64_t n, const acc_t* buffer) const {
    if (in_place()) return;
    scalar_t* to = static_cast<scalar_t*>(tensor) + image * channels * pixels;
    for (int64_t c = 0; c < channels; ++c) {
      const acc_t* row = buffer + c * tile;
      if (channels_last) {
        for (int64_t i = 0; i < n; ++i) to[(first + i) * channels + c] = static_cast<scalar_t>(row[i]);
      } else {
        narrow(row, to + c * pixels + first, n);
      }
    }
  }
};

// Labels of pixels [first, first + n) as numbers; lanes beyond them are ignored pixels. False if one is no class id.
template <typename acc_t>
bool read_labels(const void* y, bool byte_labels, int64_t offset, int64_t n, int64_t classes, acc_t* labels) {
  const auto read = [&](const auto* from, auto limit) {  // in the labels' own type, so that many fit a vector
    decltype(limit) bad = 0;
    for (int64_t i = 0; i < n; ++i) {
      const auto label = from[i];
      bad |= ((label < 0) | (label >= limit)) & (label != kIgnore);
      labels[i] = static_cast<acc_t>(static_cast<int32_t>(label));
    }
    return bad == 0;
  };
  std::fill(labels + n, labels + (n + kLanes - 1) / kLanes * kLanes, static_cast<acc_t>(kIgnore));
  if (byte_labels) return read(static_cast<const uint8_t*>(y) + offset, static_cast<uint8_t>(std::min(classes, kIgnore)));
  return read(static_cast<const int64_t*>(y) + offset, classes);
}

template <typename acc_t>
double total(Vectorized<acc_t> lanes) {
  acc_t values[Vectorized<acc_t>::size()];
  lanes.store(values);
  double sum = 0;
  for (const acc_t value : values) sum += value;
  return sum;
}

// Runs tile(image, first pixel, pixels, sums) over all tiles and adds the `count` sums of each image's tiles, in order.
template <typename Body>
void for_each_tile(int64_t batch, int64_t pixels, int64_t size, int64_t cost, int64_t count, double* sums, const Body& body) {
  const int64_t tiles = (pixels + size - 1) / size;
  std::vector<double> partial(batch * tiles * count);
  at::parallel_for(0, batch * tiles, std::max<int64_t>(1, kGrain / cost), [&](int64_t begin, int64_t end) {
    body(begin, end, [&](int64_t index, const auto& tile) {
      const int64_t image = index / tiles, first = index % tiles * size;
      tile(image, first, std::min(size, pixels - first), partial.data() + index * count);
    });
  });
  for (int64_t image = 0; image < batch; ++image)
    for (int64_t i = 0; i < count; ++i) {
      sums[image * count + i] = 0;
      for (int64_t t = 0; t < tiles; ++t) sums[image * count + i] += partial[(image * tiles + t) * count + i];
    }
}

// Runs function(scalar, whether there is one channel) for the type of the logits.
template <typename Function>
bool dispatch(const Logits& in, const Function& function) {
  const auto with = [&](auto scalar) {
    return in.channels == 1 ? function(scalar, std::true_type()) : function(scalar, std::false_type());
  };
  switch (in.type) {
    case c10::ScalarType::Double: return with(double());
    case c10::ScalarType::BFloat16: return with(c10::BFloat16());
    case c10::ScalarType::Half: return with(c10::Half());
    default: return with(float());
  }
}

// ---- one vector of pixels --------------------------------------------------------------------------------------------

// e^x. In float to 2e-7, the rounding of the logits themselves.
template <typename acc_t>
Vectorized<acc_t> exp(Vectorized<acc_t> x) {
  if constexpr (std::is_same_v<acc_t, float>) return x.exp_u20();
  else return x.exp();
}

// Runs body(first lane's pixel, lanes) over n pixels: whole vectors with their size as a constant, then the rest.
template <typename Vec, typename Body>
void for_each_vector(int64_t n, const Body& body) {
  const int64_t whole = n / Vec::size() * Vec::size();
  for (int64_t i = 0; i < whole; i += Vec::size()) body(i, std::integral_constant<int64_t, Vec::size()>());
  if (whole < n) body(whole, n - whole);
}

}  // namespace
}  // namespace distseg
