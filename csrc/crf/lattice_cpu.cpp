// Building the lattice: positions to simplices a tile at a time, vertices to numbers through a hash
// table, in the order of their first position; then to groups, and neighbours in each to runs.

#include "lattice_cpu.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

namespace segops::crf {
namespace {

constexpr int kMaxCorners = kMaxDim + 1;
using Key = std::array<int32_t, kMaxCorners>;  // a vertex's coordinates; the last follows from the others

// The hash of a vertex is linear in its coordinates, so that a neighbour's is a sum. Random
// factors: lattices are full of structure.
struct Factors {
  std::array<uint64_t, kMaxCorners> factor{}, step;  // step[j]: from a vertex to the next along axis j

  explicit Factors(int64_t dims) {
    uint64_t state = 0x5851f42d4c957f2d, total = 0;
    for (int64_t i = 0; i < dims; ++i) {  // splitmix64
      uint64_t z = state += 0x9e3779b97f4a7c15;
      z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
      z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
      total += factor[i] = z ^ (z >> 31);
    }
    for (int64_t j = 0; j <= dims; ++j) step[j] = total - uint64_t(dims + 1) * factor[j];
  }
  uint64_t hash(const int32_t* key, int64_t dims) const {
    uint64_t hash = 0;
    for (int64_t i = 0; i < dims; ++i) hash += uint64_t(int64_t(key[i])) * factor[i];
    return hash;
  }
};
// Mixed, since hashes of neighbours differ by the same number everywhere.
uint64_t mixed(uint64_t hash) {
  return (hash ^ (hash >> 32)) * 0x9e3779b97f4a7c15;
}

// Vertices by their keys: open addressing, at most half full.
class VertexTable {
 public:
  VertexTable(const Factors& factors, int64_t dims, int64_t expected) : factors_(factors), dims_(dims), capacity_(expected) {
    keys_ = memory<int32_t>(capacity_ * dims_);
    clear_slots();
  }

  int64_t count() const { return count_; }
  const int32_t* key(int64_t v) const { return &keys_[v * dims_]; }
  uint64_t hash(int64_t v) const { return factors_.hash(key(v), dims_); }
  // Before a hash is looked up; and once that has come, its key.
  void prefetch(uint64_t hash) const { __builtin_prefetch(&slots_[slot_of(hash)]); }
  void prefetch_key(uint64_t hash) const {
    const Slot slot = slots_[slot_of(hash)];
    if (slot.vertex >= 0 && slot.tag == tag_of(hash)) __builtin_prefetch(key(slot.vertex));
  }

  int32_t find_or_add(uint64_t hash, const int32_t* key) {
    int64_t s = find_slot(hash, key);
    if (slots_[s].vertex >= 0) return slots_[s].vertex;
    if (count_ == capacity_) {
      grow();
      s = find_slot(hash, key);
    }
    slots_[s] = {tag_of(hash), int32_t(count_)};
    std::copy_n(key, dims_, &keys_[count_ * dims_]);
    return int32_t(count_++);
  }

  // (count, dims). Nothing else remains.
  Memory<int32_t> take_keys() && {
    slots_.reset();
    return std::move(keys_);
  }

 private:
  struct Slot {
    uint32_t tag;
    int32_t vertex;
  };

