// The losses on CUDA (bal.h says what they compute).
//
// A cell is what lies between four logits: the label pixels that are interpolated from rows k, k+1
// and columns j, j+1. A block owns a tile, some cells along each axis, or a part of one cell where
// cells are large, and walks down its rows of cells, whose corners it keeps in shared memory, a
// chunk of classes at a time:
//
//   1. A thread per label pixel adds up the softmax over the classes. What the gradient needs of
//      the pixel goes to shared memory.
//   2. A thread per cell and class adds up the gradients of the cell's pixels for its four corners,
//      in registers. Cells that share a corner add their sums up in the tile's partial sums.
//
// A second kernel adds the partial sums of the tiles that meet at a logit, in a fixed order: no
// atomics. A tile has (rows + 1) x (columns + 1) of them for each class: a third more than logits
// where labels are eight times as large, and few beside the upsampled logits where these are twice
// as large along both axes.
//
// For a map of losses, 1 writes the coefficients of the pixels to memory, and a later launch, which
// reads them, does 2. Logits of the labels' size need no cells: a thread per pixel does both.
//
// Logarithms and powers are those of two. What a softmax subtracts before it exponentiates, `shift`,
// is the greatest logit. Both passes compute a logit alike, to the bit: how large it may be, its
// power is then the one that the total has.

#include "../common/cuda.h"
#include "../common/op.h"
#include "../common/resize_cuda.h"
#include "bal.h"

#include <algorithm>
#include <cfloat>

namespace segops::bal {
namespace {

// A tile aims at so many label pixels, and has at most half more: the first cell is half a cell
// longer than others.
constexpr int kColumns = 128, kRows = 32;
constexpr int kMostColumns = kColumns * 3 / 2, kMostRows = kRows * 3 / 2;
constexpr int kCells = 32;  // of a tile along an axis, at most

// In shared memory at once, at most: the coefficients of so many pixels, the corners of so many
// classes. From one class to the next is an odd number of corners: they are in different banks.
constexpr int kPixels = 1536, kChunk = 32, kStride = kCells + 1;

constexpr int kGroup = 4;  // classes between which a softmax is rescaled
constexpr int kLoads = 8;  // logits that a thread per pixel loads at once

constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

// Logits are subtracted from each other: the least float, which may mask a class, and minus infinity
// have to leave a number.
__device__ inline float bounded(float logit) {
  return logit < -0x1p126f ? -0x1p126f : logit;
}

// ---- what is read -------------------------------------------------------------------------------

// Weights as they lie in memory; all are 1 where there are none.
struct Weights {
  const void* data;
  ScalarType type;

  explicit Weights(const std::optional<Tensor>& weights)
      : data(data_of<const void>(weights)), type(weights ? weights->scalar_type() : ScalarType::Undefined) {}

  template <typename Index>
  __device__ float at(Index i) const {
    if (!data) return 1;
    if (type == ScalarType::Float) return static_cast<const float*>(data)[i];
    if (type == ScalarType::Half) return widen(static_cast<const __half*>(data)[i]);
    return widen(static_cast<const __nv_bfloat16*>(data)[i]);
  }
};

template <typename T, typename Index>
struct Problem {
  View<const T, Index> logits;
  int classes;
  Index height, width, pixels;  // of the labels; all of them
  Labels labels;
  Weights pixel_weight, class_weight;
  Resize<Index> weight_y, weight_x;
  bool smoothed;
  float keep, share;  // the loss is w (keep a_t l_t + share sum_c a_c l_c)

  explicit Problem(const LossInput& in)
      : logits(in.logits),
        classes(int(in.s.classes)),
        height(Index(in.s.height)),
        width(Index(in.s.width)),
        pixels(Index(in.s.pixels())),
        labels(in.labels, in.s.classes, in.ignore_index, "bal_cross_entropy"),
        pixel_weight(in.pixel_weight),
        class_weight(in.class_weight),
        weight_y(in.s.weight_h, in.s.height),
        weight_x(in.s.weight_w, in.s.width),
        smoothed(in.smoothed()),
        keep(float(1 - in.label_smoothing)),
        share(float(in.label_smoothing / double(in.s.classes))) {}

  // The weight of a pixel, whose position among the pixel weights is given.
  __device__ float weight(Index n, const Position& y, const Position& x) const {
    const Index upper = (n * weight_y.in + y.low) * weight_x.in + x.low;
    const Index right = x.weight > 0 ? 1 : 0, lower = upper + (y.weight > 0 ? weight_x.in : 0);
    const float above = (1 - x.weight) * pixel_weight.at(upper) + x.weight * pixel_weight.at(upper + right);
    const float below = (1 - x.weight) * pixel_weight.at(lower) + x.weight * pixel_weight.at(lower + right);
    return (1 - y.weight) * above + y.weight * below;
  }
};

// What comes and goes besides the logits' gradient; null where it does not.
struct Maps {
  float* loss;          // of each pixel
  float* coefficients;  // written, or read where grad comes in
  const float* grad;    // of each pixel's loss, or of the sum over
  const float* divisor;
};

// ---- softmax of a pixel -------------------------------------------------------------------------

// A label pixel: first its softmax so far, then its coefficients.
struct alignas(16) Pixel {
  float shift;
  float grad_scale;   // first `rest`
  float target_grad;  // first the target's logit
  int label;

