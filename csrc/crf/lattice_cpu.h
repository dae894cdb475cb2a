// The permutohedral lattice of an image's features, on the CPU.
#pragma once

#include "../common/cpu.h"
#include "crf.h"
#include "memory_cpu.h"

#include <algorithm>
#include <atomic>
#include <functional>

namespace segops::crf {

constexpr int64_t kNear = 3;    // the first axes: no other changes the first two features, x and y of an image
constexpr int64_t kAhead = 32;  // entries of a list: how far ahead memory is fetched

// Vertices that follow each other along an axis make a run, which a blur goes along.
//
// Vertices are grouped twice: by places, which the far axes do not lead out of, and by colours, which
// the near axes do not lead out of. They are numbered by colours, then by places. A group is splat
// and blurred along its axes while it is in the cache, whatever becomes of the others.
template <typename T>
struct Lattice {
  int64_t positions, dims, vertices, colours, places;
  const int32_t* index;      // (positions, corners): the vertices of a position's simplex; -1 if it has none
  const T* weight;           // (positions, corners): its barycentric coordinates
  const int32_t* offsets;    // (vertices + 1): where the positions of each vertex begin in ..
  const int32_t* sources;    // (offsets[vertices]): positions, in ascending order, and
  const T* shares;           // their weights
  const int32_t* last;       // (colours): the vertex that each ends before
  const int32_t* runs;       // vertices: the runs of each colour along its axes, then of each place; a run's first is ~vertex
  const int32_t* runs_last;  // (colours, near), then (places, far): the entry that they end before

  int64_t corners() const { return dims + 1; }
  int64_t near() const { return std::min(corners(), kNear); }
  int64_t far() const { return corners() - near(); }
};

// Calls fn(group, together) for groups, which are not equally large: each thread takes the next one;
// or all threads together each, one after the other, where there are fewer groups than threads.
template <typename F>
void for_each_group(int64_t count, const F& fn) {
  const auto threads = int64_t(torch::stable::get_num_threads());
  if (count < threads) {
    for (int64_t group = 0; group < count; ++group) fn(group, true);
    return;
  }
  std::atomic<int64_t> next{0};
  parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t group; (group = next++) < count;) fn(group, false);
  });
}

constexpr int64_t kTile = 64;
// Writes the features of `count` positions, at most kTile, from `begin` on: f (dims, kTile).
using Features = std::function<void(int64_t begin, int64_t count, double* f)>;

// A lattice, and its memory where that is not lent.
template <typename T>
struct OwnLattice : Lattice<T> {
  Memory<int32_t> own_indices;
  Memory<T> own_weights;
};

// The lattice of features. It is built in memory for kept_indices and kept_weights where there is
// some, which `kept_lattice` finds it in.
template <typename T>
OwnLattice<T> build_lattice(
    const Features& features, int64_t positions, int64_t dims, int32_t* indices = nullptr, T* weights = nullptr);

template <typename T>
Lattice<T> kept_lattice(const int32_t* indices, const T* weights, int64_t positions, int64_t dims) {
  const int64_t corners = dims + 1, entries = positions * corners;
  Lattice<T> l;
  l.positions = positions;
  l.dims = dims;
  l.vertices = indices[0];
  l.colours = indices[1];
  l.places = indices[2];
  l.weight = weights;
  l.shares = weights + entries;
  l.last = indices + 3;
  l.runs_last = l.last + kMaxGroups;
  l.index = l.runs_last + kMaxGroups * corners;
  l.sources = l.index + entries;
  l.offsets = l.sources + entries + kAhead;  // beyond the sources, which are fetched ahead
  l.runs = l.offsets + l.vertices + 1;
  return l;
}

}  // namespace segops::crf
