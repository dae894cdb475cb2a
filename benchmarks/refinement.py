"""A picture of what the dense CRF does: a drawn scene | coarse prediction | the same refined by `segops.dense_crf` | truth.

python -m benchmarks.refinement
"""

from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F

import segops
from segops.train.inference import colourise
from segops.train.metrics import confusion_matrix, iou

from . import scene

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.patches import Patch

SIZE, STRIDE, SEED = (385, 385), 8, 1


def draw(path):
    """Writes the four panels, mIoU in the titles of the two predictions."""
    image, truth = scene.draw(SIZE, SEED)
    count = len(scene.CLASSES)
    logits = scene.coarse_logits(truth, count, STRIDE)[None]
    coarse = F.interpolate(logits, SIZE, mode="bilinear").argmax(1)[0]
    refined = segops.dense_crf(logits, image[None]).argmax(1)[0]
    miou = [iou(confusion_matrix(classes, truth, count)).nanmean().item() for classes in (coarse, refined)]
    panels = {
        "image": image,
        f"coarse, output stride {STRIDE}: mIoU {miou[0]:.3f}": colourise(coarse, scene.PALETTE),
        f"refined by dense_crf: mIoU {miou[1]:.3f}": colourise(refined, scene.PALETTE),
        "truth": colourise(truth, scene.PALETTE),
    }
    figure, axes = pyplot.subplots(1, 4, figsize=(14, 4.2), layout="constrained", subplot_kw={"xticks": [], "yticks": []})
    for panel, (title, picture) in zip(axes, panels.items(), strict=True):
        panel.imshow(picture.permute(1, 2, 0).numpy())
        panel.set_title(title, fontsize=11)
    colours = torch.tensor(scene.PALETTE) / 255
    patches = [Patch(color=colour.tolist(), label=name) for name, colour in zip(scene.CLASSES, colours, strict=True)]
    figure.legend(handles=patches, loc="outside lower center", ncols=count, frameon=False, fontsize=11)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    print(f"image, coarse, refined, truth: {path}")


if __name__ == "__main__":
    Path("runs").mkdir(exist_ok=True)
    draw(Path("runs/refinement.png"))