  // Of logit z of class c, but for the smoothing. Where it is ignored, z may be anything: the power
  // is a number, and grad_scale 0.
  __device__ float gradient(float z, int c) const {
    const float other = grad_scale * fminf(fast_exp2(kLog2E * (z - shift)), FLT_MAX);
    return label == c ? target_grad : other;
  }
};

struct Softmax {
  float shift = -FLT_MAX, rest = 0;
  float smooth = 0;  // sum_c a_c (shift - log2 e z_c)

  // Takes classes of which the label is number `target`, or none.
  template <int V>
  __device__ void add(const float (&z)[V], int target) {
    float greatest = z[0];
#pragma unroll
    for (int v = 1; v < V; ++v) greatest = fmaxf(greatest, z[v]);
    const float next = fmaxf(shift, greatest);
    rest *= fast_exp2(kLog2E * (shift - next));
    shift = next;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float power = fast_exp2(kLog2E * (z[v] - shift));
      if (v != target) rest += power;
    }
  }
  __device__ void add_smooth(float z, float class_weight) { smooth = fmaf(class_weight, kLog2E * (shift - z), smooth); }
  // After the shift was another one, for the classes so far, whose weights add up to this.
  __device__ void follow(float previous_shift, float class_weights) {
    smooth = fmaf(kLog2E * class_weights, shift - previous_shift, smooth);
  }

  // The loss. The pixel, of which label and target are known, gets its coefficients. All classes
  // weigh class_weights.
  template <typename T, typename Index>
  __device__ float finish(const Problem<T, Index>& p, float class_weights, float weight, Pixel& pixel, float& smoothing) const {
    if (pixel.label < 0) {
      const float nothing = pixel.label == kIgnored ? 0.f : NAN;
      pixel = {0, nothing, nothing, pixel.label};
      return smoothing = nothing;
    }
    const float own = p.keep * p.class_weight.at(pixel.label), others = p.share * class_weights;
    const float from_target = kLog2E * (shift - pixel.target_grad), target = fast_exp2(-from_target);
    const float total = rest + target, log_total = log2f(total);
    // The more certain the target, the less may be lost beside it.
    const float of_target = rest < target ? kLog2E * log1pf(__fdividef(rest, target)) : log_total + from_target;
    smoothing = weight * p.share;
    const float per_total = __fdividef(weight, total);
    pixel = {shift, per_total * (own + others), per_total * (others * target - own * rest), pixel.label};
    return weight * kLn2 * (own * of_target + others * log_total + p.share * smooth);
  }
};

template <typename T, typename Index>
__device__ inline void write_coefficients(
    const Problem<T, Index>& p, const Maps& maps, const Pixel& pixel, float smoothing, Index at) {
  maps.coefficients[at] = pixel.shift;
  maps.coefficients[p.pixels + at] = pixel.grad_scale;
  maps.coefficients[2 * p.pixels + at] = pixel.target_grad;
  if (p.smoothed) maps.coefficients[3 * p.pixels + at] = smoothing;
}

// The coefficients, times the gradient that comes in.
template <typename T, typename Index>
__device__ inline Pixel read_coefficients(const Problem<T, Index>& p, const Maps& maps, Index at, float& smoothing) {
  smoothing = 0;
  const int label = p.labels.at(at);
  if (label == kIgnored) return {0, 0, 0, label};  // what comes in there, NaN perhaps, goes nowhere
  const float grad = maps.divisor ? *maps.grad / *maps.divisor : maps.grad[at];
  if (p.smoothed) smoothing = grad * maps.coefficients[3 * p.pixels + at];
  return {maps.coefficients[at], grad * maps.coefficients[p.pixels + at], grad * maps.coefficients[2 * p.pixels + at], label};
}

// ---- sums of losses -----------------------------------------------------------------------------

struct Losses {
  float sum;
  int valid;  // pixels that are not ignored
};

__device__ inline void write_losses(Losses* losses, const Losses& of_thread) {
  const float sum = block_sum(of_thread.sum);
  const int valid = block_sum(of_thread.valid);
  if (threadIdx.x == 0) losses[blockIdx.x] = {sum, valid};
}

struct Totals {
  const Losses* losses;  // null if there is none to write
  int blocks;
  bool mean;
  float *divisor, *loss;

