"""The permutohedral lattice and mean field in plain PyTorch.

The lattice is an op, as how many vertices there are depends on the features: what traces and
transforms sees tables of the size that is always enough. All else are PyTorch's own ops.
"""

import math

import torch
import torch.nn.functional as F
from torch import library as torch_library

from ..common import library

# Coordinates of the lattice are told apart, and counted by 32 bits in C++, up to here.
LARGEST_FEATURE = 1e7
SMALLEST_PROBABILITY = 2.0**-100  # products of smaller ones are denormal, which a CPU takes long for


def permutohedral_filter(values, features, normalization):
    """values (N, C, P), features (N, d, P) -> (N, C, P)."""
    return _Bilateral(features, normalization)(values).to(values.dtype)


def mean_field(logits, images, spatial, bilateral, settings):
    """logits (N, C, H, W), images (N, K, H, W) -> log Q. `spatial` and `bilateral` are the
    compatibility times the weight of each kernel, (C, C), or None where there is no such kernel."""
    *_, height, width = logits.shape
    if spatial is not None:
        # In float64, which autocast, where a backward pass may run, leaves alone.
        spatial = spatial.to(_precise(logits))
        rows, columns = (
            _spatial_axis(side, settings.spatial_sigma, settings.normalization, spatial) for side in (height, width)
        )
    if bilateral is not None:
        bilateral = bilateral.to(_precise(logits))
        position = features_of(images, *settings.bilateral_sigma)
        bilateral_filter = _Bilateral(position.flatten(2), settings.normalization)
    updated = logits
    for _ in range(settings.iterations):
        q = F.threshold(updated.softmax(1), SMALLEST_PROBABILITY, 0.0)
        updated = logits
        if spatial is not None:
            updated = updated + torch.einsum("lm,nmhw->nlhw", spatial, rows @ q.to(spatial) @ columns.T).to(updated)
        if bilateral is not None:
            filtered = bilateral_filter(q.flatten(2)).unflatten(2, (height, width))
            updated = updated + torch.einsum("lm,nmhw->nlhw", bilateral, filtered).to(updated)
    return updated.log_softmax(1)


def features_of(images, sigma_position, sigma_intensity):
    """(N, 2 + K, H, W): x, y and the image, each in units of its standard deviation."""
    images = images.to(_precise(images))
    count, _, height, width = images.shape
    y = _in_units(torch.arange(height, dtype=images.dtype, device=images.device), sigma_position)
    x = _in_units(torch.arange(width, dtype=images.dtype, device=images.device), sigma_position)
    position = torch.stack([x.expand(height, width), y[:, None].expand(height, width)])
    return torch.cat([position.expand(count, -1, -1, -1), _in_units(images, sigma_intensity)], 1)


def _in_units(numbers, sigma):
    """numbers / sigma, of a small sigma no more than the largest feature. What is not finite stays
    so; and 0 stays 0, also where the sigma, or its inverse, is none in this dtype."""
    quotient = (numbers / sigma).clamp(-LARGEST_FEATURE, LARGEST_FEATURE)
    return quotient.where(numbers.isfinite() & (numbers != 0), numbers)


def _spatial_axis(side, sigma, normalization, like):
    """The Gaussian along an axis, normalised: the filter is separable, and so are its sums."""
    position = torch.arange(side, dtype=like.dtype, device=like.device)
    kernel = torch.exp(-0.5 * _in_units(position[:, None] - position, sigma) ** 2)
    total = kernel.sum(1)
    if normalization == "after":
        return kernel / total[:, None]
    return kernel / (total[:, None] * total).sqrt()


class _Bilateral:
    """Filters values (N, C, P) by the lattice of features (N, d, P), in float64: where many
    positions share a vertex, float32 loses digits of their sum."""

    def __init__(self, features, normalization):
        features = features.detach().to(_precise(features))
        self.finite = features.isfinite().all(1, keepdim=True)
        self.index, self.weight, self.neighbours = _lattice(features)
        self.alpha = 1 / (1 + 2.0 ** -features.shape[1])
        self.normalization = normalization
        if normalization is not None:
            total = self._filter(torch.ones_like(features[:, :1]))
            self.total = total.masked_fill(~self.finite, 1.0)  # where it is 0

    def __call__(self, values):
        values = values.to(self.weight).masked_fill(~self.finite, 0.0)
        if self.normalization is None:
            filtered = self._filter(values)
        elif self.normalization == "after":
            filtered = self._filter(values) / self.total
        else:
            scale = self.total.rsqrt()
            filtered = self._filter(values * scale) * scale
        return filtered.masked_fill(~self.finite, torch.nan)

    def _filter(self, values):
        rows = values.transpose(1, 2).flatten(0, 1)  # (N P, C)
        # The last vertex stands for those that do not exist: it is 0, and its neighbours are.
        z = rows.new_zeros(self.neighbours.shape[2], rows.shape[1])
        for index, weight in zip(self.index.unbind(1), self.weight.unbind(1), strict=True):
            z = z.index_add(0, index, weight[:, None] * rows)
        for one, other in self.neighbours:
            z = z + (z[one] + z[other]) / 2
        y = sum(weight[:, None] * z[index] for index, weight in zip(self.index.unbind(1), self.weight.unbind(1), strict=True))
        return self.alpha * y.unflatten(0, (values.shape[0], values.shape[2])).transpose(1, 2)


