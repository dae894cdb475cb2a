"""A drawn scene that is like a photograph to a CRF: sharp and thin shapes, shading, texture and the
camera's noise, as many vertices of the lattice to a pixel as photographs have.

Seven photographs in the sizes of PASCAL VOC have 0.1 to 1.9 vertices to a pixel at bilateral sigmas
of 67 pixels and 3 levels, 1.1 on average.
"""

import functools
import math

import torch
import torch.nn.functional as F

CLASSES = ("sky", "meadow", "house", "tree", "fence", "balloon")
PALETTE = ((120, 175, 225), (140, 185, 80), (205, 110, 85), (40, 110, 60), (95, 65, 50), (230, 190, 40))
TINT = 0.3  # texture of each colour channel alone, beside that of all
NOISE = 2.5  # of the camera, in levels


def draw(size, seed=0):
    """(image (3, H, W) uint8, labels (H, W) int64, indices into CLASSES). The same size and seed give the same scene."""
    scene = _Scene(size, seed)
    width = size[1] / size[0]  # lengths are in heights of the image
    uniform = scene.uniform

    # From the back to the front.
    horizon = uniform(0.55, 0.65)
    scene.paint("sky", torch.full(size, -1.0), (150, 185, 225), slope=70, texture=6, finest=16)
    hills = horizon + 0.03 * torch.sin(scene.x * uniform(4, 7) + uniform(0, 6))
    scene.paint("meadow", hills - scene.y, (115, 135, 65), slope=-50, texture=26)

    x, y, radius = uniform(0.5, 0.55) * width, uniform(0.16, 0.22), uniform(0.08, 0.1)
    rope, basket = scene.line((x, y), (x + 0.02, y + 3 * radius), 0.004), scene.box((x + 0.02, y + 3 * radius), (0.02, 0.018))
    scene.paint("balloon", torch.minimum(rope, basket), (90, 60, 45), texture=4)
    scene.paint("balloon", scene.disc((x, y), radius), (215, 150, 60), slope=60, texture=7, finest=4)

    x, y = uniform(0.2, 0.3) * width, horizon - 0.04
    scene.paint("house", scene.box((x, y), (0.16, 0.12)), (195, 170, 150), slope=25, texture=12)
    scene.paint("house", scene.box((x + 0.1, y - 0.26), (0.02, 0.06)), (130, 75, 65), texture=10)
    roof = torch.maximum((y - 0.28) - scene.y + 0.75 * (scene.x - x).abs(), scene.y - (y - 0.12))
    scene.paint("house", roof, (150, 70, 60), slope=30, texture=14)
    windows = [scene.box((x + side, y + 0.01), (0.022, 0.035)) for side in (-0.09, 0.0, 0.09)]
    scene.paint("house", least(windows), (60, 70, 85), slope=60, texture=3)

    x, y = uniform(0.76, 0.82) * width, horizon + 0.1
    top = (x + uniform(-0.01, 0.02), y - 0.3)
    branches, leaves = [scene.line((x, y), top, 0.016)], []
    for _ in range(7):
        angle, length = uniform(-1.2, 1.2), uniform(0.12, 0.2)
        tip = top[0] + length * math.sin(angle), top[1] - length * math.cos(angle)
        branches.append(scene.line(top, tip, 0.004))
        leaves.append(scene.disc(tip, uniform(0.035, 0.06)))
    scene.paint("tree", least(leaves) + 0.02 * scene.noise(6), (65, 95, 45), slope=-40, texture=28)
    scene.paint("tree", least(branches), (85, 70, 60), texture=9)

    y, step = horizon + 0.26, uniform(0.075, 0.085)
    posts = [scene.box((i * step, y), (0.008, 0.09)) for i in range(int(width / step) + 2)]
    rails = [scene.line((0, y + rail), (width, y + rail + uniform(-0.01, 0.01)), 0.006) for rail in (-0.05, 0.03)]
    scene.paint("fence", least([*posts, *rails]), (220, 215, 205), slope=-30, texture=4)
    return scene.photograph(), scene.labels


def coarse_logits(labels, num_classes, stride=16, noise=0.5, seed=0):
    """Logits (C, h, w) as of a network with this output stride: the labels' shares of each cell, blurred; noise."""
    planes = (labels == torch.arange(num_classes)[:, None, None]).float()
    shares = F.interpolate(planes[None], [-(-side // stride) for side in labels.shape], mode="bilinear", antialias=True)
    blurred = F.avg_pool2d(F.pad(shares, (1, 1, 1, 1), mode="replicate"), 3, stride=1)[0]
    return (blurred + 0.05).log() + noise * torch.randn(blurred.shape, generator=torch.Generator().manual_seed(seed))


def least(distances):
    """The signed distance to the shapes' union."""
    return functools.reduce(torch.minimum, distances)


class _Scene:
    """What has been painted. Shapes are their signed distances, negative inside."""

    def __init__(self, size, seed):
        self.height, self.width = size
        self.generator = torch.Generator().manual_seed(seed)
        y, x = (torch.arange(side, dtype=torch.float32).add(0.5).div(self.height) for side in size)
        self.x, self.y = x.expand(size), y[:, None].expand(size)
        self.image, self.labels = torch.zeros(3, *size), torch.zeros(size, dtype=torch.int64)

    def uniform(self, low, high):
        return low + (high - low) * torch.rand((), generator=self.generator).item()

    def disc(self, centre, radius):
        return torch.hypot(self.x - centre[0], self.y - centre[1]) - radius

    def box(self, centre, half):
        return torch.maximum((self.x - centre[0]).abs() - half[0], (self.y - centre[1]).abs() - half[1])

    def line(self, start, end, half_width):
        dx, dy = end[0] - start[0], end[1] - start[1]
        along = (((self.x - start[0]) * dx + (self.y - start[1]) * dy) / (dx * dx + dy * dy)).clamp(0, 1)
        return torch.hypot(self.x - start[0] - along * dx, self.y - start[1] - along * dy) - half_width

    def noise(self, finest):
        """Octaves from details of `finest` pixels to those of 64, each as strong as the others, of variance 1."""
        sides = [finest * 2**i for i in range(int(math.log2(64 / finest)) + 1)]
        total = torch.zeros(self.height, self.width)
        for side in sides:
            small = [length // side + 2 for length in (self.height, self.width)]
            octave = torch.randn(1, 1, *small, generator=self.generator)
            octave = F.interpolate(octave, scale_factor=side, mode="bicubic")[0, 0, : self.height, : self.width]
            total += octave / octave.std()
        return total / len(sides) ** 0.5

    def paint(self, name, distance, colour, slope=0.0, texture=0.0, finest=1):
        """Covers a shape with a colour of so many levels that gets lighter by `slope` down the image, and has a texture."""
        light = slope * (self.y - 0.5) + texture * self.noise(finest)
        tint = torch.stack([self.noise(finest) for _ in range(3)]) * texture * TINT
        colour = torch.tensor(colour, dtype=torch.float32)[:, None, None] + light + tint
        cover = (0.5 - distance * self.height).clamp(0, 1)
        self.image = torch.lerp(self.image, colour, cover)
        self.labels[cover > 0.5] = CLASSES.index(name)

    def photograph(self):
        noise = NOISE * torch.randn(self.image.shape, generator=self.generator)
        return (self.image + noise).round().clamp(0, 255).to(torch.uint8)