  int64_t slot_of(uint64_t hash) const { return int64_t(((mixed(hash) >> 32) * uint64_t(slot_count_)) >> 32); }
  static uint32_t tag_of(uint64_t hash) { return uint32_t(hash); }
  // The slot of a vertex, or the one that it would go to.
  int64_t find_slot(uint64_t hash, const int32_t* key) const {
    int64_t s = slot_of(hash);
    while (slots_[s].vertex >= 0 && !is(slots_[s], hash, key)) s = s + 1 < slot_count_ ? s + 1 : 0;
    return s;
  }
  bool is(Slot slot, uint64_t hash, const int32_t* key) const {
    if (slot.tag != tag_of(hash)) return false;
    const int32_t* other = this->key(slot.vertex);
    bool same = true;
    for (int64_t i = 0; i < dims_; ++i) same &= key[i] == other[i];
    return same;
  }
  void clear_slots() {
    slot_count_ = 2 * capacity_;
    slots_ = memory<Slot>(slot_count_);
    std::fill_n(slots_.get(), slot_count_, Slot{0, -1});
  }
  void grow() {
    slots_.reset();
    capacity_ += capacity_ / 2 + 1;
    Memory<int32_t> keys = memory<int32_t>(capacity_ * dims_);
    std::copy_n(keys_.get(), count_ * dims_, keys.get());
    keys_ = std::move(keys);
    clear_slots();
    for (int64_t v = 0; v < count_; ++v) {
      const uint64_t hash = this->hash(v);
      int64_t s = slot_of(hash);
      while (slots_[s].vertex >= 0) s = s + 1 < slot_count_ ? s + 1 : 0;
      slots_[s] = {tag_of(hash), int32_t(v)};
    }
  }

