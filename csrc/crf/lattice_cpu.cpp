// Building the lattice: positions to simplices a tile at a time, vertices to numbers through a hash
// table, in the order of their first position; then neighbours along each axis to runs.

#include "lattice_cpu.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <numeric>

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
};

// Vertices by their keys: open addressing, at most half full.
class VertexTable {
 public:
  VertexTable(const Factors& factors, int64_t dims, int64_t expected) : factors_(factors), dims_(dims), capacity_(expected) {
    keys_ = memory<int32_t>(capacity_ * dims_);
    clear_slots();
  }

  int64_t count() const { return count_; }
  const int32_t* key(int64_t v) const { return &keys_[v * dims_]; }
  uint64_t hash(int64_t v) const {
    uint64_t hash = 0;
    for (int64_t i = 0; i < dims_; ++i) hash += uint64_t(int64_t(key(v)[i])) * factors_.factor[i];
    return hash;
  }
  // Before a hash is looked up; and once that has come, its key.
  void prefetch(uint64_t hash) const { __builtin_prefetch(&slots_[slot_of(hash)]); }
  void prefetch_key(uint64_t hash) const {
    const Slot slot = slots_[slot_of(hash)];
    if (slot.vertex >= 0 && slot.tag == tag_of(hash)) __builtin_prefetch(key(slot.vertex));
  }

  // -1 if there is none.
  int32_t find(uint64_t hash, const int32_t* key) const { return slots_[find_slot(hash, key)].vertex; }

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

  // Vertex v becomes place[v].
  void renumber(const int32_t* place) {
    const Memory<int32_t> keys = std::move(keys_);
    keys_ = memory<int32_t>(count_ * dims_);
    capacity_ = count_;
    for (int64_t v = 0; v < count_; ++v) std::copy_n(&keys[v * dims_], dims_, &keys_[place[v] * dims_]);
    for (int64_t s = 0; s < slot_count_; ++s)
      if (slots_[s].vertex >= 0) slots_[s].vertex = place[slots_[s].vertex];
  }

 private:
  struct Slot {
    uint32_t tag;
    int32_t vertex;
  };

  // Mixed, since hashes of neighbours differ by the same number everywhere.
  int64_t slot_of(uint64_t hash) const {
    const uint64_t mixed = (hash ^ (hash >> 32)) * 0x9e3779b97f4a7c15;
    return int64_t(((mixed >> 32) * uint64_t(slot_count_)) >> 32);
  }
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

// Calls fn(v, hash + step) for all vertices of a table, and has another one's entries for it fetched
// before.
template <typename F>
void for_each_vertex(const VertexTable& table, const VertexTable& other, uint64_t step, const F& fn) {
  constexpr int64_t far = 32, near = 16;  // how far ahead slots and keys are fetched
  uint64_t ahead[far];
  const int64_t count = table.count();
  for (int64_t v = -far; v < count; ++v) {
    const uint64_t hash = v >= 0 ? ahead[v % far] : 0;
    if (v + far < count) {
      const uint64_t coming = ahead[(v + far) % far] = table.hash(v + far) + step;
      other.prefetch(coming);
    }
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
      double offset[kMaxCorners] = {};  // by rank
      uint64_t hash = 0;
      for (int64_t i = 0; i < corners; ++i) {
        const auto rank = int64_t(s->rank[i][t]);
        order[rank] = uint8_t(i);
        offset[rank] = s->offset[i][t];
        hash += uint64_t(int64_t(s->origin[i][t])) * factors.factor[i];
      }
      b[0] = T(offset[dims] + (1 - offset[0]));
      for (int64_t k = 1; k < corners; ++k) b[k] = T(offset[dims - k] - offset[corners - k]);
      if (s->same[t]) continue;
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

constexpr int64_t kBand = 16384;  // positions whose vertices fit the cache

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
    torch::stable::parallel_for(first, last, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b)
        tables[b - first].emplace(
            number_band(factors, features, b * kBand, std::min((b + 1) * kBand, positions), dims, index, weight));
    });
    for (int64_t b = first; b < last; ++b) {
      const VertexTable& table = *tables[b - first];
      const Memory<int32_t> number = memory<int32_t>(table.count());
      for_each_vertex(table, all, 0, [&](int64_t v, uint64_t hash) { number[v] = all.find_or_add(hash, table.key(v)); });
      int32_t* const end = index + std::min((b + 1) * kBand, positions) * (dims + 1);
      for (int32_t* e = index + b * kBand * (dims + 1); e < end; ++e)
        if (*e >= 0) *e = number[*e];
      tables[b - first].reset();
    }
  }
  return all;
}

// The order of vertices by cells, (vertex): its place; and the ends of groups of cells.
struct Cells {
  Memory<int32_t> place;
  std::vector<int32_t> ends;
};

