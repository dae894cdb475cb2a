"""An op, and a kernel, each in one declaration:

    @op("scale(Tensor input, float factor, str backend) -> Tensor")
    class scale:
        def empty(input):
            return torch.empty_like(input)

        def fill(out, input, factor, backend):
            scale_kernel(input, factor, out, backend=backend)

        def setup_context(ctx, out, factor, backend):
            ctx.settings = {"factor": factor, "backend": backend}

        def backward(ctx, grad):
            return (scale(grad, **ctx.settings),)


    scale_kernel = kernel("scale_kernel(Tensor input, float factor, Tensor(a!) out) -> ()")

They are torch.library's, in the namespace `segops`.
"""

import importlib
import inspect

import torch
from torch.autograd import forward_ad

from .autocast import autocast_dtype

LIBRARY = torch.library.Library("segops", "FRAGMENT")

# What has a backend's kernels, by the names of their schemas; Triton's are modules of the ops.
KERNELS = {"native": torch.ops.segops}
# The type of device that a backend's kernels are written for, where it is not that of the tensors.
DEVICE_TYPES = {}


def op(schema):
    """Declares an op by a class of plain functions, which take those of the schema's arguments that they name:

        empty(...)                       the results, not filled yet: what tracing sees is what running allocates
        fill(out, ...)                   computes them, unless they are empty, on the backend that the argument of that name says;
                                         autocast is off there
        setup_context(ctx, out, ...)     as of `torch.autograd.Function`: what backward needs
        backward(ctx, *grads)            the gradients of the first arguments, a tuple; the others have none

    Without the last two the op has no gradient. The class becomes the op itself.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    overload = getattr(torch.ops.segops, name).default
    names, single = [argument.name for argument in overload._schema.arguments], len(overload._schema.returns) == 1

    def declare(functions):
        for function in vars(functions):
            if not function.startswith("__") and function not in ("empty", "fill", "setup_context", "backward"):
                raise TypeError(f"{name} must have empty, fill, setup_context and backward alone; it has {function}")
        empty, fill = _pick(functions.empty, names), _pick(functions.fill, names, 1)

        def run(*arguments):
            out = empty(arguments)
            if out.numel() if single else any(each.numel() for each in out):
                if autocast_dtype(arguments[0]) is None:
                    fill(arguments, out)
                else:
                    with torch.autocast(arguments[0].device.type, enabled=False):
                        fill(arguments, out)
            return out

        LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"segops::{name}", lambda *arguments: empty(arguments), lib=LIBRARY)
        if not hasattr(functions, "backward"):
            return overload

        def backward(ctx, *grads):
            grads = functions.backward(ctx, *grads)
            return *grads, *(None,) * (len(names) - len(grads))

        remember = None
        if hasattr(functions, "setup_context"):
            pick = _pick(functions.setup_context, names, 2)

            def remember(ctx, inputs, output):
                pick(inputs, ctx, output)

        torch.library.register_autograd(f"segops::{name}", backward, setup_context=remember, lib=LIBRARY)
        return overload

    return declare


def _pick(function, names, leading=0):
    """call(arguments, *leading) of a function that takes some of the arguments, of these names; what it does not name goes to its
    **others, if it has that."""
    parameters = list(inspect.signature(function).parameters.values())[leading:]
    wanted = [each.name for each in parameters if each.kind is not each.VAR_KEYWORD]
    if not set(wanted) <= set(names):
        raise TypeError(
            f"{function.__qualname__} must take arguments of the schema, {', '.join(names)}; it takes {', '.join(wanted)}"
        )
    taken = [names.index(each) for each in wanted]
    others = [i for i in range(len(names)) if i not in taken] if len(wanted) < len(parameters) else []

    def call(arguments, *leading):
        return function(*leading, *[arguments[i] for i in taken], **{names[i]: arguments[i] for i in others})

    return call


def no_double_backward(function):
    """The `backward` of an op that is the backward of segops.`function` and has no derivative itself."""

    def backward(ctx, *grads):
        raise RuntimeError(f"segops.{function}: double backward not supported (the reference backend has it)")

    return backward


def kernel(schema):
    """Declares a kernel, OP_name: C++ and CUDA register theirs at the foot of its file, Triton's is the function of that name in the
    op's triton_kernels.py. Returns what calls the kernel of a backend: `run(*arguments, backend=...)`."""
    name = schema.partition("(")[0]
    module = f"segops.ops.{name.partition('_')[0]}.triton_kernels"
    LIBRARY.define(schema)
    torch.library.register_fake(f"segops::{name}", lambda *arguments: None, lib=LIBRARY)

    def run(*arguments, backend):
        # Importing Triton takes a second: only those who use it pay.
        kernels = KERNELS[backend] if backend in KERNELS else importlib.import_module(module)
        return getattr(kernels, name)(*arguments)

    return run


def device_type(tensor, backend):
    """The type of the device that computes: what is chosen by device is chosen by this."""
    return DEVICE_TYPES.get(backend, tensor.device.type)


def under_functorch():
    """Whether vmap, jvp, functional grad or forward-mode differentiation look on: they know PyTorch's ops, not ours."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
