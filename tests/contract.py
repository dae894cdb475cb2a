"""What every op owes its users, whatever it computes: tests that those of an op fill with ways to call it."""

import importlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import library as torch_library
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import segops

from .accuracy import relative_error
from .compile_triton import assert_compiles
from .guard import guarded, holds
from .layouts import in_format, views
from .targets import (
    INTERPRETED,
    ON_LINUX,
    TRITON,
    fast_implementations,
    fast_targets,
    native_and_reference,
    on_a_gpu,
    on_native,
)


@dataclass(frozen=True)
class Use:
    """A way to call an op: `call(*tensors)` returns a tensor or several, `draw(size, dtype, device)` makes the tensors, the
    same at every call, of which those that require gradients are what the op is differentiated by."""

    function: str  # of segops, the first that is called
    call: Callable
    draw: Callable
    sizes: tuple  # three that differ in all that compiled code may have to follow; the first is small
    tails: tuple  # that fill no vector, row or block
    large: tuple  # of several pieces of work
    empty: tuple  # sizes without images
    forward: tuple  # names in a profile of what runs
    backward: tuple = ()
    never: tuple = ()  # and parts of names of PyTorch's ops that do not run backward
    autocast: tuple = ((torch.bfloat16,), (torch.float32,))  # dtypes that come in, of the floating-point tensors in turns
    cast: Callable = lambda *dtypes: dtypes[0]  # of these, the dtype that they are taken in
    exact: bool = True  # whether compiled code and other strides give the same bits
    multiplied: bool = False  # with a library, whose order of summation depends on strides and threads
    twice: bool = True  # whether the kernels have second derivatives
    slow_reference: bool = False  # to compile: of many ops in PyTorch
    grad_layout: bool = True  # whether gradients have the strides of their tensors


@dataclass(frozen=True)
class Export:
    """A module, exported with what `draw` makes of the first size, to run on the other sizes; not on those of `specialised`."""

    module: Callable
    draw: Callable
    sizes: tuple
    dynamic_shapes: Callable
    options: dict = field(default_factory=dict)
    specialised: tuple = ()
    exact: bool = True


def ops_of(backend):
    """The ops that tracing sees, of a backend."""
    return {"native": torch.ops.segops, "triton": torch.ops.segops_triton}[backend]


def outputs(call, tensors):
    return tree_leaves(call(*tensors))


def like(tensor, seed=99):
    """Random numbers with the dtype and the strides of a tensor, the same ones in every dtype."""
    drawn = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
    return torch.empty_like(tensor).copy_(drawn)


def gradients(outs, tensors, grads=None, **options):
    """By the tensors that require some, for those of the outputs that have any."""
    outs, wanted = [each for each in outs if each.requires_grad], [each for each in tensors if each.requires_grad]
    if not outs:
        return []
    return list(torch.autograd.grad(outs, wanted, [like(each) for each in outs] if grads is None else grads, **options))


def results(call, tensors):
    """Outputs and gradients."""
    outs = outputs(call, tensors)
    return [each.detach() for each in outs] + gradients(outs, tensors)


def leaves(tensors, like):
    """The tensors, of which those require gradients whose counterparts do."""
    return [each.detach().requires_grad_(other.requires_grad) for each, other in zip(tensors, like, strict=True)]


def cast(tensors, dtypes):
    """The floating-point tensors in these dtypes, in turns."""
    turns = iter(range(len(tensors)))
    return [each.to(dtypes[next(turns) % len(dtypes)]) if each.is_floating_point() else each for each in tensors]


def assert_same(values, expected, exact=True, strides=True, name=""):
    for value, wanted in zip(values, expected, strict=True):
        assert value.dtype == wanted.dtype and value.shape == wanted.shape, name
        assert not strides or value.stride() == wanted.stride(), name
        if exact or not value.is_floating_point():
            assert torch.equal(value, wanted), name
        elif value.dtype in (torch.float32, torch.float64):
            assert relative_error(value, wanted) <= 2e-6, name
        else:
            torch.testing.assert_close(value, wanted, msg=lambda text: f"{name}: {text}")


