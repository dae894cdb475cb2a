"""`make demo`: what segops is, in five minutes. Info, gates and races against plain PyTorch, then a network that trains.

python -m benchmarks.demo                                  synthetic scenes
python -m benchmarks.demo --model unet                     another model than pacnet: python -m segops models lists them
python -m benchmarks.demo --data DIR --classes 11 --void 11    DIR/images/{train,val}/ID.jpg, DIR/labels/{train,val}/ID.png
"""

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import segops.models
import torch
from PIL import Image
from tqdm import tqdm

import segops
from segops.__main__ import info
from segops.train import FolderDataset, SyntheticScenes, boundary_mask, confusion_matrix, iou

from . import bench_bal, bench_pac, bench_pag, measure

LEARNING_RATES = {"refinenet": 0.005, "gcn": 0.01}  # of models without normalisation behind the backbone; 0.05 for others


def race(bench, title, cases, baselines):
    """Checks an op against float64, then times it beside some of the baselines of `bench`, {name there: name to print}."""
    header = "".join(f"{name:>12}{'ratio':>7}" for name in baselines.values())
    width = max(36, *(len(str(case)) + 1 for case in cases))
    print(f"\n{title:<{width}}{'pass':<9}{'error/bound':>12}{'segops ms':>11}{header}")
    for case in cases:
        error = bench.gate(case)
        if not error <= 1:
            raise SystemExit(f"{case}: wrong by {error:.2f} times the bound")
        functions = {name: function for name, function in bench.functions(case).items() if name in ("segops", *baselines)}
        for kind in ("forward", "full"):
            times = measure.compare(bench.calls(case, kind, functions), measure.DEVICE, seconds=0.5, least_rounds=3)
            # The best of the memory formats, where there are several.
            best = {f: min(t["median"] for name, t in times.items() if name.split()[0] == f) for f in functions}
            ratios = "".join(f"{best[name]:>12.2f}{best[name] / best['segops']:>7.2f}" for name in baselines)
            print(f"{case!s:<{width}}{kind:<9}{error:>12.2f}{best['segops']:>11.2f}{ratios}")


