"""Training: PAC-net with the boundary-aware loss beside torchvision's DeepLab v3 with interpolation
and cross entropy, on the same backbone and output stride. Run by `benchmarks.gpu`."""

import gc
import math
import time
from functools import partial

import torch
import torch.nn.functional as F
import torchvision

import segops
from segops.backend import requested

from . import bench_bal, measure
from .gpu import Case
from .measure import DEVICE

CLASSES = 21
if DEVICE == "cuda":
    BATCH, SIZE, BACKBONE, WARM_UP, SECONDS = 8, (513, 513), "resnet50", 4, 2.5
else:  # a rehearsal; torchvision has no DeepLab v3 on ResNet-18
    BATCH, SIZE, BACKBONE, WARM_UP, SECONDS = 2, (33, 33), "resnet18", 0, 0.0


def pacnet():
    """PAC-net, and its loss on images and labels."""
    model = segops.models.create_model("pacnet", CLASSES, backbone=BACKBONE, output_stride=8)

    def loss(images, labels):
        return segops.boundary_aware_loss(model(images).logits, labels, normalize="mean")

    return model, loss


def deeplabv3():
    """torchvision's network, which interpolates by itself, and its loss."""
    model = torchvision.models.segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=CLASSES)

    def loss(images, labels):
        return F.cross_entropy(model(images)["out"], labels, ignore_index=bench_bal.VOID)

    return model, loss


def step_of(model, loss):
    """A step of training on one batch, which returns its loss."""
    images = torch.randn(BATCH, 3, *SIZE).to(DEVICE, memory_format=torch.channels_last)
    labels = bench_bal.label_maps(BATCH, CLASSES, SIZE, seed=0).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, foreach=True)

    def step():
        optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16):
            value = loss(images, labels)
        value.backward()
        optimizer.step()
        return value.detach()

    return step


def captured(step):
    """The step as one CUDA graph; on a CPU as it is."""
    if DEVICE == "cpu":
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = step()

    def replay():
        graph.replay()
        return value

    return replay


def train(build, how, backend):
    """Images per second of wall-clock time, launches included, and peak memory."""
    gc.collect()
    torch.compiler.reset()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    torch.manual_seed(0)
    with measure.precision(), segops.backend(backend):
        model, loss = build()
        model.to(DEVICE, memory_format=torch.channels_last).train()
        if how == "compiled":
            loss = torch.compile(loss, backend="inductor" if DEVICE == "cuda" else "eager")
        step = step_of(model, loss)
        first_loss = step().item()
        for _ in range(WARM_UP):
            step()
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if how == "CUDA graph":
            step = captured(step)
        once, _ = clocked(step, 1)
        steps = max(1, min(100, round(SECONDS / once)))
        seconds, last_loss = clocked(step, steps)
    found = {
        "setting": f"{BATCH}x3x{SIZE[0]}x{SIZE[1]}, {CLASSES} classes, output stride 8, bfloat16 autocast, channels_last, SGD",
        "images": BATCH * steps / seconds,
        "ms": seconds / steps * 1e3,
        "memory": torch.cuda.max_memory_allocated() if DEVICE == "cuda" else None,
        "first_loss": first_loss,
        "last_loss": last_loss,
    }
    return found if math.isfinite(last_loss) else found | {"failed": f"the loss is {last_loss}"}


def clocked(step, steps):
    """(seconds, the last loss)"""
    measure.synchronise()
    began = time.perf_counter()
    for _ in range(steps):
        loss = step()
    measure.synchronise()
    return time.perf_counter() - began, loss.item()


def cases(options):
    """The compiled ones come last: each takes a minute to compile."""
    backend = requested()
    ours, theirs = f"pacnet on {BACKBONE}, boundary-aware loss", "torchvision deeplabv3_resnet50, cross entropy"
    return [
        Case(f"{ours}, eager", partial(train, pacnet, "eager", backend)),
        Case(f"{ours}, CUDA graph", partial(train, pacnet, "CUDA graph", backend)),
        Case(f"{theirs}, eager", partial(train, deeplabv3, "eager", backend)),
        Case(f"{ours} in PyTorch's ops, eager", partial(train, pacnet, "eager", "reference")),
        Case(f"{ours}, compiled", partial(train, pacnet, "compiled", backend)),
        Case(f"{theirs}, compiled", partial(train, deeplabv3, "compiled", backend)),
    ]