  const Factors& factors_;
  int64_t dims_, capacity_, slot_count_ = 0, count_ = 0;
  Memory<Slot> slots_;
  Memory<int32_t> keys_;
};

// Calls fn(v, hash) for all vertices of a table, and has another one's entries for it fetched before.
template <typename F>
void for_each_vertex(const VertexTable& table, const VertexTable& other, const F& fn) {
  constexpr int64_t far = 32, near = 16;  // how far ahead slots and keys are fetched
  uint64_t ahead[far];
  const int64_t count = table.count();
  for (int64_t v = -far; v < count; ++v) {
    const uint64_t hash = v >= 0 ? ahead[v % far] : 0;
    if (v + far < count) other.prefetch(ahead[(v + far) % far] = table.hash(v + far));
    if (v + near >= 0 && v + near < count) other.prefetch_key(ahead[(v + near) % far]);
    if (v >= 0) fn(v, hash);
  }
}

using Lanes = double[kTile];

// The simplices of a tile of positions.
struct Simplices {
  Lanes feature[kMaxDim], elevated[kMaxCorners], origin[kMaxCorners], rank[kMaxCorners];
  Lanes offset[kMaxCorners];        // of a position from its origin, in units of dims + 1
  bool finite[kTile], same[kTile];  // same: as the position's before it in the tile
};

// By doubles throughout: the lattice is the same for values of any dtype. Products stand in loops
// of their own, so that none is fused into a sum: positions on a boundary between simplices belong
// to the same one whatever instructions the CPU has.
SEGOPS_MULTIVERSION void find_simplices(int64_t dims, Simplices& s) {
  constexpr double magic = 0x1.8p52;  // what is added to it is rounded to an integer
  const int64_t corners = dims + 1;
  const auto count = double(corners);
  Lanes total{}, term, scaled;
  for (int64_t t = 0; t < kTile; ++t) s.finite[t] = true;
  for (int64_t i = dims; i > 0; --i) {
    double* f = s.feature[i - 1];
    const double scale = count * std::sqrt(2.0 / 3.0) / std::sqrt(double(i * (i + 1)));
    for (int64_t t = 0; t < kTile; ++t) {
      const bool finite = std::abs(f[t]) <= 1.7976931348623157e308;
      s.finite[t] &= finite;
      const double value = finite ? f[t] : 0;
      f[t] = value > kMaxFeature ? kMaxFeature : value < -kMaxFeature ? -kMaxFeature : value;
    }
    for (int64_t t = 0; t < kTile; ++t) term[t] = f[t] * scale;
    for (int64_t t = 0; t < kTile; ++t) scaled[t] = term[t] * double(i);
    for (int64_t t = 0; t < kTile; ++t) s.elevated[i][t] = total[t] - scaled[t];
    for (int64_t t = 0; t < kTile; ++t) total[t] += term[t];
  }
  for (int64_t t = 0; t < kTile; ++t) s.elevated[0][t] = total[t];

  // The nearest point whose coordinates are multiples of `corners`, and what these add up to.
  Lanes sum{};
  for (int64_t i = 0; i < corners; ++i) {
    const double* e = s.elevated[i];
    for (int64_t t = 0; t < kTile; ++t) {
      const double at = e[t] / count, rounded = (at + magic) - magic;
      const double floor = rounded > at ? rounded - 1 : rounded, ceil = rounded < at ? rounded + 1 : rounded;
      const double nearest = ceil * count - e[t] < e[t] - floor * count ? ceil : floor;
      sum[t] += nearest;
      s.origin[i][t] = nearest * count;
      s.rank[i][t] = 0;
    }
  }
  // A coordinate's rank: how many have a larger difference; of equal ones the earlier counts as the
  // larger. Then the coordinates that are to be moved until the sum is 0.
  Lanes difference[kMaxCorners];
  for (int64_t i = 0; i < corners; ++i)
    for (int64_t t = 0; t < kTile; ++t) difference[i][t] = s.elevated[i][t] - s.origin[i][t];
  for (int64_t i = 0; i < corners; ++i)
    for (int64_t j = i + 1; j < corners; ++j)
      for (int64_t t = 0; t < kTile; ++t) {
        const double later = difference[j][t] > difference[i][t] ? 1 : 0;
        s.rank[i][t] += later;
        s.rank[j][t] += 1 - later;
      }
  for (int64_t i = 0; i < corners; ++i)
    for (int64_t t = 0; t < kTile; ++t) {
      const double rank = s.rank[i][t] + sum[t];
      const double turn = rank < 0 ? count : rank > double(dims) ? -count : 0;
      s.rank[i][t] = rank + turn;
      s.origin[i][t] += turn;
      s.offset[i][t] = (s.elevated[i][t] - s.origin[i][t]) / count;
    }
  for (int64_t t = 1; t < kTile; ++t) s.same[t] = s.finite[t] == s.finite[t - 1];
  for (int64_t i = 0; i < corners; ++i)
    for (int64_t t = 1; t < kTile; ++t)
      s.same[t] &= (s.origin[i][t] == s.origin[i][t - 1]) & (s.rank[i][t] == s.rank[i][t - 1]);
  s.same[0] = false;
}

// Numbers the vertices of positions begin .. end in a table of their own: index (positions, corners).
template <typename T>
VertexTable number_band(
    const Factors& factors, const Features& features, int64_t begin, int64_t end, int64_t dims, int32_t* index, T* weight) {
  const int64_t corners = dims + 1;
  VertexTable table(factors, dims, 2 * (end - begin));
  const auto s = std::make_unique<Simplices>();
  std::vector<uint64_t> hashes(kTile * corners);
  std::vector<std::array<uint8_t, kMaxCorners>> orders(kTile);  // the coordinate of each rank
  for (int64_t tile = begin; tile < end; tile += kTile) {
    const int64_t count = std::min(kTile, end - tile);
    features(tile, count, s->feature[0]);
    find_simplices(dims, *s);
    for (int64_t t = 0; t < count; ++t) {
      T* b = weight + (tile + t) * corners;
      if (!s->finite[t]) {
        std::fill_n(b, corners, T(0));
        continue;
      }
      auto& order = orders[t];
      if (s->same[t])
        order = orders[t - 1];
      else
        for (int64_t i = 0; i < corners; ++i) order[int64_t(s->rank[i][t])] = uint8_t(i);
      const auto offset = [&](int64_t rank) { return s->offset[order[rank]][t]; };
      b[0] = T(offset(dims) + (1 - offset(0)));
      for (int64_t k = 1; k < corners; ++k) b[k] = T(offset(dims - k) - offset(corners - k));
      if (s->same[t]) continue;
      uint64_t hash = 0;
      for (int64_t i = 0; i < dims; ++i) hash += uint64_t(int64_t(s->origin[i][t])) * factors.factor[i];
      for (int64_t k = 0; k < corners; ++k) {
        hashes[t * corners + k] = hash;
        table.prefetch(hash);
        hash += factors.step[order[dims - k]];
      }
    }
    for (int64_t t = 0; t < count; ++t) {
      int32_t* to = index + (tile + t) * corners;
      if (s->same[t]) {
        std::copy_n(to - corners, corners, to);
        continue;
      }
      if (!s->finite[t]) {
        std::fill_n(to, corners, -1);
        continue;
      }
      Key key;
      for (int64_t i = 0; i < corners; ++i) key[i] = int32_t(s->origin[i][t]);
      for (int64_t k = 0; k < corners; ++k) {
        to[k] = table.find_or_add(hashes[t * corners + k], key.data());
        for (int64_t i = 0; i < corners; ++i) ++key[i];
        key[orders[t][dims - k]] -= int32_t(corners);
      }
    }
  }
  return table;
}

constexpr int64_t kBand = 8192;  // positions whose vertices fit the cache

// Numbers the vertices of all positions in the order in which they come up: index (positions, corners).
// As many bands as there are threads have tables of their own, which are then put together.
template <typename T>
VertexTable number_vertices(
    const Factors& factors, const Features& features, int64_t positions, int64_t dims, int32_t* index, T* weight) {
  const int64_t bands = ceil_div(positions, kBand), together = torch::stable::get_num_threads();
  VertexTable all(factors, dims, 2 * positions);
  std::vector<std::optional<VertexTable>> tables(together);
  for (int64_t first = 0; first < bands; first += together) {
    const int64_t last = std::min(first + together, bands);
    parallel_for(first, last, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b)
        tables[b - first].emplace(
            number_band(factors, features, b * kBand, std::min((b + 1) * kBand, positions), dims, index, weight));
    });
    for (int64_t b = first; b < last; ++b) {
      const VertexTable& table = *tables[b - first];
      const Memory<int32_t> number = memory<int32_t>(table.count());
      for_each_vertex(table, all, [&](int64_t v, uint64_t hash) { number[v] = all.find_or_add(hash, table.key(v)); });
      int32_t* const end = index + std::min((b + 1) * kBand, positions) * (dims + 1);
      for (int32_t* e = index + b * kBand * (dims + 1); e < end; ++e)
        if (*e >= 0) *e = number[*e];
      tables[b - first].reset();
    }
  }
  return all;
}