def _lattice(features):
    """`lattice`, without the vertices that do not exist where that can be known. (A GPU has been
    waited for already, by the lattice itself.)"""
    index, weight, neighbours = lattice(features)
    if features.shape[0] == 0 or not library.has_numbers(index):
        return index, weight, neighbours
    count = int(index.max()) + 1
    return index, weight, torch.cat([neighbours[..., :count], neighbours[..., -1:]], 2)


@torch_library.custom_op("segops_reference::crf_lattice", mutates_args=())
def lattice(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The lattice of features (N, d, P).

    Returns:
        index: (N P, d + 1) int64, the vertices of each position's simplex.
        weight: (N P, d + 1), its barycentric coordinates; 0 where features are not finite.
        neighbours: (d + 1, 2, N P (d + 1) + 1) int64: of each vertex those before and after it
            along each axis, -1 where there are none. Rows beyond those that exist are -1.
    """
    index, weight, neighbours = _empty_lattice(features)
    d = features.shape[1]
    f = features.transpose(1, 2).reshape(-1, d)
    finite = f.isfinite().all(1)
    f = f.masked_fill(~finite[:, None], 0.0).clamp(-LARGEST_FEATURE, LARGEST_FEATURE)

    # Into the hyperplane whose coordinates add up to 0.
    elevated, total = [], torch.zeros_like(f[:, 0])
    for i in range(d, 0, -1):
        term = f[:, i - 1] * ((d + 1) * math.sqrt(2 / 3) / math.sqrt(i * (i + 1)))
        elevated.append(total - i * term)
        total = total + term
    elevated = torch.stack([total, *reversed(elevated)], 1)  # (N P, d + 1)

    # The nearest point whose coordinates are multiples of d + 1; moved until these add up to 0.
    low, high = (rounded(elevated / (d + 1)) * (d + 1) for rounded in (torch.floor, torch.ceil))
    origin = torch.where(high - elevated < elevated - low, high, low)
    excess = (origin.sum(1, keepdim=True) / (d + 1)).round()
    difference = elevated - origin
    # How many coordinates have a larger difference; of equal ones the earlier counts as the larger.
    earlier = torch.ones(d + 1, d + 1, dtype=torch.bool, device=f.device).tril(-1)
    larger = (difference[:, None, :] > difference[:, :, None]) | ((difference[:, None, :] == difference[:, :, None]) & earlier)
    rank = larger.sum(2) + excess.long()
    turn = (rank < 0).long() - (rank > d).long()
    rank, origin = rank + turn * (d + 1), origin + turn * (d + 1)

    offset = ((elevated - origin) / (d + 1)).gather(1, rank.argsort(1))  # by rank: the largest first
    weight[:, 1:] = (offset[:, :-1] - offset[:, 1:]).flip(1)
    weight[:, 0] = offset[:, d] + (1 - offset[:, 0])
    weight *= finite[:, None]

    # Vertex k of a simplex is its origin plus k, less d + 1 in the k coordinates of the last ranks.
    k = torch.arange(d + 1, device=f.device)
    keys = origin.long()[:, None, :] + k[:, None] - (d + 1) * (rank[:, None, :] > d - k[:, None]).long()
    image = torch.arange(features.shape[0], device=f.device).repeat_interleave(features.shape[2])
    keys = torch.cat([image[:, None, None].expand(-1, d + 1, 1), keys[..., :d]], 2)[finite]  # the last follows from the others
    index.zero_()
    neighbours.fill_(-1)
    if keys.shape[0] == 0:
        return index, weight, neighbours
    vertices, inverse = keys.flatten(0, 1).unique(dim=0, return_inverse=True)
    index[finite] = inverse.view(-1, d + 1)
    count = vertices.shape[0]
    for j in range(d + 1):
        step = torch.ones(d + 1, dtype=torch.long, device=f.device)
        step[0] = 0  # the image
        if j < d:
            step[1 + j] -= d + 1
        _, inverse = torch.cat([vertices, vertices + step]).unique(dim=0, return_inverse=True)
        found = torch.full((2 * count,), -1, device=f.device)
        found[inverse[:count]] = torch.arange(count, device=f.device)
        after = found[inverse[count:]]
        neighbours[j, 1, :count] = after
        neighbours[j, 0, after[after >= 0]] = torch.arange(count, device=f.device)[after >= 0]
    return index, weight, neighbours


@lattice.register_fake
def _empty_lattice(features):
    count, d, positions = features.shape
    index = features.new_empty((count * positions, d + 1), dtype=torch.int64)
    weight = features.new_empty((count * positions, d + 1))
    return index, weight, features.new_empty((d + 1, 2, count * positions * (d + 1) + 1), dtype=torch.int64)


@lattice.register_vmap
def _lattice_of_each(info, in_dims, features):
    each = [lattice(one) for one in features.unbind(in_dims[0])]
    return tuple(map(torch.stack, zip(*each, strict=True))), (0, 0, 0)


def _precise(tensor):
    """float64 where there is any: lattice and filter are the same whatever dtype is filtered."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64
