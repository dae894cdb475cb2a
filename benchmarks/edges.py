"""Pictures of the boundary-aware loss's weights: image | label | boundary edge E | gaussian edge E_G, as in Yu, Fig. 5.

python -m benchmarks.edges                   synthetic scenes
python -m benchmarks.edges --data FOLDER     and FOLDER/images/ID.jpg with FOLDER/labels/ID.png, by default PASCAL VOC's labels
"""

import argparse
from pathlib import Path

import matplotlib

import segops
from segops.train import Folder, SyntheticScenes
from segops.train.inference import colourise

matplotlib.use("Agg")
from matplotlib import pyplot


def draw(samples, num_classes, path):
    """Writes a row of panels for each (image, label); E and E_G are each scaled to their own range, which the title gives."""
    figure, axes = pyplot.subplots(
        len(samples),
        4,
        figsize=(13, 3.4 * len(samples)),
        layout="constrained",
        squeeze=False,
        subplot_kw={"xticks": [], "yticks": []},
    )
    for row, (image, label) in zip(axes, samples, strict=True):
        # Neither blurred nor resized.
        edge = segops.gaussian_edge(label[None], num_classes, kernel_size=1, downsample=1, beta=0)[0]
        weight = segops.gaussian_edge(label[None], num_classes)[0]
        row[0].imshow(image.permute(1, 2, 0))
        row[1].imshow(colourise(label).permute(1, 2, 0))
        row[2].imshow(edge, cmap="gray")
        row[3].imshow(weight, cmap="inferno")
        titles = "image", "label", f"E: 0 to {edge.max():.0f}", f"E_G: {weight.min():.1f} to {weight.max():.1f}"
        for panel, title in zip(row, titles, strict=True):
            panel.set_title(title, fontsize=9)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    print(f"written: {path}")


def main():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.edges", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder of images and labels")
    parser.add_argument("--classes", type=int, default=21, help="classes in --data (default: 21, PASCAL VOC)")
    parser.add_argument("--void", type=int, default=255, help="label in --data of no class, besides 255 (default: 255)")
    parser.add_argument("--out", type=Path, default=Path("runs/edges"), help="folder for the pictures (default: runs/edges)")
    options = parser.parse_args()
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        scenes = SyntheticScenes(3, (256, 256))
        draw(list(scenes), len(scenes.classes), options.out / "synthetic.png")
        if options.data is not None:
            dataset = Folder(options.data, None, options.classes, options.void, masks="labels")
            draw(list(dataset), options.classes, options.out / f"{options.data.resolve().name}.png")
    except (OSError, ValueError) as error:
        raise SystemExit(f"edges: {error}") from error


if __name__ == "__main__":
    main()