// Vertices by groups, of one kind.
struct Groups {
  Memory<uint8_t> of;         // (vertices)
  std::vector<int32_t> last;  // how many vertices there are up to the end of each

  // Writes the order of vertices by groups, of one group in the order that they have: vertex(i) is
  // the i-th.
  template <typename F>
  void sort(const F& vertex, int32_t* order) const {
    std::vector<int32_t> at(last.size(), 0);
    std::copy(last.begin(), last.end() - 1, at.begin() + 1);
    for (int32_t i = 0; i < last.back(); ++i) {
      const int32_t v = vertex(i);
      order[at[of[v]]++] = v;
    }
  }
};

// Groups by coordinate `first` less the next, and that less the one after it: axes of other
// coordinates change neither.
Groups group(const int32_t* keys, int64_t count, int64_t dims, int64_t first) {
  constexpr int64_t side = 32;  // cells along each of the two, which groups are made of
  const int64_t enough = std::max<int64_t>(4096, count / (kMaxGroups - 1) + 1);
  // The two as sums over a key: the last coordinate, which is not there, is less the sum of the others.
  double factors[2][kMaxDim] = {};
  for (int64_t n = 0; n < 2 && first + n < dims; ++n) {
    factors[n][first + n] = 1;
    for (int64_t i = 0; i < dims; ++i) factors[n][i] += first + n + 1 == dims ? 1 : i == first + n + 1 ? -1 : 0;
  }
  const Memory<std::array<float, 2>> differences = memory<std::array<float, 2>>(count);
  for (int64_t v = 0; v < count; ++v)
    for (int n = 0; n < 2; ++n) {
      double sum = 0;
      for (int64_t i = 0; i < dims; ++i) sum += double(keys[v * dims + i]) * factors[n][i];
      differences[v][n] = float(sum);
    }
  // The cells reach over all but the outermost vertices, by a sample: one far away would leave all
  // others in a single cell.
  double least[2] = {}, scale[2] = {};
  for (int n = 0; n < 2; ++n) {
    std::vector<float> sample;
    for (int64_t v = 0; v < count; v += count / 1024 + 1) sample.push_back(differences[v][n]);
    std::sort(sample.begin(), sample.end());
    const size_t beyond = sample.size() / 64;
    if (sample.empty()) continue;
    least[n] = sample[beyond];
    scale[n] = side / (sample[sample.size() - 1 - beyond] - least[n] + 1);
  }
  const auto cell = [&](int64_t v) {
    const auto along = [&](int n) {
      return int64_t(std::clamp((double(differences[v][n]) - least[n]) * scale[n], 0.0, double(side - 1)));
    };
    return along(1) * side + along(0);
  };
  std::vector<int32_t> counts(side * side);
  for (int64_t v = 0; v < count; ++v) ++counts[cell(v)];
  Groups groups{memory<uint8_t>(count), {}};
  std::vector<uint8_t> group_of(counts.size());
  int32_t total = 0, before = 0;
  for (size_t c = 0; c < counts.size(); ++c) {
    group_of[c] = uint8_t(groups.last.size());
    total += counts[c];
    if (total - before >= enough || c + 1 == counts.size()) {
      groups.last.push_back(total);
      before = total;
    }
  }
  for (int64_t v = 0; v < count; ++v) groups.of[v] = group_of[cell(v)];
  return groups;
}