Cells sort_by_cells(const VertexTable& table, int64_t dims) {
  constexpr int64_t side = 32, enough = 4096;  // cells along a feature; vertices of a group
  static_assert(side * side == kMaxCells);
  const int64_t count = table.count();
  // Where a vertex is along the first two features, but for a factor. All coordinates agree modulo
  // dims + 1.
  const auto along = [&](int64_t v, int feature) {
    const int32_t* k = table.key(v);
    const int64_t second = dims > 1 ? k[1] : -int64_t(k[0]);
    if (feature == 0) return (k[0] - second) / (dims + 1);
    const int64_t third = dims > 2 ? k[2] : -(int64_t(k[0]) + second);
    return (k[0] + second - 2 * third) / (dims + 1);
  };
  int64_t least[2], step[2];
  for (int feature = 0; feature < 2; ++feature) {
    int64_t low = count > 0 ? along(0, feature) : 0, high = low;
    for (int64_t v = 0; v < count; ++v) {
      low = std::min(low, along(v, feature));
      high = std::max(high, along(v, feature));
    }
    least[feature] = low;
    step[feature] = (high - low) / side + 1;
  }
  Cells cells{memory<int32_t>(count), {}};
  std::vector<int32_t> first(kMaxCells + 1, 0);
  for (int64_t v = 0; v < count; ++v) {
    cells.place[v] = int32_t((along(v, 1) - least[1]) / step[1] * side + (along(v, 0) - least[0]) / step[0]);
    ++first[cells.place[v] + 1];
  }
  for (int64_t cell = 0; cell < kMaxCells; ++cell) {
    first[cell + 1] += first[cell];
    if (first[cell + 1] - (cells.ends.empty() ? 0 : cells.ends.back()) >= enough) cells.ends.push_back(first[cell + 1]);
  }
  if (cells.ends.empty() || cells.ends.back() < count) cells.ends.push_back(int32_t(count));
  for (int64_t v = 0; v < count; ++v) cells.place[v] = first[cells.place[v]]++;
  return cells;
}

// The runs along an axis.
std::vector<int32_t> find_runs(const Factors& factors, const VertexTable& table, int64_t dims, int64_t axis) {
  const int64_t count = table.count();
  const Memory<int32_t> next = memory<int32_t>(count);
  std::vector<uint8_t> follows(count, 0);
  for_each_vertex(table, table, factors.step[axis], [&](int64_t v, uint64_t hash) {
    Key key;
    const int32_t* from = table.key(v);
    for (int64_t i = 0; i < dims; ++i) key[i] = from[i] + 1;
    if (axis < dims) key[axis] -= int32_t(dims + 1);
    next[v] = table.find(hash, key.data());
    if (next[v] >= 0) follows[next[v]] = 1;
  });
  std::vector<int32_t> runs;
  for (int64_t v = 0; v < count; ++v) {
    if (follows[v] || next[v] < 0) continue;
    runs.push_back(~int32_t(v));
    for (int32_t after = next[v]; after >= 0; after = next[after]) runs.push_back(after);
  }
  return runs;
}

}  // namespace

template <typename T>
OwnLattice<T> build_lattice(const Features& features, int64_t positions, int64_t dims, int32_t* indices, T* weights) {
  const int64_t corners = dims + 1, entries = positions * corners;
  STD_TORCH_CHECK(entries < 0x7fffffff, "crf: too many positions");
  OwnLattice<T> result;
  const bool kept = indices;
  if (!kept) {
    result.own_indices = memory<int32_t>(kept_indices(positions, dims));
    result.own_weights = memory<T>(kept_weights(positions, dims));
    indices = result.own_indices.get();
    weights = result.own_weights.get();
  }
  int32_t *const sizes = indices + 1, *const index = sizes + corners, *const sources = index + entries;
  int32_t *const groups = sources + entries, *const offsets = groups + 1 + kMaxCells;
  const Factors factors(dims);
  VertexTable table = number_vertices(factors, features, positions, dims, index, weights);
  const Cells cells = sort_by_cells(table, dims);
  table.renumber(cells.place.get());
  indices[0] = int32_t(table.count());
  groups[0] = int32_t(cells.ends.size());
  std::copy(cells.ends.begin(), cells.ends.end(), groups + 1);

  std::vector<std::vector<int32_t>> runs(corners);
  torch::stable::parallel_for(0, corners, 1, [&](int64_t begin, int64_t end) {
    for (int64_t axis = begin; axis < end; ++axis) runs[axis] = find_runs(factors, table, dims, axis);
  });

  std::fill_n(offsets, table.count() + 1, 0);
  for (int64_t e = 0; e < entries; ++e) {
    if (index[e] < 0) continue;
    index[e] = cells.place[index[e]];
    ++offsets[index[e] + 1];
  }
  for (int64_t v = 0; v < table.count(); ++v) offsets[v + 1] += offsets[v];
  std::vector<int32_t> next(offsets, offsets + table.count());
  T* const shares = weights + entries;
  for (int64_t p = 0, e = 0; p < positions; ++p)
    for (int64_t k = 0; k < corners; ++k, ++e) {
      if (index[e] < 0) continue;
      const int32_t at = next[index[e]]++;
      sources[at] = int32_t(p);
      shares[at] = weights[e];
    }

  int32_t* to = offsets + table.count() + 1;
  for (int64_t axis = 0; axis < corners; ++axis) {
    sizes[axis] = int32_t(runs[axis].size());
    to = std::copy(runs[axis].begin(), runs[axis].end(), to);
  }
  // What is kept is written to its end, or it would not be the same each time.
  std::fill(groups + 1 + cells.ends.size(), offsets, 0);
  if (kept) std::fill(to, indices + kept_indices(positions, dims), 0);
  std::fill(shares + offsets[table.count()], weights + 2 * entries, T(0));
  std::fill(sources + offsets[table.count()], sources + entries, 0);
  static_cast<Lattice<T>&>(result) = kept_lattice<T>(indices, weights, positions, dims);
  return result;
}

template OwnLattice<float> build_lattice(const Features&, int64_t, int64_t, int32_t*, float*);
template OwnLattice<double> build_lattice(const Features&, int64_t, int64_t, int32_t*, double*);

}  // namespace segops::crf