  // By one block. A thread's sum keeps what rounding takes from it.
  __device__ void write() const {
    float sum = 0, lost = 0;
    int64_t valid = 0;
    for (int i = threadIdx.x; i < blocks; i += kThreads) {
      const float value = losses[i].sum, next = sum + value, taken = next - sum;
      lost += (sum - (next - taken)) + (value - taken);
      sum = next;
      valid += losses[i].valid;
    }
    if (isfinite(sum)) sum += lost;
    const float total = block_sum(sum);
    const int64_t total_valid = block_sum(valid);
    if (threadIdx.x > 0) return;
    *divisor = mean ? fmaxf(float(total_valid), 1) : 1;
    *loss = total / *divisor;
  }
};

// ---- logits of the labels' size -----------------------------------------------------------------

// kLoads classes from `first` on; those beyond the last are never chosen.
template <typename T, typename Index>
__device__ inline void load_classes(const T* logits, Index channel, int first, int classes, float (&z)[kLoads]) {
  const int last = classes - 1 - first;
  const T* at = logits + first * channel;
#pragma unroll
  for (int v = 0; v < kLoads; ++v) {
    z[v] = widen(*at);
    at += v < last ? channel : 0;
  }
#pragma unroll
  for (int v = 0; v < kLoads; ++v) z[v] = v > last ? -FLT_MAX : bounded(z[v]);
}

// A thread per pixel. Those beyond the last do as the last one does, and write nothing.
template <typename T, typename Out, typename Index>
__global__ void __launch_bounds__(kThreads)
    pixels_kernel(const Problem<T, Index> p, const Maps maps, const View<Out, Index> out, Losses* __restrict__ losses) {
  __shared__ float class_weight[kThreads];
  const Index thread = Index(blockIdx.x) * kThreads + int(threadIdx.x);
  const bool inside = thread < p.pixels;
  const Index index = inside ? thread : p.pixels - 1;
  const Index y = index / p.width % p.height, x = index % p.width, n = index / p.width / p.height;
  const T* logits = p.logits.at(n, 0, y, x);
  const Index channel = p.logits.channel;
  Losses own{0, 0};
  Pixel pixel;
  float smoothing, z[kLoads];
  if (maps.grad) {
    pixel = read_coefficients(p, maps, index, smoothing);
  } else {
    pixel = {0, 0, 0, p.labels.at(index)};
    Softmax softmax;
    for (int first = 0; first < p.classes; first += kLoads) {
      load_classes(logits, channel, first, p.classes, z);
      softmax.add(z, pixel.label - first);
    }
    if (pixel.label >= 0) {
      const float target = widen(logits[pixel.label * channel]);
      pixel.target_grad = target > -INFINITY ? bounded(target) : target;
    }
    float class_weights = 0;
    for (int c = 0; c < p.classes && p.smoothed; ++c) {
      const float weight = p.class_weight.at(c);
      softmax.add_smooth(bounded(widen(logits[c * channel])), weight);
      class_weights += weight;
    }
    const float weight = p.pixel_weight.data ? p.weight(n, p.weight_y.at(y), p.weight_x.at(x)) : 1;
    const float loss = softmax.finish(p, class_weights, weight, pixel, smoothing);
    if (inside) {
      own = {loss, pixel.label != kIgnored};
      if (maps.coefficients) write_coefficients(p, maps, pixel, smoothing, index);
      if (maps.loss) maps.loss[index] = loss;
    }
  }
  for (int start = 0; start < p.classes && out.data; start += kThreads) {
    const int c = start + int(threadIdx.x), end = start + kThreads < p.classes ? start + kThreads : p.classes;
    __syncthreads();
    class_weight[threadIdx.x] = p.smoothed && c < end ? p.class_weight.at(c) : 0.f;
    __syncthreads();
    for (int first = start; first < end; first += kLoads) {
      load_classes(logits, channel, first, p.classes, z);
      Out* to = out.at(n, first, y, x);
#pragma unroll
      for (int v = 0; v < kLoads; ++v) {
        const float gradient = pixel.gradient(z[v], first + v) - smoothing * class_weight[first - start + v];
        if (inside && first + v < end) narrow(gradient, *to);
        to += out.channel;
      }
    }
  }
  if (losses) write_losses(losses, own);
}

// ---- tiles of cells -----------------------------------------------------------------------------

// One axis.
template <typename Index>
struct Tiling {
  Resize<Index> resize;
  int cells;   // of a tile
  int parts;   // a cell is cut into, where it is longer than a tile; then cells is 1
  int length;  // label pixels of a tile, at most
  int tiles;

