"""Upsampling with argmax: what every op owes its users."""

import torch

import segops

from ..contract import Contract, Export, Use


def draw(sizes, dtype, device):
    """Logits and an image; where random logits have one largest class, and by far."""
    shape, size = sizes
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float32)
    return [logits.to(device, dtype), torch.zeros(shape[0], 1, *size, device=device)]


class Predict(torch.nn.Module):
    def forward(self, logits, image):
        return segops.upsample_argmax(logits * 2, image.shape[2:])


def opcheck(device, backend):
    yield torch.ops.segops.upsample_argmax, (draw(((2, 3, 4, 5), (8, 11)), torch.float32, device)[0], [8, 11], backend)


def kernels(device):
    logits, _ = draw(((2, 3, 4, 5), (8, 11)), torch.float32, device)
    best, out = (
        torch.zeros(size, dtype=dtype, device=device) for size, dtype in (((2, 4, 5), torch.int32), ((2, 8, 11), torch.int64))
    )
    for memory_format in (torch.contiguous_format, torch.channels_last):
        yield torch.ops.segops.argmax_upsample, (logits.contiguous(memory_format=memory_format), best, out)


def export():
    auto = torch.export.Dim.AUTO
    return Export(
        module=Predict,
        draw=lambda *arguments: tuple(draw(*arguments)),
        sizes=(((2, 3, 4, 5), (16, 20)), ((1, 3, 7, 6), (21, 31)), ((3, 3, 5, 4), (5, 4))),
        dynamic_shapes=lambda: ({0: auto, 2: auto, 3: auto},) * 2,
    )


USE = Use(
    function="upsample_argmax",
    call=Predict(),
    draw=draw,
    sizes=(((2, 3, 4, 5), (9, 13)), ((3, 3, 5, 4), (16, 11)), ((1, 3, 4, 6), (4, 6))),
    tails=(((1, 5, 3, 17), (5, 33)), ((2, 33, 2, 3), (1, 130)), ((1, 2, 9, 9), (65, 7))),
    large=(((2, 9, 33, 34), (200, 210)), ((2, 9, 80, 90), (80, 90))),
    empty=(((0, 3, 4, 5), (9, 13)), ((0, 3, 4, 5), (4, 5))),
    forward=("segops::upsample_argmax", "segops::argmax_upsample"),
    autocast=((torch.bfloat16, torch.float32), (torch.float32,)),
)
L = torch.zeros(1, 2, 3, 4)


class TestUpsampleArgmax(Contract):
    USES = {"argmax": USE}
    EXPORTS = {"argmax": export()}
    OPCHECKS = {"argmax": opcheck}
    KERNELS = kernels
    ERRORS = [
        (lambda: segops.upsample_argmax([1.0], 3), TypeError, "logits must be a torch.Tensor; got list"),
        (lambda: segops.upsample_argmax(L.long(), 3), TypeError, "logits must be float32, .*; got torch.int64"),
        (lambda: segops.upsample_argmax(L[0], 3), ValueError, r"logits must have shape \(N, C, h, w\); got \(2, 3, 4\)"),
        (lambda: segops.upsample_argmax(L[:, :0], 3), ValueError, r"logits must have classes, .*; got shape \(1, 0, 3, 4\)"),
        (lambda: segops.upsample_argmax(L[..., :0], 3), ValueError, r"logits must have .*; got shape \(1, 2, 3, 0\)"),
        (lambda: segops.upsample_argmax(L, 2.5), TypeError, r"size must be an int or a pair of ints; got 2.5"),
        (lambda: segops.upsample_argmax(L, (2, 3, 4)), TypeError, r"size must be .*; got \(2, 3, 4\)"),
        (lambda: segops.upsample_argmax(L, (0, 3)), ValueError, r"size must be positive; got \(0, 3\)"),
    ]
    COMPILED_ERRORS = (
        (L,),
        [
            (lambda logits: segops.upsample_argmax(logits[0], 3), ValueError, r"logits must have shape \(N, C, h, w\)"),
            (lambda logits: segops.upsample_argmax(logits, 2.5), TypeError, "size must be an int or a pair of ints; got 2.5"),
        ],
    )