// The vertices of a group, to find their neighbours among: in the cache.
class Neighbours {
 public:
  // vertices (count), whose keys are among all the keys.
  Neighbours(const Factors& factors, const int32_t* vertices, int64_t count, const int32_t* keys, int64_t dims)
      : count_(count), dims_(dims), hashes_(count), keys_(count * dims), next_(count), follows_(count + 1) {
    while ((size_t(1) << bits_) < size_t(2 * count)) ++bits_;
    slots_.assign(size_t(1) << bits_, Slot{0, -1});
    for (int32_t i = 0; i < count; ++i) {
      std::copy_n(keys + vertices[i] * dims, dims, &keys_[i * dims]);
      hashes_[i] = factors.hash(&keys_[i * dims], dims);
      size_t s = slot_of(hashes_[i]);
      while (slots_[s].vertex >= 0) s = after(s);
      slots_[s] = {uint32_t(hashes_[i]), i};
    }
  }

  // The runs along an axis, which leads to the neighbours whose hashes are `step` further. Vertices
  // are called by name(i).
  template <typename F>
  std::vector<int32_t> runs(int64_t axis, uint64_t step, const F& name) {
    int32_t steps[kMaxCorners];
    for (int64_t i = 0; i <= dims_; ++i) steps[i] = i == axis ? -int32_t(dims_) : 1;
    std::fill(follows_.begin(), follows_.end(), 0);
    // Whether there is a neighbour cannot be foretold: no branch depends on it.
    for (int64_t i = 0; i < count_; ++i) {
      next_[i] = find(hashes_[i] + step, &keys_[i * dims_], steps);
      follows_[next_[i] + 1] = 1;
    }
    std::vector<int32_t> runs(count_);
    int32_t* to = runs.data();
    for (int64_t i = 0; i < count_; ++i) {
      if (follows_[i + 1] | (next_[i] < 0)) continue;
      *to++ = ~name(i);
      for (int32_t after = next_[i]; after >= 0; after = next_[after]) *to++ = name(after);
    }
    runs.resize(to - runs.data());
    runs.shrink_to_fit();
    return runs;
  }