  Tiling(int64_t in, int64_t out, int64_t aim) : resize(in, out) {
    const int64_t longest = std::max<int64_t>(1, resize.first(1));  // the first cell has what is left of its centre too
    parts = int(ceil_div(longest, aim));
    const int64_t most = parts > 1 ? 1 : std::clamp<int64_t>(aim * in / out, 1, kCells);
    cells = int(ceil_div(in, ceil_div(in, most)));  // about as many in each tile
    length = int(parts > 1 ? aim : std::max<int64_t>(resize.first(cells), cells * out / in + 1));
    tiles = int(ceil_div(in, cells) * parts);
  }
  __device__ Index first_cell(int tile) const { return Index(tile / parts) * cells; }
  __device__ Index end_cell(int tile) const {
    const Index end = first_cell(tile) + cells;
    return end < resize.in ? end : resize.in;
  }
  // The label pixels of a tile.
  __device__ Index begin(int tile) const {
    const Index begin = resize.first(first_cell(tile)) + Index(tile % parts) * length, last = resize.first(end_cell(tile));
    return begin < last ? begin : last;
  }
  __device__ Index end(int tile) const {
    const Index end = begin(tile) + length, last = resize.first(end_cell(tile));
    return end < last ? end : last;
  }
  // The tiles that have cells on both sides of a logit.
  __device__ int first_tile(Index logit) const { return int((logit > 0 ? logit - 1 : 0) / cells) * parts; }
  __device__ int end_tile(Index logit) const { return int(logit / cells) * parts + parts; }
};

template <typename Index>
struct Tiles {
  Tiling<Index> y, x;
  int strip;  // label rows whose coefficients are in shared memory
  int classes;
  int chunk;  // of classes

  explicit Tiles(const LossShape& s)
      : y(s.h, s.height, kRows),
        x(s.w, s.width, kColumns),
        classes(int(s.classes)),
        chunk(int(std::min<int64_t>(kChunk, round_up(s.classes, kGroup)))) {
    // Those of a row of cells, or equal shares of them.
    const int64_t most = kPixels / x.length, rows = std::min<int64_t>(ceil_div(s.height, s.h), y.length);
    strip = int(ceil_div(rows, ceil_div(rows, most)));
  }
  int64_t count() const { return int64_t(y.tiles) * x.tiles; }
  int64_t sums() const { return count() * (y.cells + 1) * classes * (x.cells + 1); }
  size_t shared_bytes(bool smoothed) const {
    return chunk * kStride * 4 * sizeof(float) + strip * x.length * (sizeof(Pixel) + (smoothed ? sizeof(float) : 0));
  }
  // Where a tile's sum for class c and a corner lies.
  __device__ Index at(Index tile, int row, int c, int column) const {
    return ((tile * (y.cells + 1) + row) * classes + c) * (x.cells + 1) + column;
  }
};

// Of a cell: upper left, upper right, lower left, lower right. Logits, or sums for them.
using Corners = Pack<float, 4>;

// The logit at a position between corners. Both passes must compute the same.
__device__ inline float left_of(const Corners& z, float lower) {
  return fmaf(lower, z.value[2] - z.value[0], z.value[0]);
}
__device__ inline float right_of(const Corners& z, float lower) {
  return fmaf(lower, z.value[3] - z.value[1], z.value[1]);
}
__device__ inline float between(const Corners& z, float right, float lower) {
  const float left = left_of(z, lower);
  return fmaf(right, right_of(z, lower) - left, left);
}

// Adds a row of label pixels, value(x) of begin <= x < end, that lies at `weight` between the
// upper and the lower corners.
template <typename Value>
__device__ inline void add_row(Corners& sums, float weight, const float* weights, int begin, int end, const Value& value) {
  float all = 0, right = 0;
#pragma unroll 4
  for (int x = begin; x < end; ++x) {
    const float each = value(x);
    all += each;
    right = fmaf(weights[x], each, right);
  }
  const float left = all - right;
  sums.value[0] += (1 - weight) * left;
  sums.value[1] += (1 - weight) * right;
  sums.value[2] += weight * left;
  sums.value[3] += weight * right;
}

// What a block keeps of its tile in shared memory.
struct Tables {
  int image;
  int rows;  // of cells
  // Of label columns: the weight of what is right, the cell, the position in pixel weights.
  float weight_x[kMostColumns];
  int cell[kMostColumns];
  Position pixel_weight_x[kMostColumns];
  // Of label rows.
  float weight_y[kMostRows];
  Position pixel_weight_y[kMostRows];
  int first_column[kCells + 1], first_row[kCells + 1];  // label pixels of each cell
  float class_weight[kChunk];                           // of a chunk, where labels are smoothed
  Corners smoothing[kCells];                            // its part of the sums, for a class that weighs one
};

// Label rows that lie in one row of cells, both counted from the tile's first.
struct Strip {
  int cell_row, begin, height;
};

template <typename T, typename Index>
struct Tile {
  const Problem<T, Index>& p;
  const Tiles<Index>& tiles;
  const Maps& maps;
  Tables& tables;
  Corners* corners;           // of a row of cells, for a chunk of classes
  Pixel* pixels;              // of a strip
  float* smoothings;          // of a strip
  const T* logits;            // the first corner's
  Index first_pixel;          // its number
  int cells, width;           // in a row; of label pixels
  int last_row, last_column;  // of logits, counted from the first corner

