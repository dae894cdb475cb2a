"""An op, and a kernel, each in one declaration:

    @library.op("scale(Tensor input, float factor, str backend) -> Tensor")
    class scale:
        def empty(input):
            return torch.empty_like(input)

        def fill(out, input, factor, backend):
            scale_kernel(input, factor, out, backend=backend)

        def setup_context(ctx, out, factor, backend):
            ctx.settings = {"factor": factor, "backend": backend}

        def backward(ctx, grad):
            return (scale(grad, **ctx.settings),)


    scale_kernel = library.kernel("scale_kernel(Tensor input, float factor, Tensor(a!) out) -> ()")

The namespace is `torch.ops.segops`.
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
    """Declares an op by a class of plain functions, which take those of the schema's arguments that
    they name:

        empty(...)                      the results, not filled yet; also what tracing sees
        fill(out, ...)                  computes them, unless the first is empty
        compute(...)                    in place of fill: makes the results itself, where something
                                        else takes memory before
        setup_context(ctx, out, ...)    as of `torch.autograd.Function`: what backward needs
        backward(ctx, *grads)           the gradients of the first arguments, a tuple; the others
                                        have none

    Autocast is off in fill and compute, which run on the backend that the argument of that name
    says. Without backward, what requires a gradient is to be detached first. The class becomes the
    op itself.

    Raises:
        TypeError: functions, or arguments of theirs, that are none of these; a schema that has
            defaults, arguments by keyword alone, no tensor as its first argument, or results that
            are not tensors.
    """
    parsed = torch._C.parse_schema(schema)
    name, names, single = parsed.name, [argument.name for argument in parsed.arguments], len(parsed.returns) == 1
    types = [str(parsed.arguments[0].type), *(str(result.type) for result in parsed.returns)]
    if (
        any(each.kwarg_only or each.has_default_value() for each in parsed.arguments)
        or types[1:] == []
        or {*types} != {"Tensor"}
    ):
        raise TypeError(
            f"{name} must take a Tensor first, no defaults and nothing by keyword alone, and return Tensors; got {schema}"
        )

    def declare(functions):
        _check(name, {each for each in vars(functions) if not each.startswith("__")})
        empty = _pick(functions.empty, names)
        if hasattr(functions, "compute"):
            compute = _pick(functions.compute, names)
        else:
            fill = _pick(functions.fill, names, 1)

            def compute(arguments):
                out = empty(arguments)
                if (out if single else out[0]).numel():
                    fill(arguments, out)
                return out

        def run(*arguments):
            if autocast_dtype(arguments[0]) is None:
                return compute(arguments)
            with torch.autocast(arguments[0].device.type, enabled=False):
                return compute(arguments)

        setup_context = None
        if hasattr(functions, "setup_context"):
            remember = _pick(functions.setup_context, names, 2)

            def setup_context(ctx, inputs, output):
                remember(inputs, ctx, output)

        def backward(ctx, *grads):
            grads = functions.backward(ctx, *grads)
            return *grads, *(None,) * (len(names) - len(grads))

        LIBRARY.define(schema)
        LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"segops::{name}", lambda *arguments: empty(arguments), lib=LIBRARY)
        if hasattr(functions, "backward"):
            torch.library.register_autograd(f"segops::{name}", backward, setup_context=setup_context, lib=LIBRARY)
        return getattr(torch.ops.segops, name)

    return declare


def _check(name, functions):
    unknown = functions - {"empty", "fill", "compute", "setup_context", "backward"}
    if unknown:
        raise TypeError(f"{name} must have no functions but those of `op`; it has {', '.join(sorted(unknown))}")
    if (
        "empty" not in functions
        or len(functions & {"fill", "compute"}) != 1
        or functions & {"setup_context", "backward"} == {"setup_context"}
    ):
        raise TypeError(
            f"{name} must have empty, and fill or compute, and backward with setup_context; it has {', '.join(sorted(functions))}"
        )


def _pick(function, names, leading=0):
    """call(arguments, *leading) of a function that takes some of the arguments, of these names;
    what it does not name goes to its **others, if it has that."""
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
    """The `backward` of an op that is itself that of segops.`function`, and has no derivative."""

    def backward(ctx, *grads):
        raise RuntimeError(f"segops.{function}: double backward not supported (the reference backend has it)")

    return backward


def kernel(schema):
    """Declares a kernel, OP_name: C++ and CUDA register theirs at the foot of its file, Triton's is
    the function of that name in the op's triton_kernels.py.

    Returns run(*arguments, backend=...), which calls the kernel of a backend.
    """
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
    """Whether vmap, jvp, functional grad or forward-mode differentiation look on: they know
    PyTorch's ops, not ours."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