def prepared(use, size, dtype):
    """Tensors on the GPU, and forward and backward on them: nothing else has to go there."""
    tensors = use.draw(size, dtype, "cuda")
    grads = [like(each) for each in outputs(use.call, tensors) if each.requires_grad]

    def run():
        outs = outputs(use.call, tensors)
        return [each.detach() for each in outs] + gradients(outs, tensors, grads)

    return tensors, run


def names_of(function):
    """Of everything that the profiler sees."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return [event.name for event in profile.events()]


class Contract:
    """What an op fills in, and the tests of it."""

    USES: dict[str, Use]
    EXPORTS: dict[str, Export]
    OPCHECKS: dict[str, Callable]  # (device, backend): yields an op of segops and its arguments
    COMPILATIONS: Callable  # (): yields a Triton kernel and how a GPU's is compiled, as `compile_triton.compile_for` takes it
    ERRORS: list  # of (call, error, message)
    COMPILED_ERRORS: tuple  # tensors, and such a list of calls that take them

    def pytest_generate_tests(self, metafunc):
        differentiable = {name: use for name, use in self.USES.items() if use.backward}
        given = {"use": self.USES, "differentiable": differentiable, "export": self.EXPORTS, "opcheck": self.OPCHECKS}
        for name in given:
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, given[name].values(), ids=given[name])
        slow = {True: pytest.mark.thorough, False: ()}
        for name, uses in (("in_the_reference", self.USES), ("differentiable_in_the_reference", differentiable)):
            if name in metafunc.fixturenames:
                marked = [pytest.param(use, id=each, marks=slow[use.slow_reference]) for each, use in uses.items()]
                metafunc.parametrize(name, marked)
        if "error" in metafunc.fixturenames:
            metafunc.parametrize("call, error, message", self.ERRORS)

    def test_uses_are_whole(self, use):
        """What is left out is not tested, and nothing would say so."""
        drawn = [use.draw(use.sizes[0], torch.float32, "cpu") for _ in range(2)]
        assert len(use.sizes) == 3 and bool(use.backward) == any(each.requires_grad for each in drawn[0])
        assert_same(*drawn)

    # What PyTorch asks of an op.

    @on_native
    def test_opcheck(self, target, opcheck):
        """Schema, fake and autograd, which are no backend's own."""
        for op, arguments in opcheck(*target):
            torch_library.opcheck(op, arguments)

    @TRITON
    def test_triton_kernels_compile(self):
        """For GPUs, also on a machine that has none."""
        pytest.importorskip("triton")
        assert_compiles(type(self))

    @pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
    @on_native
    def test_compile_without_a_graph_break(self, target, use, dynamic):
        compiled = torch.compile(use.call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for size in use.sizes:
            tensors = use.draw(size, torch.float32, target[0])
            assert_same(results(compiled, tensors), results(use.call, tensors), use.exact)

    def test_compile_of_the_reference(self, in_the_reference):
        """Of sizes that change."""
        use = in_the_reference
        compiled = torch.compile(use.call, fullgraph=True, backend="aot_eager", dynamic=True)
        with segops.backend("reference"):
            for size in use.sizes:
                tensors = use.draw(size, torch.float32, "cpu")
                assert_same(results(compiled, tensors), results(use.call, tensors), use.exact)

    def test_compile_follows_the_backend(self, use):
        compiled = torch.compile(use.call, fullgraph=True, backend="aot_eager")
        tensors = use.draw(use.sizes[0], torch.float32, "cpu")
        for backend in ("native", "reference", "native"):
            with segops.backend(backend):
                assert_same(results(compiled, tensors), results(use.call, tensors), use.exact)
                names = names_of(lambda: compiled(*tensors))
                assert {name in names for name in use.forward} == {backend == "native"}, backend

    @on_native
    def test_export_with_dynamic_sizes(self, target, export):
        module = export.module().to(target[0])
        first, *others = (export.draw(size, torch.float32, target[0]) for size in export.sizes)
        program = torch.export.export(module, first, dynamic_shapes=export.dynamic_shapes(), **export.options).module()
        for tensors in others:
            assert_same(outputs(program, tensors), outputs(module, tensors), export.exact)
        for size in export.specialised:
            with pytest.raises((AssertionError, RuntimeError)):
                program(*export.draw(size, torch.float32, target[0]))

    @pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
    @native_and_reference
    def test_autocast(self, implementation, use, compiled):
        """As without it for tensors that were cast before; gradients in each tensor's own dtype."""
        device, _ = implementation
        call = torch.compile(use.call, fullgraph=True, backend="aot_eager") if compiled else use.call
        for dtypes in use.autocast:
            drawn = use.draw(use.sizes[0], torch.float32, device)
            tensors = leaves(cast(drawn, dtypes), drawn)
            with torch.autocast(device, dtype=torch.bfloat16):
                found = results(call, tensors)
            wanted = results(lambda *tensors: use.call(*cast(tensors, [use.cast(*dtypes)])), tensors)  # noqa: B023
            assert_same(found, wanted, use.exact, strides=False, name=dtypes)

    @native_and_reference
    def test_inference_mode(self, implementation, use):
        tensors = use.draw(use.sizes[0], torch.float32, implementation[0])
        with torch.inference_mode():
            found = outputs(use.call, tensors)
        assert_same(found, outputs(use.call, tensors))
        assert not any(each.requires_grad for each in found)

    def test_checkpoint(self, differentiable):
        """Recomputed in backward."""
        tensors = differentiable.draw(differentiable.sizes[0], torch.float32, "cpu")

        def call(*tensors):
            return differentiable.call(*(each.sin() if each.requires_grad else each for each in tensors))

        kept = results(lambda *tensors: checkpoint(call, *tensors, use_reentrant=False), tensors)
        assert_same(kept, results(call, tensors))

    def test_backward_runs_where_forward_ran(self, differentiable):
        """Whatever is asked for in between: the graph keeps its backend."""
        tensors = differentiable.draw(differentiable.sizes[0], torch.float32, "cpu")
        with segops.backend("native"):
            outs = outputs(differentiable.call, tensors)
        with segops.backend("reference"):
            names = names_of(lambda: gradients(outs, tensors))
        assert set(differentiable.backward) <= set(names)
        assert not [name for name in names for never in differentiable.never if never in name]

    def test_meta_device(self, use):
        tensors = use.draw(use.sizes[0], torch.float32, "cpu")
        on_meta = leaves([each.to("meta") for each in tensors], tensors)
        found, wanted = ([(each.shape, each.dtype) for each in results(use.call, some)] for some in (on_meta, tensors))
        assert found == wanted

    @native_and_reference
    def test_fake_tensors(self, implementation, use):
        """Which have no numbers to look at."""
        tensors = use.draw(use.sizes[0], torch.float32, implementation[0])
        mode = FakeTensorMode()
        fakes = leaves([mode.from_tensor(each.detach()) for each in tensors], tensors)
        with mode:
            found = [(each.shape, each.dtype) for each in results(use.call, fakes)]
        assert found == [(each.shape, each.dtype) for each in results(use.call, tensors)]

    # Where PyTorch keeps a tracer depends on the latter.
    @pytest.mark.parametrize("tracing_mode, pre_dispatch", [("fake", False), ("real", True)], ids=["fake", "real"])
    @native_and_reference
    def test_make_fx(self, implementation, use, tracing_mode, pre_dispatch):
        """The graph is of any numbers, not of those that were there when it was made."""
        tensors = [each.detach() for each in use.draw(use.sizes[0], torch.float32, implementation[0])]
        trace = make_fx(lambda *some: outputs(use.call, some), tracing_mode=tracing_mode, pre_dispatch=pre_dispatch)
        graph, others = trace(*tensors), [each.flip(-1) for each in tensors]
        assert_same(graph(*others), outputs(use.call, others), use.exact, strides=False)

    # Derivatives of other kinds. PyTorch's ops run, which know them.

    def test_vmap(self, use):
        """Over all tensors, those that are floating point, the first, and those that are floating point but for the first."""
        plain = [each.detach() for each in use.draw(use.sizes[0], torch.float64, "cpu")]
        stacks = [torch.stack([each, each.flip(-1), each]) for each in plain]
        count, floating = len(plain), tuple(0 if each.is_floating_point() else None for each in plain)
        choices = {(0,) * count, floating, (0, *(None,) * (count - 1)), (None, *floating[1:])}
        for dims in choices - {(None,) * count}:
            tensors = [plain[i] if dim is None else stacks[i] for i, dim in enumerate(dims)]
            found = outputs(torch.func.vmap(use.call, in_dims=dims), tensors)
            singly = [[each if dim is None else each[j] for each, dim in zip(tensors, dims, strict=True)] for j in range(3)]
            wanted = zip(*(outputs(use.call, each) for each in singly), strict=True)
            assert_same(found, [torch.stack(each) for each in wanted], exact=False, strides=False, name=dims)

    def test_functional_and_forward_mode_differentiation(self, differentiable):
        use, tensors = differentiable, differentiable.draw(differentiable.sizes[0], torch.float64, "cpu")
        at = [i for i, each in enumerate(tensors) if each.requires_grad]

        def weighed(*some):
            given = dict(zip(at, some, strict=True))
            outs = outputs(use.call, [given.get(i, each.detach()) for i, each in enumerate(tensors)])
            weights = [torch.linspace(-1, 1, each.numel(), dtype=torch.float64).view(each.shape) for each in outs]
            return sum((a * b).sum() for a, b in zip(outs, weights, strict=True) if a.is_floating_point())

        wanted = torch.autograd.grad(weighed(*(tensors[i] for i in at)), [tensors[i] for i in at])
        plain, tangents = tuple(tensors[i].detach() for i in at), tuple(like(tensors[i]).detach() for i in at)
        grads = torch.func.grad(weighed, argnums=tuple(range(len(at))))(*plain)
        assert_same(grads, wanted, exact=False, strides=False)
        along = sum((a * b).sum() for a, b in zip(wanted, tangents, strict=True))
        _, by_jvp = torch.func.jvp(weighed, plain, tangents)
        with forward_ad.dual_level():
            dual = weighed(*(forward_ad.make_dual(*pair) for pair in zip(plain, tangents, strict=True)))
            assert_same([by_jvp, forward_ad.unpack_dual(dual).tangent], [along, along], exact=False)

    def test_transforms_in_compiled_code(self, differentiable_in_the_reference):
        """A derivative that the op does not have must not come out as 0."""
        differentiable = differentiable_in_the_reference
        tensors = differentiable.draw(differentiable.sizes[0], torch.float32, "cpu")
        at = [i for i, each in enumerate(tensors) if each.requires_grad]
        plain, tangents = tuple(tensors[i].detach() for i in at), tuple(like(tensors[i]).detach() for i in at)

        def derivatives(*plain):
            def total(*some):
                given = dict(zip(at, some, strict=True))
                outs = outputs(differentiable.call, [given.get(i, each.detach()) for i, each in enumerate(tensors)])
                return sum(each.sin().sum() for each in outs if each.is_floating_point())

            return torch.func.jvp(total, plain, tangents)[1], *torch.func.grad(total, argnums=tuple(range(len(at))))(*plain)

        found = torch.compile(derivatives, backend="aot_eager", fullgraph=True)(*plain)
        for value, wanted in zip(found, derivatives(*plain), strict=True):
            torch.testing.assert_close(value, wanted)
            assert wanted.any()

    @fast_implementations
    def test_second_derivatives_or_their_refusal(self, implementation, differentiable):
        """Those of the reference; where kernels have none, they say so."""
        use = differentiable
        tensors = use.draw(use.sizes[0], torch.float32, implementation[0])

        def second(tensors):
            outs = [each.square() for each in outputs(use.call, tensors) if each.requires_grad]
            return gradients([each.square().sum() for each in gradients(outs, tensors, create_graph=True)], tensors)

        if implementation[1] != "reference" and not use.twice:
            with pytest.raises(RuntimeError, match="double backward not supported"):
                second(tensors)
            return
        found = second(tensors)
        with segops.backend("reference"):
            wanted = second(leaves([each.cpu() for each in tensors], tensors))
        for value, each in zip(found, wanted, strict=True):
            assert relative_error(value, each) < 1e-5 and each.any()

    # Memory.

    def test_strided_tensors_and_gradients(self, implementation, use):
        """Slices of larger buffers, transposed, expanded: all tensors at once, and one after the other."""
        device, backend = implementation
        few, exact = implementation == INTERPRETED, use.exact and not use.multiplied and backend != "reference"
        tensors = use.draw(use.sizes[0], torch.float32, device)
        outs = outputs(use.call, tensors)
        incoming = [list(views(like(each), few)) for each in outs if each.requires_grad]
        every = [list(views(each.detach(), few)) for each in tensors]
        for turn in range(max(map(len, every))):
            names, strided = zip(*(some[turn % len(some)] for some in every), strict=True)
            grads = [some[turn % len(some)][1] for some in incoming]
            one = turn % len(tensors)
            for some in (strided,) if few else (strided, [*tensors[:one], strided[one], *tensors[one + 1 :]]):
                some, dense = leaves(some, tensors), leaves([each.contiguous() for each in some], tensors)
                outs, wanted = outputs(use.call, some), outputs(use.call, dense)
                assert_same(outs, wanted, exact, strides=False, name=names)
                found = gradients(outs, some, grads)
                assert_same(
                    found, gradients(wanted, dense, [each.contiguous() for each in grads]), exact, strides=False, name=names
                )

    @fast_targets
    def test_memory_format_is_the_first_tensors(self, target, use):
        """Of outputs; that of a gradient is its own tensor's."""
        formats, dtypes = (torch.contiguous_format, torch.channels_last), (torch.float32, torch.bfloat16)
        for memory_format, size, dtype in itertools.product(formats, use.sizes, dtypes):
            tensors = [in_format(each, memory_format) for each in use.draw(size, dtype, target[0])]
            outs = outputs(use.call, tensors)
            for out in outs:
                assert out.is_contiguous(memory_format=memory_format if out.dim() == 4 else torch.contiguous_format)
            wanted = [each.stride() for each in tensors if each.requires_grad]
            assert not use.grad_layout or [each.stride() for each in gradients(outs, tensors)] == wanted

    @ON_LINUX
    def test_deterministic_and_nothing_else_is_written(self, target, use):
        """The same bits each time, whatever allocated memory held before; what lies around it, and the inputs, stay as they are."""
        sizes, dtypes = (*use.sizes, *use.tails), (torch.float32, torch.bfloat16)
        if target == INTERPRETED:
            sizes, dtypes = sizes[:1], dtypes[:1]
        for size, dtype in itertools.product(sizes, dtypes):
            tensors, runs = use.draw(size, dtype, target[0]), []
            grads = [like(each) for each in outputs(use.call, tensors) if each.requires_grad]
            for byte in (0xFF, 0xC2):
                with guarded(byte):
                    outs = outputs(use.call, tensors)
                    runs.append([each.detach() for each in outs] + gradients(outs, tensors, grads))
                assert target[0] != "cpu" or any(map(holds, runs[-1]))  # or nothing was guarded
            assert all(each.isfinite().all() for each in runs[0])
            assert_same(*runs, name=f"{size} {dtype}")
            assert_same(tensors, use.draw(size, dtype, target[0]))

    def test_empty_batches(self, implementation, use):
        """No images: no loss, and gradients of zero."""
        device, _ = implementation
        dtypes = [each.dtype for each in results(use.call, use.draw(use.sizes[0], torch.float32, device))]
        for size in use.empty:
            tensors = use.draw(size, torch.float32, device)
            outs = outputs(use.call, tensors)
            grads = gradients(outs, tensors)
            assert [each.dtype for each in (*outs, *grads)] == dtypes and not any(each.any() for each in (*outs, *grads))
            assert all(each.shape[0] == 0 for each in outs if each.dim())
            assert [each.shape for each in grads] == [each.shape for each in tensors if each.requires_grad]

    @pytest.mark.alone
    def test_threads_make_no_difference(self, use):
        """Sums are cut where the maps say, not where the threads do."""
        formats, before = (torch.contiguous_format, torch.channels_last), torch.get_num_threads()
        for size, memory_format in itertools.product(use.large, formats):
            tensors, runs = [in_format(each, memory_format) for each in use.draw(size, torch.float32, "cpu")], []
            try:
                for threads in (1, 2, 3, 7):
                    torch.set_num_threads(threads)
                    runs.append(results(use.call, tensors))
            finally:
                torch.set_num_threads(before)
            for again in runs[1:]:
                assert_same(again, runs[0], exact=not use.multiplied)

    # GPUs.

    @on_a_gpu
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_current_stream_and_cuda_graph(self, target, use, dtype):
        """Also of other numbers than those that were captured."""
        for size in (use.sizes[2], use.large[0]):
            tensors, run = prepared(use, size, dtype)
            expected, exact = run(), not use.multiplied
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                on_side = run()
            torch.cuda.current_stream().wait_stream(side)
            assert_same(on_side, expected, exact)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = run()
            for _ in range(2):
                graph.replay()
                torch.cuda.synchronize()
                assert_same(captured, run(), exact)
                with torch.no_grad():
                    for each in tensors:
                        each.copy_(each.flip(-1))

    @on_a_gpu
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_no_synchronisation(self, target, use, dtype):
        for size in (use.sizes[2], use.large[0]):
            _, run = prepared(use, size, dtype)
            run()
            torch.cuda.set_sync_debug_mode("error")
            try:
                run()
            finally:
                torch.cuda.set_sync_debug_mode("default")

    # Errors.

    @pytest.mark.parametrize("backend", ["native", "reference", "autocast"])
    def test_errors(self, error, call, message, backend):
        """Autocast makes the dtypes one, so none of its errors is about that."""
        if backend == "autocast" and "'s dtype" in message:
            pytest.skip("autocast makes the dtypes one")
        with pytest.raises(error, match=message), segops.backend("auto" if backend == "autocast" else backend):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=backend == "autocast"):
                call()

    @pytest.mark.parametrize("backend", ["native", "reference"])
    def test_errors_in_compiled_code(self, backend):
        """The same with graph breaks; the same text where fullgraph wraps it."""
        tensors, errors = self.COMPILED_ERRORS
        with segops.backend(backend):
            for call, error, message in errors:
                torch.compiler.reset()
                with pytest.raises(error, match=message):
                    torch.compile(call, backend="eager")(*tensors)
                with pytest.raises(Exception, match=message):
                    torch.compile(call, backend="eager", fullgraph=True)(*tensors)

    def test_forced_backend_that_cannot_run(self, use):
        message = (
            rf"segops\.{use.function}: backend 'native' cannot run on meta with torch\..*Available here: 'auto', 'reference'"
        )
        tensors = [each.to("meta") for each in use.draw(use.sizes[0], torch.float32, "cpu")]
        with segops.backend("native"), pytest.raises(RuntimeError, match=message):
            use.call(*tensors)


def contract_of(op):
    """The class of an op's tests that fills in the contract: in test_contract.py, or beside the others."""
    divided = (Path(__file__).parent / op / "test_contract.py").exists()
    module = importlib.import_module(f".{op}.{'test_contract' if divided else f'test_{op}'}", __package__)
    (contract,) = (each for each in Contract.__subclasses__() if each.__module__ == module.__name__)
    return contract