  __device__ Tile(const Problem<T, Index>& p, const Tiles<Index>& tiles, const Maps& maps, Tables& tables)
      : p(p), tiles(tiles), maps(maps), tables(tables) {
    corners = dynamic_shared<Corners>();
    pixels = reinterpret_cast<Pixel*>(corners + tiles.chunk * kStride);
    smoothings = reinterpret_cast<float*>(pixels + tiles.strip * tiles.x.length);
    const int x = blockIdx.x % tiles.x.tiles, y = blockIdx.x / tiles.x.tiles % tiles.y.tiles;
    const int n = blockIdx.x / tiles.x.tiles / tiles.y.tiles;
    const Index first_row = tiles.y.first_cell(y), first_cell = tiles.x.first_cell(x);
    const Index top = tiles.y.begin(y), left = tiles.x.begin(x);
    const int height = int(tiles.y.end(y) - top);
    width = int(tiles.x.end(x) - left);
    const int rows = int(tiles.y.end_cell(y) - first_row);
    cells = int(tiles.x.end_cell(x) - first_cell);
    last_row = int(tiles.y.resize.in - 1 - first_row);
    last_column = int(tiles.x.resize.in - 1 - first_cell);
    logits = p.logits.at(n, 0, first_row, first_cell);
    first_pixel = (n * p.height + top) * p.width + left;
    if (threadIdx.x == 0) {
      tables.image = n;
      tables.rows = rows;
    }
    // Not unrolled, here and below, is what is not worth the registers.
#pragma unroll 1
    for (int i = threadIdx.x; i < width; i += kThreads) {
      const Position position = tiles.x.resize.at(left + i);
      tables.weight_x[i] = position.weight;
      tables.cell[i] = int(position.low - first_cell);
      if (p.pixel_weight.data) tables.pixel_weight_x[i] = p.weight_x.at(left + i);
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < height; i += kThreads) {
      tables.weight_y[i] = tiles.y.resize.at(top + i).weight;
      if (p.pixel_weight.data) tables.pixel_weight_y[i] = p.weight_y.at(top + i);
    }
    // Of a cell that is cut into parts, only what the tile has of it.
    const auto within = [](Index at, int length) { return at < 0 ? 0 : at < length ? int(at) : length; };
    for (int i = threadIdx.x; i <= kCells; i += kThreads) {
      if (i <= rows) tables.first_row[i] = within(tiles.y.resize.first(first_row + i) - top, height);
      if (i <= cells) tables.first_column[i] = within(tiles.x.resize.first(first_cell + i) - left, width);
    }
  }

  __device__ Index number(const Strip& strip, int row, int x) const { return first_pixel + (strip.begin + row) * p.width + x; }
  __device__ int classes_from(int first_class) const {
    return p.classes - first_class < tiles.chunk ? p.classes - first_class : tiles.chunk;
  }

  // Reads the corners of a row of cells, and the class weights, for a chunk of classes, which is
  // filled up to whole groups with classes that are never chosen.
  __device__ void load(int cell_row, int first_class) const {
    const int count = classes_from(first_class), filled = (count + kGroup - 1) / kGroup * kGroup;
    const bool by_class = p.logits.channel == 1;  // threads side by side read what is side by side in memory
    const Index down = cell_row < last_row ? p.logits.row : 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < cells * filled; i += kThreads) {
      const int j = by_class ? i / filled : i % cells, c = by_class ? i % filled : i / cells;
      Corners z{{-FLT_MAX, -FLT_MAX, -FLT_MAX, -FLT_MAX}};
      if (c < count) {
        const Index right = j < last_column ? p.logits.pixel : 0;
        const T* at = logits + ((first_class + c) * p.logits.channel + cell_row * p.logits.row + j * p.logits.pixel);
        z = {{widen(at[0]), widen(at[right]), widen(at[down]), widen(at[down + right])}};
#pragma unroll
        for (float& each : z.value) each = bounded(each);
      }
      corners[c * kStride + j] = z;
    }
    if (p.smoothed)
#pragma unroll 1
      for (int c = threadIdx.x; c < count; c += kThreads) tables.class_weight[c] = p.class_weight.at(first_class + c);
  }

