"""`make demo`: what segops is, in five minutes. Info, gates and races against plain PyTorch, then a network that trains,
and what the dense CRF makes of a coarse prediction.

python -m benchmarks.demo                                  synthetic scenes
python -m benchmarks.demo --model unet                     another model than pacnet: segops models lists them
python -m benchmarks.demo --data DIR --classes 11 --void 11    DIR/images/{train,val}/ID.jpg, DIR/labels/{train,val}/ID.png

The training is `segops fit --config demo`.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import segops.models
import torch

from segops.__main__ import info
from segops.train import Folder, cli
from segops.train.data import synthetic
from segops.train.inference import Predictor, comparison, load_network, save_image

from . import bench_bal, bench_pac, bench_pag, measure, refinement

OUT = Path("runs/make_demo")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
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


def small_options(name, backbone, channels):
    """The model's options: a small backbone, and narrow where it has an encoder of its own. FCN and dilated networks keep their 4096 channels."""
    default = segops.models.model_info(name).backbone
    if backbone is None and default is not None:
        backbone = "vgg11_bn" if default.startswith("vgg") else "resnet18"
    if channels is None:
        channels = {"refinenet": 64} | dict.fromkeys(("unet", "unet_inception", "r2unet", "runet", "segnet_basic"), 16)
        channels = channels.get(name)
    options = {"backbone": backbone, "channels": channels, "widths": [16, 32, 64, 128] if name == "jointseg" else None}
    return {key: value for key, value in options.items() if value is not None}


def train(options):
    """`segops fit --config demo`, with what the options change."""
    rate = LEARNING_RATES.get(options.model) if options.lr is None else options.lr
    precise = not (torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    settings = {
        "seed_everything": options.seed,
        "trainer.default_root_dir": options.out,
        "trainer.max_epochs": options.epochs,
        "trainer.precision": "32-true" if precise else None,
        "model.model": options.model,
        "model.options": json.dumps(small_options(options.model, options.backbone, options.channels)),
        "model.loss": options.loss,
        "model.optimizer.lr": rate,
        "data.batch_size": options.batch,
    }
    if options.data is not None:
        settings |= {
            "data.dataset": "folder",
            "data.root": options.data,
            "data.options": json.dumps({"num_classes": options.classes, "void": options.void, "masks": "labels"}),
        }
    if options.data is not None or options.size is not None:
        settings["data.resize"] = json.dumps(options.size or [180, 240])
    cli.main(["fit", "--config", "demo", *(f"--{key}={value}" for key, value in settings.items() if value is not None)])


def pictures(options, count=8):
    """Writes image | truth | prediction | loss for images spread over the validation set."""
    model, entry = load_network(options.out / "checkpoints" / "best.ckpt", DEVICE)
    predictor = Predictor(model, entry["normalize"], entry["resize"])
    if options.data is None:
        dataset = synthetic("val")
    else:
        dataset = Folder(str(options.data), "val", options.classes, options.void, masks="labels")
    for index in np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int):
        image, mask = dataset[index]
        picture = comparison(image, mask, *predictor.with_loss(image, mask), entry["palette"])
        save_image(options.out / f"comparison_{index:03d}.png", picture)
    print(f"image, truth, prediction, loss: {options.out}/comparison_*.png")


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
    parser.add_argument("--model", default="pacnet", help="any of `segops models` (default: pacnet)")
    parser.add_argument("--backbone", help="any timm backbone that the model takes (default: resnet18, or vgg11_bn for a VGG)")
    parser.add_argument("--channels", type=int, help="the model's option of that name (default: the model's, 16 for U-Nets)")
    parser.add_argument("--lr", type=float, help="learning rate at the start (default: 0.05, less for a few models)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-race", action="store_true", help="leave out the timing")
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder for the run (default: {OUT}, which is emptied)")
    options = parser.parse_args()
    try:
        small_options(options.model, options.backbone, options.channels)
        info()
        if not options.no_race:
            races()
        if options.out == OUT:  # an earlier demo's; another folder that holds a run is refused
            shutil.rmtree(OUT, ignore_errors=True)
        train(options)
        pictures(options)
        refinement.draw(options.out / "dense_crf.png")
    except (OSError, TypeError, ValueError) as error:
        raise SystemExit(f"demo: {error}") from error


if __name__ == "__main__":
    main()
