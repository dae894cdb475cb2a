// The permutohedral lattice of an image's features, on the CPU.
#pragma once

#include "../common/vec.h"
#include "crf.h"
#include "memory_cpu.h"

#include <functional>

namespace segops::crf {

// Vertices that follow each other along an axis make a run, which a blur goes along.
//
// Vertices are numbered by cells: those of the same place along the first two features, which for an
// image are x and y. An axis from the fourth on leads from no cell to another: along these axes a
// cell, or several, is blurred while it is in the cache.
template <typename T>
struct Lattice {
  int64_t positions, dims, vertices;
  const int32_t* index;    // (positions, corners): the vertices of a position's simplex; -1 if it has none
  const T* weight;         // (positions, corners): its barycentric coordinates
  const int32_t* offsets;  // (vertices + 1): where the positions of each vertex begin in ..
  const int32_t* sources;  // (offsets[vertices]): positions, in ascending order, and
  const T* shares;         // their weights
  const int32_t* runs;     // vertices along axis 0, then 1, and so on; the first of each run is ~vertex
  const int32_t* sizes;    // (corners): of the runs along each axis, together
  const int32_t* cells;    // how many groups of cells; the vertex that each ends before

  int64_t corners() const { return dims + 1; }
};

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
  l.weight = weights;
  l.shares = weights + entries;
  l.vertices = indices[0];
  l.sizes = indices + 1;
  l.index = l.sizes + corners;
  l.sources = l.index + entries;
  l.cells = l.sources + entries;  // what is fetched ahead may lie beyond the sources
  l.offsets = l.cells + 1 + kMaxCells;
  l.runs = l.offsets + l.vertices + 1;
  return l;
}

}  // namespace segops::crf