  // The softmax of the strip's pixels over a chunk of classes; class_weights is the sum of the
  // chunks before. After the last come losses and coefficients.
  __device__ void add_chunk(const Strip& strip, int first_class, float& class_weights, Losses& losses) const {
    const int count = classes_from(first_class);
    float class_weights_after = class_weights;
    if (p.smoothed)
#pragma unroll 1
      for (int c = 0; c < count; ++c) class_weights_after += tables.class_weight[c];
    for (int i = threadIdx.x; i < strip.height * width; i += kThreads) {
      const int row = i / width, x = i - row * width;
      const float right = tables.weight_x[x], lower = tables.weight_y[strip.begin + row];
      const Corners* cell = corners + tables.cell[x];
      const auto logit = [&](int c) { return between(cell[c * kStride], right, lower); };
      Pixel pixel;
      Softmax softmax;
      if (first_class == 0) {
        pixel = {0, 0, 0, p.labels.at(number(strip, row, x))};
      } else {
        pixel = pixels[i];
        softmax = {pixel.shift, pixel.grad_scale, p.smoothed ? smoothings[i] : 0.f};
      }
      const float previous = softmax.shift;
      const int target = pixel.label - first_class;
#pragma unroll 1
      for (int c = 0; c < count; c += kGroup) {
        float z[kGroup];
#pragma unroll
        for (int v = 0; v < kGroup; ++v) z[v] = logit(c + v);
        softmax.add(z, target - c);
      }
      if (target >= 0 && target < count) pixel.target_grad = logit(target);
      if (p.smoothed) {
        softmax.follow(previous, class_weights);
#pragma unroll 1
        for (int c = 0; c < count; ++c) softmax.add_smooth(logit(c), tables.class_weight[c]);
      }
      float smoothing = softmax.smooth;
      if (first_class + count < p.classes) {
        pixel.shift = softmax.shift;
        pixel.grad_scale = softmax.rest;
      } else {
        losses.valid += pixel.label != kIgnored;
        const float weight = p.pixel_weight.data
                                 ? p.weight(tables.image, tables.pixel_weight_y[strip.begin + row], tables.pixel_weight_x[x])
                                 : 1;
        const float loss = softmax.finish(p, class_weights_after, weight, pixel, smoothing);
        losses.sum += loss;
        const Index index = number(strip, row, x);
        if (maps.coefficients) write_coefficients(p, maps, pixel, smoothing, index);
        if (maps.loss) maps.loss[index] = loss;
      }
      pixels[i] = pixel;
      if (p.smoothed) smoothings[i] = smoothing;
    }
    class_weights = class_weights_after;
  }

  __device__ void read(const Strip& strip) const {
#pragma unroll 1
    for (int i = threadIdx.x; i < strip.height * width; i += kThreads) {
      float smoothing;
      pixels[i] = read_coefficients(p, maps, number(strip, i / width, i % width), smoothing);
      if (p.smoothed) smoothings[i] = smoothing;
    }
  }

  // Makes each cell's corners, for a chunk of classes, the sums of its gradients for them.
  __device__ void sum_cells(const Strip& strip, int first_class) const {
    const int count = classes_from(first_class);
    for (int i = threadIdx.x; i < cells * count; i += kThreads) {
      const int j = i / count, c = i - j * count;
      const int begin = tables.first_column[j], end = tables.first_column[j + 1];
      Corners& own = corners[c * kStride + j];
      const Corners z = own;
      Corners sums{};
      for (int row = 0; row < strip.height; ++row) {
        const float lower = tables.weight_y[strip.begin + row];
        const float left = left_of(z, lower), slope = right_of(z, lower) - left;
        add_row(sums, lower, tables.weight_x, begin, end, [&](int x) {
          const Pixel pixel = pixels[row * width + x];  // one load of all of it
          return pixel.gradient(fmaf(tables.weight_x[x], slope, left), first_class + c);
        });
      }
      own = sums;
    }
  }

  __device__ void sum_smoothings(const Strip& strip) const {
    for (int j = threadIdx.x; j < cells; j += kThreads) {
      Corners sums{};
      for (int row = 0; row < strip.height; ++row)
        add_row(
            sums, tables.weight_y[strip.begin + row], tables.weight_x, tables.first_column[j], tables.first_column[j + 1],
            [&](int x) { return smoothings[row * width + x]; });
      tables.smoothing[j] = sums;
    }
  }

  // Adds the sums of neighbouring cells to the tile's.
  __device__ void add_to(float* sums, const Strip& strip, int first_class) const {
    const int count = classes_from(first_class), columns = cells + 1;
    for (int i = threadIdx.x; i < columns * count; i += kThreads) {
      const int c = i / columns, j = i - c * columns;
      const auto add_corner = [&](int row, int corner) {
        float sum = 0;
        const float class_weight = p.smoothed ? tables.class_weight[c] : 0.f;
        const auto add_cell = [&](int cell, int corner) {
          sum += corners[c * kStride + cell].value[corner];
          if (p.smoothed) sum -= class_weight * tables.smoothing[cell].value[corner];
        };
        if (j > 0) add_cell(j - 1, corner + 1);
        if (j < cells) add_cell(j, corner);
        sums[tiles.at(blockIdx.x, strip.cell_row + row, first_class + c, j)] += sum;
      };
      add_corner(0, 0);
      add_corner(1, 2);
    }
  }
};