 private:
  struct Slot {
    uint32_t tag;
    int32_t vertex;
  };

  size_t slot_of(uint64_t hash) const { return size_t(mixed(hash) >> (64 - bits_)); }
  size_t after(size_t slot) const { return (slot + 1) & ((size_t(1) << bits_) - 1); }
  // The vertex `steps` from a key; -1 if there is none.
  int32_t find(uint64_t hash, const int32_t* from, const int32_t* steps) const {
    for (size_t s = slot_of(hash);; s = after(s)) {
      while (slots_[s].vertex >= 0 && slots_[s].tag != uint32_t(hash)) s = after(s);
      const int32_t found = slots_[s].vertex, *key = &keys_[std::max(found, 0) * dims_];
      int32_t other = 0;
      for (int64_t k = 0; k < dims_; ++k) other |= key[k] ^ (from[k] + steps[k]);
      if ((other == 0) | (found < 0)) return found;
    }
  }

  int64_t count_, dims_;
  int bits_ = 4;
  std::vector<Slot> slots_;
  std::vector<uint64_t> hashes_;
  std::vector<int32_t> keys_, next_;
  std::vector<uint8_t> follows_;  // (1 + vertex): whether one comes before it
};

// Vertices in the order that they are numbered in, and their runs.
struct Order {
  Memory<int32_t> number;  // (vertices): what each is called
  std::vector<int32_t> last;
  int64_t places;
  std::vector<std::vector<int32_t>> runs;
};

Order sort_vertices(const Factors& factors, const int32_t* keys, int64_t count, int64_t dims) {
  Groups colours = group(keys, count, dims, kNear);
  const Groups places = group(keys, count, dims, 0);
  const Memory<int32_t> by_place = memory<int32_t>(count), by_colour = memory<int32_t>(count);
  places.sort([](int32_t i) { return i; }, by_place.get());
  colours.sort([&](int32_t i) { return by_place[i]; }, by_colour.get());
  places.sort([&](int32_t i) { return by_colour[i]; }, by_place.get());
  Order order{memory<int32_t>(count), colours.last, int64_t(places.last.size()), {}};
  for (int64_t i = 0; i < count; ++i) order.number[by_colour[i]] = int32_t(i);

  const auto find_runs = [&](const Groups& groups, const int32_t* vertices, int64_t first, int64_t axes) {
    const auto before = int64_t(order.runs.size()), of_kind = int64_t(groups.last.size());
    order.runs.resize(before + of_kind * axes);
    if (axes == 0) return;
    for_each_group(of_kind, [&](int64_t g, bool) {
      const int64_t begin = g > 0 ? groups.last[g - 1] : 0;
      Neighbours neighbours(factors, vertices + begin, groups.last[g] - begin, keys, dims);
      for (int64_t i = 0; i < axes; ++i)
        order.runs[before + g * axes + i] =
            neighbours.runs(first + i, factors.step[first + i], [&](int64_t v) { return order.number[vertices[begin + v]]; });
    });
  };
  const int64_t near = std::min(dims + 1, kNear);
  find_runs(colours, by_colour.get(), 0, near);
  find_runs(places, by_place.get(), near, dims + 1 - near);
  return order;
}

