"""An op in one declaration:

    @library.op("scale(Tensor input, float factor) -> Tensor")
    class scale:
        def empty(input):
            return torch.empty_like(input)

        def setup_context(ctx, out, factor):
            ctx.factor = factor

        def backward(ctx, needed, grad):
            return (scale(grad, ctx.factor, backend=ctx.backend),)

    scale(input, 2.0, backend="native")

Each backend has it under a name of its own:

    torch.ops.segops.scale           "native": C++ and CUDA, csrc/OP/OP.cpp; needs no Python
    torch.ops.segops_triton.scale    "triton": the function `scale` in the op's triton_kernels.py
"""

import importlib
import inspect
import operator

import torch
from torch import library as torch_library
from torch._ops import _len_torch_dispatch_stack_pre_dispatch
from torch.autograd import forward_ad

from ...backend import load_library
from .autocast import autocast_dtype

_DECLARED = []
_BACKENDS = {}  # as the arguments of _Op.implement


def op(schema, only_on_cpu=False):
    """Declares an op by a class of plain functions, which take those of the schema's arguments that
    they name:

        empty(...)                      the results, not filled yet: what tracing sees
        setup_context(ctx, out, ...)    as of `torch.autograd.Function`: what backward needs
        backward(ctx, needed, grad)     by the gradient of the first result, the others having none,
                                        those of the first arguments, or of the tensors of a first
                                        argument that is a list: a tuple; the others have none.
                                        `needed` says which are wanted, `ctx.backend` where forward
                                        ran

    Without backward, what requires a gradient is to be detached first. The class becomes a function
    of the arguments and of `backend`, by keyword. `only_on_cpu` says that it has no CUDA and Triton
    kernels yet.

    Raises:
        TypeError: functions, or arguments of theirs, that are none of these; a schema that has
            defaults, arguments by keyword alone, no tensors as its first argument, or results that
            are not tensors.
    """

    def declare(functions):
        declared = _Op(schema, functions)
        declared.only_on_cpu = only_on_cpu
        for arguments in _BACKENDS.values():
            declared.implement(*arguments)
        _DECLARED.append(declared)
        return declared

    return declare


def implement(backend, namespace, find=None):
    """Has all ops run on a backend, as ops of a namespace; find(name, module) returns the Python
    function that computes one. Without it they are a library's, which may have defined them."""
    _BACKENDS[backend] = backend, torch_library.Library(namespace, "FRAGMENT"), find
    for declared in _DECLARED:
        declared.implement(*_BACKENDS[backend])


def schemas(device):
    """Of all ops that were declared to have kernels on this type of device."""
    return [declared.schema for declared in _DECLARED if device == "cpu" or not declared.only_on_cpu]


def start():
    """Loads the libraries, and has the ops that were declared run on the backends of segops."""
    load_library("cpu", schemas("cpu"))
    implement("native", "segops")
    load_library("cuda", schemas("cuda"))  # which implements what is defined
    implement("triton", "segops_triton", _find_triton)


def _find_triton(name, module):
    def run(*arguments):
        # Importing Triton takes a second: only those who use it pay.
        return getattr(importlib.import_module(f"{module.rpartition('.')[0]}.triton_kernels"), name)(*arguments)

    return run