// As many blocks on a multiprocessor as leave each thread the registers that it needs.
template <typename T, typename Index>
__global__ void __launch_bounds__(kThreads, sizeof(Index) == 4 ? 4 : 2) cells_kernel(
    const Problem<T, Index> p, const Tiles<Index> tiles, const Maps maps, float* __restrict__ sums,
    Losses* __restrict__ losses) {
  __shared__ Tables tables;
  const Tile<T, Index> tile(p, tiles, maps, tables);
  if (sums) {
    const Index begin = tiles.at(blockIdx.x, 0, 0, 0), end = tiles.at(Index(blockIdx.x) + 1, 0, 0, 0);
    for (Index i = begin + int(threadIdx.x); i < end; i += kThreads) sums[i] = 0;
  }
  __syncthreads();
  Losses of_thread{0, 0};
  Strip strip;
  for (strip.cell_row = 0; strip.cell_row < tables.rows; ++strip.cell_row) {
    const int end = tables.first_row[strip.cell_row + 1];
    for (strip.begin = tables.first_row[strip.cell_row]; strip.begin < end; strip.begin += tiles.strip) {
      strip.height = end - strip.begin < tiles.strip ? end - strip.begin : tiles.strip;
      if (maps.grad) {
        tile.read(strip);
        __syncthreads();
      } else {
        float class_weights = 0;
        for (int first_class = 0; first_class < p.classes; first_class += tiles.chunk) {
          tile.load(strip.cell_row, first_class);
          __syncthreads();
          tile.add_chunk(strip, first_class, class_weights, of_thread);
          __syncthreads();
        }
      }
      if (!sums) continue;
      if (p.smoothed) tile.sum_smoothings(strip);
      for (int first_class = 0; first_class < p.classes; first_class += tiles.chunk) {
        if (maps.grad || p.classes > tiles.chunk) {
          tile.load(strip.cell_row, first_class);
          __syncthreads();
        }
        tile.sum_cells(strip, first_class);
        __syncthreads();
        tile.add_to(sums, strip, first_class);
        __syncthreads();
      }
    }
  }
  if (losses) write_losses(losses, of_thread);
}

// ---- what a launch leaves to another ------------------------------------------------------------

// The gradient of each logit: the sums of the tiles that it is a corner in. The first block adds up
// the losses.
template <typename Out, typename Index>
__global__ void __launch_bounds__(kThreads) combine_kernel(
    const float* __restrict__ sums, const Tiles<Index> tiles, const View<Out, Index> out, bool channels_last,
    const Totals totals, Index work) {
  if (blockIdx.x == 0 && totals.losses) totals.write();
  Index index = Index(blockIdx.x) * kThreads + int(threadIdx.x);
  if (index >= work) return;
  const Index h = tiles.y.resize.in, w = tiles.x.resize.in, classes = tiles.classes;
  Index c = index % classes;  // in the order of memory
  if (channels_last) index /= classes;
  const Index x = index % w, y = index / w % h;
  index = index / w / h;
  if (!channels_last) {
    c = index % classes;
    index /= classes;
  }
  float sum = 0;
  for (int tile_y = tiles.y.first_tile(y); tile_y < tiles.y.end_tile(y); ++tile_y) {
    for (int tile_x = tiles.x.first_tile(x); tile_x < tiles.x.end_tile(x); ++tile_x) {
      const Index tile = (index * tiles.y.tiles + tile_y) * tiles.x.tiles + tile_x;
      const int row = int(y - tiles.y.first_cell(tile_y)), column = int(x - tiles.x.first_cell(tile_x));
      sum += sums[tiles.at(tile, row, int(c), column)];
    }
  }
  narrow(sum, *out.at(index, c, y, x));
}

// out = gradient * grad / divisor, V elements at a time.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads) scale_kernel(
    const float* __restrict__ gradient, const float* __restrict__ grad, const float* __restrict__ divisor, T* __restrict__ out,
    int64_t work) {
  const int64_t first = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * V;
  const float factor = *grad / *divisor;
  if (first + V <= work) {
    float scaled[V] = {};
    add(scaled, gradient + first, factor);
    store(out + first, scaled);
  } else {
    for (int64_t i = first; i < work; ++i) narrow(gradient[i] * factor, out[i]);
  }
}

// ---- launches -----------------------------------------------------------------------------------