// Which positions each vertex has: offsets, sources and shares. Bands of positions count, and then
// write, each by itself; what they write does not depend on how many they are.
template <typename T>
void list_positions(
    const int32_t* index, const T* weight, int64_t positions, int64_t corners, int64_t vertices, int32_t* offsets,
    int32_t* sources, T* shares) {
  const int64_t bands = std::min<int64_t>(torch::stable::get_num_threads(), 8);
  const Memory<int32_t> next = memory<int32_t>(bands * vertices);  // where a band's entries of a vertex go
  const auto for_each_band = [&](const auto& fn) {
    parallel_for(0, bands, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) fn(positions * b / bands, positions * (b + 1) / bands, &next[b * vertices]);
    });
  };
  for_each_band([&](int64_t begin, int64_t end, int32_t* counts) {
    std::fill_n(counts, vertices, 0);
    for (int64_t e = begin * corners; e < end * corners; ++e)
      if (index[e] >= 0) ++counts[index[e]];
  });
  int32_t total = 0;
  for (int64_t v = 0; v < vertices; ++v) {
    offsets[v] = total;
    for (int64_t b = 0; b < bands; ++b) total += std::exchange(next[b * vertices + v], total);
  }
  offsets[vertices] = total;
  for_each_band([&](int64_t begin, int64_t end, int32_t* at) {
    for (int64_t p = begin, e = begin * corners; p < end; ++p)
      for (int64_t k = 0; k < corners; ++k, ++e) {
        if (index[e] < 0) continue;
        const int32_t to = at[index[e]]++;
        sources[to] = int32_t(p);
        shares[to] = weight[e];
      }
  });
  // What is kept is written to its end, or it would not be the same each time.
  std::fill(sources + total, sources + positions * corners + kAhead, 0);
  std::fill(shares + total, shares + positions * corners, T(0));
}

}  // namespace

template <typename T>
OwnLattice<T> build_lattice(const Features& features, int64_t positions, int64_t dims, int32_t* indices, T* weights) {
  const int64_t corners = dims + 1, entries = positions * corners;
  OwnLattice<T> result;
  const bool kept = indices;
  if (!kept) {
    result.own_indices = memory<int32_t>(kept_indices(positions, dims));
    result.own_weights = memory<T>(kept_weights(positions, dims));
    indices = result.own_indices.get();
    weights = result.own_weights.get();
  }
  // As kept_lattice finds them.
  int32_t *const last = indices + 3, *const runs_last = last + kMaxGroups, *const index = runs_last + kMaxGroups * corners;
  int32_t *const sources = index + entries, *const offsets = sources + entries + kAhead;

  const Factors factors(dims);
  int64_t vertices;
  Order order;
  {
    VertexTable table = number_vertices(factors, features, positions, dims, index, weights);
    vertices = table.count();
    const Memory<int32_t> keys = std::move(table).take_keys();
    order = sort_vertices(factors, keys.get(), vertices, dims);
  }
  parallel_for(0, entries, 1 << 14, [&](int64_t begin, int64_t end) {
    for (int64_t e = begin; e < end; ++e)
      if (index[e] >= 0) index[e] = order.number[index[e]];
  });
  indices[0] = int32_t(vertices);
  indices[1] = int32_t(order.last.size());
  indices[2] = int32_t(order.places);
  std::fill(std::copy(order.last.begin(), order.last.end(), last), runs_last, 0);
  int32_t *to = offsets + vertices + 1, *run_last = runs_last;
  for (std::vector<int32_t>& runs : order.runs) {
    to = std::copy(runs.begin(), runs.end(), to);
    *run_last++ = int32_t(to - (offsets + vertices + 1));
    runs = std::vector<int32_t>();  // or they would be there twice
  }
  std::fill(run_last, index, 0);
  if (kept) std::fill(to, indices + kept_indices(positions, dims), 0);
  order = {};
  list_positions(index, weights, positions, corners, vertices, offsets, sources, weights + entries);
  static_cast<Lattice<T>&>(result) = kept_lattice<T>(indices, weights, positions, dims);
  return result;
}

template OwnLattice<float> build_lattice(const Features&, int64_t, int64_t, int32_t*, float*);
template OwnLattice<double> build_lattice(const Features&, int64_t, int64_t, int32_t*, double*);

}  // namespace segops::crf