class _Op:
    def __init__(self, schema, functions):
        parsed = torch._C.parse_schema(schema)
        self.schema, self.name, self.module = schema, parsed.name, functions.__module__
        types = [str(parsed.arguments[0].type), *(str(result.type) for result in parsed.returns)]
        if (
            any(each.kwarg_only or each.has_default_value() for each in parsed.arguments)
            or types[0] not in ("Tensor", "List[Tensor]")
            or {*types[1:]} != {"Tensor"}
        ):
            raise TypeError(
                f"{self.name} must take Tensors first, no defaults and nothing by keyword alone, and return Tensors; got {schema}"
            )
        _check(self.name, {each for each in vars(functions) if not each.startswith("__")})
        self._names = [argument.name for argument in parsed.arguments]
        self._listed, self._single = types[0] == "List[Tensor]", len(types) == 2
        self.empty = functions.empty
        self._allocated = _pick(functions.empty, self._names)
        self._backward = getattr(functions, "backward", None)
        self._remember = getattr(functions, "setup_context", lambda ctx, out: None)
        self._remembered = _pick(self._remember, self._names, 2)
        self._runs = {}  # by backend

    def __call__(self, *arguments, backend):
        return self._runs[backend](*arguments)

    def implement(self, backend, library, find):
        if self.only_on_cpu and backend != "native":
            return
        ops = getattr(torch.ops, library.ns)
        if not hasattr(ops, self.name):
            library.define(self.schema)
        if find is not None:
            library.impl(self.name, _without_autocast(find(self.name, self.module)), "CompositeExplicitAutograd")
        qualified = f"{library.ns}::{self.name}"
        torch_library.register_fake(qualified, lambda *arguments: self.empty(*self._allocated(arguments)), lib=library)
        traced = getattr(ops, self.name).default
        if self._backward is None:
            self._runs[backend] = traced
        else:
            forward, backward = self._derivative(backend)
            torch_library.register_autograd(qualified, backward, setup_context=forward, lib=library)
            self._runs[backend] = self._eager(backend, traced)

    def _derivative(self, backend):
        """For `register_autograd`, which tracing sees."""
        others = [None] * (len(self._names) - 1)

        def setup_context(ctx, inputs, output):
            ctx.backend = backend
            if not self._single:
                ctx.mark_non_differentiable(*output[1:])
                ctx.set_materialize_grads(False)
            self._remember(ctx, output, *self._remembered(inputs))

        def backward(ctx, grad, *_):
            if self._listed:
                needed = ctx.needs_input_grad[0]
                return [None] * len(needed) if grad is None else list(self._backward(ctx, needed, grad)), *others
            grads = (None,) if grad is None else self._backward(ctx, ctx.needs_input_grad, grad)
            return *grads, *others[len(grads) - 1 :]

        return setup_context, backward

    def _eager(self, backend, traced):
        """The same at the price of a bare `torch.autograd.Function`, where every call of Python
        counts: of the first result alone, the others are left in a list that goes along. Tensors of
        a list are arguments of their own."""
        below_autograd, any_requires_grad = torch._C._AutoDispatchBelowAutograd, torch._C._any_requires_grad
        dispatch_modes, tracing = torch._C._len_torch_dispatch_stack, torch._C._get_tracing_state
        remember, remembered, differentiate = self._remember, self._remembered, self._backward
        bare, single, others = traced._op, self._single, len(self._names)
        padding = (None,) * others

        def forward(ctx, *arguments):
            with below_autograd():
                out = bare(*arguments[:-1])
            ctx.backend = backend
            remember(ctx, out, *remembered(arguments))
            if single:
                return out
            arguments[-1].extend(out)
            return out[0]

        def backward(ctx, grad):
            grads = differentiate(ctx, ctx.needs_input_grad, grad)
            return grads + padding[len(grads) - 1 :]

        def forward_of_list(ctx, *arguments):
            end = len(arguments) - others
            return forward(ctx, list(arguments[:end]), *arguments[end:])

        def backward_of_list(ctx, grad):
            needed = ctx.needs_input_grad
            return differentiate(ctx, needed[: len(needed) - others], grad) + padding

        functions = (forward_of_list, backward_of_list) if self._listed else (forward, backward)
        functions = dict(zip(("forward", "backward"), map(staticmethod, functions), strict=True))
        # Not its own `apply`, which asks for functorch once more.
        apply = super(torch.autograd.Function, type(self.name, (torch.autograd.Function,), functions)).apply
        function = (lambda tensors, *others: apply(*tensors, *others)) if self._listed else apply

        def run(*arguments):
            if torch.is_grad_enabled():
                # Who records or changes what ops do is to see the op as such.
                if torch.compiler.is_compiling() or dispatch_modes() or under_functorch() or tracing() is not None:
                    return traced(*arguments)
                if any_requires_grad(*arguments):
                    results = []
                    first = function(*arguments, results)
                    return first if single else (first, *results[1:])
            elif torch.compiler.is_compiling() or tracing() is not None:
                return traced(*arguments)
            with below_autograd():
                return bare(*arguments)

        return run


def _check(name, functions):
    unknown = functions - {"empty", "setup_context", "backward"}
    if unknown:
        raise TypeError(f"{name} must have no functions but those of `op`; it has {', '.join(sorted(unknown))}")
    if "empty" not in functions or functions == {"empty", "setup_context"}:
        raise TypeError(f"{name} must have empty, and backward with setup_context; it has {', '.join(sorted(functions))}")


def _pick(function, names, leading=0):
    """A function that picks, of the arguments of these names, those that another takes."""
    wanted = list(inspect.signature(function).parameters)[leading:]
    if not set(wanted) <= set(names):
        raise TypeError(
            f"{function.__qualname__} must take arguments of the schema, {', '.join(names)}; it takes {', '.join(wanted)}"
        )
    taken = [names.index(each) for each in wanted]
    return operator.itemgetter(*taken) if len(taken) > 1 else lambda arguments: [arguments[i] for i in taken]


def _without_autocast(function):
    def run(*arguments):
        first = arguments[0]
        first = first[0] if isinstance(first, list) else first
        if autocast_dtype(first) is None:
            return function(*arguments)
        with torch.autocast(first.device.type, enabled=False):
            return function(*arguments)

    return run


def no_double_backward(function):
    """The `backward` of an op that is itself that of segops.`function`, and has no derivative."""

    def backward(ctx, needed, *grads):
        raise RuntimeError(f"segops.{function}: double backward not supported (the reference backend has it)")

    return backward


def under_functorch():
    """Whether vmap, jvp, functional grad or forward-mode differentiation look on: they know
    PyTorch's ops, not ours."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def exporting():
    """Whether `torch.export` traces. To what `torch.compile` traces `torch.compiler.is_exporting()`
    says yes as well (torch 2.11), but not the flag behind it."""
    return torch.compiler._is_exporting_flag


def has_numbers(tensor):
    """Whether Python may decide by the tensor's numbers: there are some, and nothing traces or
    transforms what is done with them."""
    return not (
        torch.compiler.is_compiling()
        or under_functorch()
        or torch._C._len_torch_dispatch_stack()  # FakeTensorMode, make_fx and others
        or _len_torch_dispatch_stack_pre_dispatch()
        or torch._C._get_tracing_state() is not None
        or tensor.is_meta
        or type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__  # a FakeTensor without its mode
    )


def can_look(tensor):
    """The same, and that it costs nothing: a GPU would have to be waited for."""
    return tensor.device.type == "cpu" and has_numbers(tensor)
