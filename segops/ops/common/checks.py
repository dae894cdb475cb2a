"""Checks that several ops share: an error names the argument, what it got and what it needs."""

import sys

import torch

INTEGERS = (int, torch.SymInt)
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_floating(name, tensor):
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(tensor).__name__}")
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64; got {tensor.dtype}")


def check_map(name, tensor):
    if isinstance(tensor, torch.Tensor) and tensor.dtype in FLOATING and tensor.layout is torch.strided:
        shape = tensor.shape
        if len(shape) == 4 and shape[1] and shape[2] and shape[3]:
            return
    check_floating(name, tensor)
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor; got layout {tensor.layout}")
    if tensor.dim() != 4:
        raise ValueError(f"{name} must have shape (N, C, H, W); got {tuple(tensor.shape)}")
    if 0 in tensor.shape[1:]:
        raise ValueError(f"{name} must have channels, a height and a width of at least 1; got shape {tuple(tensor.shape)}")


def check_logits(logits):
    check_floating("logits", logits)
    if logits.dim() != 4:
        raise ValueError(f"logits must have shape (N, C, h, w); got {tuple(logits.shape)}")
    _, classes, height, width = logits.shape
    if classes == 0 or height == 0 or width == 0:
        raise ValueError(f"logits must have classes, a height and a width of at least 1; got shape {tuple(logits.shape)}")


def check_device(name, tensor, other_name, other):
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on {other_name}' device {other.device}; got {tensor.device}")


def check_merge(merge):
    if merge not in ("concat", "sum"):
        raise ValueError(f"merge must be 'concat' or 'sum'; got {merge!r}")


def is_int(value):
    return isinstance(value, INTEGERS) and not isinstance(value, bool)


def positive_pair(name, value):
    """A positive int, or a pair of them, as [first, second]."""
    sides = [value] * 2 if is_int(value) else value
    if not isinstance(sides, (list, tuple)) or len(sides) != 2 or not all(map(is_int, sides)):
        raise TypeError(f"{name} must be an int or a pair of ints; got {value!r}")
    if sides[0] < 1 or sides[1] < 1:  # not min(): it would compare the two, and an exported program would keep their order
        raise ValueError(f"{name} must be positive; got {value!r}")
    return list(sides)


def check_int(name, value, lowest=-(2**63), highest=2**63 - 1):
    if not is_int(value):
        raise TypeError(f"{name} must be an int; got {value!r}")
    if value < lowest:
        raise ValueError(f"{name} must be at least {lowest}; got {value}")
    if value > highest:
        raise ValueError(f"{name} must be at most {highest}; got {value}")


def check_bool(name, value):
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False; got {value!r}")


def check_number(name, value, dtype=torch.float64):
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number; got {value!r}")
    if not -sys.float_info.max <= value <= sys.float_info.max:
        raise ValueError(f"{name} must be finite; got {value}")
    largest = torch.finfo(dtype).max
    if not -largest <= value <= largest:
        raise ValueError(f"{name} must be at most {largest:.4g} in size, the largest {dtype}; got {value}")