def races():
    """Every op. float32 is float32: no TF32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    cases = [
        bench_pac.Case((2, 2048, 33, 33), 256),
        bench_pac.Case((2, 2048, 33, 33), 256, dtype=torch.bfloat16),
        bench_pac.Case((2, 256, 65, 65), 256),
        bench_pac.Case((1, 64, 129, 129), 64),
    ]
    race(bench_pac, "pyramid_atrous_conv2d, five rates", cases, {"eager": "PyTorch ms"})
    cases = [bench_bal.Case((2, 21, 65, 65), (513, 513))]
    race(bench_bal, "boundary_aware_loss", cases, {"paper": "paper ms", "handwritten": "by hand ms"})
    cases = [bench_pag.Case(bench_pag.DECODER_32, memory_format="channels_last")]
    race(bench_pag, "partial_attention_gate", cases, {"eager": "PyTorch ms"})
    print(
        "error/bound: the largest error of result and gradients over its bound, must be <= 1; PyTorch: a convolution per rate, a "
        "pooling per map; paper: an edge plane per class; by hand: one plane, the best in PyTorch's own ops\n"
    )


def datasets(options):
    """The training and validation sets, and the number of classes."""
    if options.data is None:
        scenes = [
            SyntheticScenes(length, options.size or (128, 128), seed)
            for length, seed in ((400, options.seed), (100, options.seed + 1))
        ]
        return *scenes, len(SyntheticScenes.classes)
    sets = [
        FolderDataset(options.data, split, options.classes, options.void, options.size or (180, 240))
        for split in ("train", "val")
    ]
    return *sets, options.classes


class InMemory(torch.utils.data.Dataset):
    """A data set read once, images as bytes. In training every other pass over an image sees it mirrored, at random."""

    def __init__(self, dataset, name, mirror):
        self.mirror = mirror
        self.samples = [
            ((image * 255).byte(), label.byte()) for image, label in tqdm(dataset, desc=f"reading {name}", leave=False)
        ]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        image, label = self.samples[index]
        image, label = image.float() / 255, label.long()
        if self.mirror and torch.rand(()) < 0.5:
            image, label = image.flip(2), label.flip(1)
        return (image - 0.45) / 0.25, label


def evaluate(model, loader, num_classes, device, autocast):
    """(IoU per class, IoU per class of the pixels within 3 of a boundary), each from one confusion matrix."""
    model.eval()
    whole, band = torch.zeros(2, num_classes, num_classes, dtype=torch.int64)
    for images, labels in loader:
        with autocast():
            predicted = model.predict(images.to(device)).cpu()
        whole += confusion_matrix(predicted, labels, num_classes)
        band += confusion_matrix(predicted, labels.where(boundary_mask(labels, num_classes), 255), num_classes)
    return iou(whole), iou(band)


def small_model(options, num_classes):
    """The model on a small backbone, and narrow where it has an encoder of its own. FCN and dilated networks keep their 4096 channels."""
    name = options.model
    default = segops.models.model_info(name).backbone
    small = {"backbone": options.backbone, "channels": options.channels}
    if small["backbone"] is None and default is not None:
        small["backbone"] = "vgg11_bn" if default.startswith("vgg") else "resnet18"
    if small["channels"] is None and name in ("unet", "unet_inception", "r2unet", "runet", "segnet_basic"):
        small["channels"] = 16
    if small["channels"] is None and name == "refinenet":
        small["channels"] = 64
    if name == "jointseg":
        small["widths"] = (16, 32, 64, 128)
    model = segops.models.create_model(name, num_classes, **{key: value for key, value in small.items() if value is not None})
    if not hasattr(model, "predict"):
        raise ValueError(f"--model must segment; {name} judges what other models segment")
    return model


def train(options, model, device):
    """Trains a model and returns what was measured."""
    torch.manual_seed(options.seed)  # whatever the races drew
    train_set, val_set, num_classes = datasets(options)
    train_loader = torch.utils.data.DataLoader(
        InMemory(train_set, "train", True), options.batch, shuffle=True, drop_last=len(train_set) > options.batch
    )
    val_loader = torch.utils.data.DataLoader(InMemory(val_set, "val", False), options.batch)

    model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=LEARNING_RATES.get(options.model, 0.05) if options.lr is None else options.lr,
        momentum=0.9,
        weight_decay=1e-4,
        nesterov=True,
    )
    # The paper's weights average tens and vary by image: with their mean at 1 the learning rate of cross entropy holds.
    criterion = segops.nn.BoundaryAwareLoss(normalize="mean") if options.loss == "bal" else segops.nn.UpsampleCrossEntropy()
    steps = options.epochs * len(train_loader)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, power=0.9)
    half = device == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()

    def autocast():
        return torch.autocast(device, dtype=torch.bfloat16, enabled=half)

    print(f"{options.model} from random weights, {num_classes} classes: {len(train_set)} training images, {len(val_set)} to validate, "
          f"{options.epochs} epochs of {len(train_loader)} steps, {'bfloat16 autocast' if half else 'float32'}")  # fmt: skip
    history, start = [], time.perf_counter()
    with tqdm(total=steps, unit="step") as bar:
        for epoch in range(options.epochs):
            model.train()
            total = 0.0
            for images, labels in train_loader:
                images = images.to(device, memory_format=torch.channels_last)
                with autocast():
                    logits = model(images).logits
                loss = criterion(logits, labels.to(device))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.item()
                if not np.isfinite(total):
                    raise SystemExit("demo: the loss is no finite number any more: try a smaller --lr")
                bar.update()
                bar.set_postfix(epoch=epoch + 1, loss=f"{loss.item():.3f}")
            whole, band = evaluate(model, val_loader, num_classes, device, autocast)
            miou, boundary_miou = whole.nanmean().item(), band.nanmean().item()
            history.append(
                {"epoch": epoch + 1, "loss": total / len(train_loader), "miou": miou, "boundary_miou": boundary_miou}
            )
            bar.write(
                f"epoch {epoch + 1:3d}   loss {history[-1]['loss']:.4f}   val mIoU {miou:.4f}   at boundaries {boundary_miou:.4f}"
            )
    seconds = time.perf_counter() - start
    names = getattr(train_set, "classes", range(num_classes))
    print("IoU per class: " + ", ".join(f"{name} {value:.3f}" for name, value in zip(names, whole.tolist(), strict=True)))
    print(f"loss {history[-1]['loss']:.4f}   mIoU {miou:.4f}   boundary mIoU {boundary_miou:.4f} (within 3 pixels of a boundary)   {seconds:.0f} s"
          "\nmeans over classes that occur, void ignored")  # fmt: skip
    overlays(model, val_loader.dataset, num_classes, device, options.out)
    return {
        "history": history,
        "loss": options.loss,
        "iou": whole.tolist(),
        "boundary_iou": band.tolist(),
        "seconds": seconds,
        "classes": num_classes,
        "environment": measure.environment(device),
    }


def overlays(model, dataset, num_classes, device, folder, count=8):
    """Writes image | truth | prediction, classes laid over the image, void left as it is, for images spread over the set."""
    hues = np.random.default_rng(1).permutation(num_classes) / num_classes
    palette = np.array([np.array(Image.new("HSV", (1, 1), (int(255 * hue), 220, 255)).convert("RGB"))[0, 0] for hue in hues])
    for stale in folder.glob("overlay_*.png"):
        stale.unlink()
    indices = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int)
    model.eval()
    for index in indices:
        image, label = dataset[index]
        predicted = model.predict(image[None].to(device))[0].cpu().numpy()
        picture = dataset.samples[index][0].permute(1, 2, 0).numpy()
        panels = [picture]
        for classes in (label.numpy(), predicted):
            known = (classes < num_classes)[..., None]
            painted = (picture * 0.4 + palette[np.minimum(classes, num_classes - 1)] * 0.6).astype(np.uint8)
            panels.append(np.where(known, painted, picture))
        gap = np.full((picture.shape[0], 4, 3), 255, np.uint8)
        Image.fromarray(np.concatenate([panels[0], gap, panels[1], gap, panels[2]], axis=1)).save(
            folder / f"overlay_{index:03d}.png"
        )
    print(f"overlays (image, truth, prediction): {folder}/overlay_*.png")


def main():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder of images and labels; without it, synthetic scenes are drawn")
    parser.add_argument("--classes", type=int, default=11, help="classes in --data (default: 11, CamVid)")
    parser.add_argument(
        "--void", type=int, default=11, help="label in --data that is not scored, besides 255 (default: 11, CamVid)"
    )
    parser.add_argument(
        "--size", type=int, nargs=2, metavar=("H", "W"), help="image size (default: 128 128, with --data 180 240)"
    )
    parser.add_argument("--epochs", type=int, default=10, help="passes over the training images (default: 10)")
    parser.add_argument(
        "--loss", choices=("bal", "ce"), default="bal", help="boundary-aware loss (default) or plain cross entropy"
    )
    parser.add_argument("--batch", type=int, default=8, help="images a step (default: 8)")
    parser.add_argument("--model", default="pacnet", help="any of `python -m segops models` (default: pacnet)")
    parser.add_argument("--backbone", help="any timm backbone that the model takes (default: resnet18, or vgg11_bn for a VGG)")
    parser.add_argument("--channels", type=int, help="the model's option of that name (default: the model's, 16 for U-Nets)")
    parser.add_argument("--lr", type=float, help="learning rate at the start (default: 0.05, less for a few models)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-race", action="store_true", help="leave out the timing")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="folder for overlays and results.json (default: runs/demo)"
    )
    options = parser.parse_args()
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(options.seed)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = small_model(options, options.classes if options.data else len(SyntheticScenes.classes))
        info()
        if not options.no_race:
            races()
        results = train(options, model, device)
    except (OSError, TypeError, ValueError) as error:
        raise SystemExit(f"demo: {error}") from error
    unfinished = options.out / "results.json.part"
    unfinished.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(unfinished, options.out / "results.json")


if __name__ == "__main__":
    main()
