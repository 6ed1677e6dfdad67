// y[b, n, i, j] = Σ_{c, u, v} x[b, c, i·stride + u·dilation − padding, …] · W[out_n, in_c, u, v] + b[out_n]
//
// For images so small that a library's convolution spends its time on cutting and reordering the weight. What
// the kernel covers at each place of y becomes a row of a matrix (im2col), with which the convolution is a
// linear layer of the weight [filters, channels · kernel]; pruned_linear reads what is kept from the full
// one.
//
// Images are copied into a frame of zeros first, so that no patch has to look where it ends. Threads: planes
// of x; channels of a line of patches; pruned_linear's; filters of y. Bytes beside pruned_linear's: x once,
// the patches (kernel size times as much) written once, y once more.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>

#include "mvp/arguments.h"
#include "mvp/check.h"
#include "mvp/ops.h"

namespace mvp::MVP_ISA {
namespace {

constexpr char kOp[] = "pruned_conv2d";
// Lines of a kernel up to this length are moved as so many floats; the next ones overwrite what was too much.
constexpr int64_t kAtOnce = 4;
// Of a line of patches, by a thread in one go.
constexpr int64_t kChannels = 32;
// Filters that are turned in one go: a cache line of sums.
constexpr int64_t kFilters = 16;
// With fewer elements of patches the work is done before a second thread has started.
constexpr int64_t kThreadWork = 1 << 14;

struct Convolution {
  int64_t batch, channels, height, width;  // of x, with its frame
  int64_t kernel_height, kernel_width, stride, dilation;
  int64_t down, across, filters;  // of y

  int64_t plane() const { return height * width; }
  int64_t area() const { return kernel_height * kernel_width; }
  int64_t places() const { return batch * down * across; }
  int64_t inputs() const { return channels * area(); }
};

// Channels [first, last) of the patches of a line of y, which has the number b · down + i.
void put_patches(const Convolution c, const float* frame, int64_t line, int64_t first, int64_t last,
                 float* patches) {
  const int64_t b = line / c.down, i = line % c.down, inputs = c.inputs(), end = last * c.area();
  patches += line * c.across * inputs;
  for (int64_t channel = first; channel < last; ++channel)
    for (int64_t u = 0; u < c.kernel_height; ++u) {
      const int64_t at = channel * c.area() + u * c.kernel_width;
      // Not over the end of these channels: others may be there already.
      const bool at_once = c.dilation == 1 && c.kernel_width <= kAtOnce && at + kAtOnce <= end;
      const float* from = frame + (b * c.channels + channel) * c.plane();
      from += (i * c.stride + u * c.dilation) * c.width;
      float* to = patches + at;
      for (int64_t j = 0; j < c.across; ++j, from += c.stride, to += inputs)
        if (at_once)
          std::memcpy(to, from, kAtOnce * sizeof(float));
        else
          for (int64_t v = 0; v < c.kernel_width; ++v) to[v] = from[v * c.dilation];
    }
}

TensorView matrix(void* data, int64_t rows, int64_t columns) {
  TensorView view;
  view.data = data;
  view.ndim = 2;
  view.shape[0] = rows;
  view.shape[1] = view.stride[0] = columns;
  view.stride[1] = 1;
  return view;
}

}  // namespace

void pruned_conv2d_cpu(const TensorView& x, const TensorView& weight, const TensorView& bias,
                       const TensorView& out_index, const TensorView& in_index, int64_t stride,
                       int64_t padding, int64_t dilation, const TensorView& out, int threads) {
  const Argument image(kOp, {}, "x", x), full(kOp, {}, "weight", weight), result(kOp, {}, "out", out);
  for (const Argument* each : {&image, &full, &result}) {
    each->need_tensor();
    each->need_rank(4, 4);
    each->need_dtype(DType::f32);
  }
  full.need_dense(false);
  MVP_CHECK(std::min(stride, dilation) >= 1 && padding >= 0, kOp,
            "stride, dilation: expected numbers >= 1, and padding >= 0");
  Convolution c{};
  c.batch = x.shape[0];
  c.channels = x.shape[1];
  c.height = x.shape[2] + 2 * padding;
  c.width = x.shape[3] + 2 * padding;
  c.kernel_height = weight.shape[2];
  c.kernel_width = weight.shape[3];
  c.stride = stride;
  c.dilation = dilation;
  const int64_t down = c.height - dilation * (c.kernel_height - 1);
  const int64_t across = c.width - dilation * (c.kernel_width - 1);
  image.need(std::min(down, across) >= 1, "at least the height and width that the kernel covers");
  c.down = (down - 1) / stride + 1;
  c.across = (across - 1) / stride + 1;
  c.filters = Argument(kOp, {}, "out_index", out_index).need_list(weight.shape[0]);
  TensorView wanted = out;
  const int64_t shape[] = {c.batch, c.filters, c.down, c.across};
  std::copy_n(shape, 4, wanted.shape);
  result.need_shape(wanted);
  const bool turned = !result.is_dense(true);
  result.need(!turned || result.is_dense(false), "a contiguous or channels_last tensor");

  // A read of kAtOnce may begin at the last element.
  const std::unique_ptr<float[]> frame(new float[c.batch * c.channels * c.plane() + kAtOnce]());
  const std::unique_ptr<float[]> patches(new float[c.places() * c.inputs()]);
  const std::unique_ptr<float[]> sums(turned ? new float[c.places() * c.filters] : nullptr);
  const int64_t parts = (c.channels + kChannels - 1) / kChannels;
  const int few = c.places() * c.inputs() < kThreadWork ? 1 : threads;
#pragma omp parallel num_threads(few)
  {
#pragma omp for schedule(static)
    for (int64_t p = 0; p < c.batch * c.channels; ++p) {
      const float* from = x.ptr<float>() + p / c.channels * x.stride[0] + p % c.channels * x.stride[1];
      float* to = frame.get() + p * c.plane() + padding * (c.width + 1);
      for (int64_t i = 0; i < x.shape[2]; ++i, to += c.width, from += x.stride[2])
        for (int64_t j = 0; j < x.shape[3]; ++j) to[j] = from[j * x.stride[3]];
    }
#pragma omp for schedule(static)
    for (int64_t t = 0; t < c.batch * c.down * parts; ++t) {
      const int64_t first = t % parts * kChannels;
      put_patches(c, frame.get(), t / parts, first, std::min(first + kChannels, c.channels), patches.get());
    }
  }
  const TensorView flat = matrix(weight.data, weight.shape[0], weight.shape[1] * c.area());
  float* const y = turned ? sums.get() : out.ptr<float>();
  pruned_linear_cpu(matrix(patches.get(), c.places(), c.inputs()), flat, bias, out_index, in_index, 1,
                    c.area(), {}, matrix(y, c.places(), c.filters), threads);
  if (!turned) return;
  const int64_t places = c.down * c.across, groups = (c.filters + kFilters - 1) / kFilters;
#pragma omp parallel for num_threads(few) schedule(static)
  for (int64_t t = 0; t < c.batch * groups; ++t) {
    const int64_t b = t / groups, first = t % groups * kFilters, last = std::min(first + kFilters, c.filters);
    const float* from = y + b * places * c.filters;
    float* to = out.ptr<float>() + b * c.filters * places;
    for (int64_t place = 0; place < places; ++place, from += c.filters)
      for (int64_t n = first; n < last; ++n) to[n * places + place] = from[n];
  }
}

}  // namespace mvp::MVP_ISA