// Where sums of losses go.
struct Sum {
  bool mean;
  float *divisor, *loss;
};

// The gradient, if there is one, has the logits' dtype if `narrowed`, else float32.
template <bool narrowed>
void run(const LossInput& in, const Maps& maps, const std::optional<Tensor>& gradient, const std::optional<Sum>& sum) {
  const LossShape& s = in.s;
  STD_TORCH_CHECK(s.classes <= INT32_MAX - kChunk, "bal_cross_entropy: too many classes");
  const CurrentStream stream(in.logits);
  const Tiles<int64_t> counted(s);
  const bool by_cells = s.resized();
  const unsigned blocks = blocks_for(by_cells ? s.images * counted.count() * kThreads : s.pixels());
  const int64_t count = by_cells && gradient ? s.images * counted.sums() : 0;  // of partial sums
  const Tensor partial = empty({count}, ScalarType::Float, in.logits);
  const Tensor block_losses = empty({sum ? int64_t(blocks) : 0, 2}, ScalarType::Float, in.logits);
  float* sums = count ? data_of<float>(partial) : nullptr;
  Losses* losses = sum ? static_cast<Losses*>(block_losses.mutable_data_ptr()) : nullptr;
  const Totals totals = sum ? Totals{losses, int(blocks), sum->mean, sum->divisor, sum->loss} : Totals{};
  const int64_t elements = std::max(
      {extent(in.logits) + kThreads, gradient ? gradient->numel() : 0, in.maps() * s.pixels(), count, positions(s.h, s.height),
       positions(s.w, s.width), positions(s.weight_h, s.height), positions(s.weight_w, s.width)});
  with_index(elements, [&](auto index) {
    using Index = decltype(index);
    const Tiles<Index> tiles(s);
    dispatch_cuda(in.logits, "bal_cross_entropy", [&](auto type) {
      using T = decltype(type);
      using Out = std::conditional_t<narrowed, T, float>;
      const Problem<T, Index> p(in);
      const View<Out, Index> out = gradient ? View<Out, Index>(*gradient) : View<Out, Index>{};
      if (by_cells)
        launch(
            cells_kernel<T, Index>, blocks, kThreads, tiles.shared_bytes(in.smoothed()), stream, p, tiles, maps, sums, losses);
      else
        launch(pixels_kernel<T, Out, Index>, blocks, kThreads, 0, stream, p, maps, out, losses);
      const int64_t work = sums ? in.logits.numel() : 0;
      const bool channels_last = gradient && gradient->stride(1) == 1;
      if (sums || losses)
        launch(
            combine_kernel<Out, Index>, std::max(blocks_for(work), 1u), kThreads, 0, stream, sums, tiles, out, channels_last,
            totals, Index(work));
    });
  });
}

}  // namespace

bool loss_map(const LossInput& in, const Tensor& loss, const std::optional<Tensor>& coefficients) {
  run<false>(in, {data_of<float>(loss), data_of<float>(coefficients)}, {}, {});
  return false;
}

bool loss_sum(
    const LossInput& in, bool mean, const Tensor& loss, const Tensor& divisor, const std::optional<Tensor>& coefficients,
    const std::optional<Tensor>& gradient) {
  const Sum sum{mean, data_of<float>(divisor), data_of<float>(loss)};
  run<false>(in, {nullptr, data_of<float>(coefficients)}, gradient, sum);
  return false;
}

void map_grad(const LossInput& in, const Tensor& grad, const Tensor& divisor, const Tensor& coefficients, const Tensor& out) {
  const float* divide_by = grad.dim() == 0 ? data_of<const float>(divisor) : nullptr;
  run<true>(in, {nullptr, data_of<float>(coefficients), data_of<const float>(grad), divide_by}, out, {});
}

void scale(const Tensor& gradient, const Tensor& grad, const Tensor& divisor, const Tensor& out) {
  const CurrentStream stream(out);
  const int64_t work = out.numel();
  const float* from = data_of<const float>(gradient);
  dispatch_cuda(out, "bal_cross_entropy_grad", [&](auto type) {
    using T = decltype(type);
    constexpr int V = 16 / sizeof(T);
    T* to = data_of<T>(out);
    const auto scale_by = [&](auto kernel, int width) {
      launch(
          kernel, blocks_for(ceil_div(work, width)), kThreads, 0, stream, from, data_of<const float>(grad),
          data_of<const float>(divisor), to, work);
    };
    const bool aligned =
        reinterpret_cast<uintptr_t>(from) % (V * sizeof(float)) == 0 && reinterpret_cast<uintptr_t>(to) % 16 == 0;
    aligned ? scale_by(&scale_kernel<T, V>, V) : scale_by(&scale_kernel<T, 1>, 1);
  });
}

}  // namespace segops::bal
