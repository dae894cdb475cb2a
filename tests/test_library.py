"""The declaration of ops, on ops of its own."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from segops.ops.common import library

RAN = []


@library.op("test_weigh(Tensor input, Tensor weight, float factor) -> (Tensor, Tensor)")
class weigh:
    def empty(input):
        return torch.empty_like(input), torch.empty_like(input, dtype=torch.uint8)

    def setup_context(ctx, out, weight, factor):
        assert len(out) == 2
        ctx.save_for_backward(weight)
        ctx.factor = factor

    def backward(ctx, needed, grad):
        return (weigh_grad(grad, *ctx.saved_tensors, ctx.factor, backend=ctx.backend),)


@library.op("test_weigh_grad(Tensor grad, Tensor weight, float factor) -> Tensor")
class weigh_grad:
    def empty(grad):
        return torch.empty_like(grad)

    backward = library.no_double_backward("weigh")


@library.op("test_total(Tensor[] maps, float factor) -> Tensor")
class total:
    def empty(maps):
        return torch.empty_like(maps[0])

    def setup_context(ctx, out, factor):
        ctx.factor = factor

    def backward(ctx, needed, grad):
        RAN.append(tuple(needed))
        return tuple(grad * ctx.factor if need else None for need in needed)


@library.op("test_double(Tensor input) -> Tensor", only_on_cpu=True)
class double:
    def empty(input):
        return torch.empty_like(input)


COMPUTE = {
    "test_weigh": lambda input, weight, factor: (input * weight * factor, torch.zeros_like(input, dtype=torch.uint8)),
    "test_weigh_grad": lambda grad, weight, factor: grad * weight * factor,
    "test_total": lambda maps, factor: sum(maps) * factor,
}


def find(name, module):
    def run(*arguments):
        RAN.append((name, module, torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
        return COMPUTE[name](*arguments)

    return run


library.implement("toy", "segops_toy", find)


@pytest.fixture(autouse=True)
def nothing_ran():
    RAN.clear()


def test_runs_where_it_is_asked_to():
    input, weight = torch.randn(3, requires_grad=True), torch.tensor([1.0, 2.0, 3.0])
    with torch.autocast("cpu"):
        values, zeros = weigh(input, weight, 2.0, backend="toy")
    assert RAN == [("test_weigh", __name__, False, False)]
    assert torch.equal(values, 2 * weight * input) and not zeros.any()
    assert values.requires_grad and not zeros.requires_grad
    (grad,) = torch.autograd.grad(values.sum(), input, create_graph=True)
    assert torch.equal(grad, 2 * weight) and RAN[-1][0] == "test_weigh_grad"


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("run", [total, torch.ops.segops_toy.test_total], ids=["eager", "traced"])
def test_the_tensors_of_a_list_are_differentiated(run, wanted):
    maps = [torch.randn(3).requires_grad_(each) for each in wanted]
    options = {"backend": "toy"} if run is total else {}
    out = run(maps, 2.0, **options)
    assert torch.equal(out, 2 * sum(maps))
    out.sum().backward()
    assert RAN[-1] == wanted
    assert [each.grad.tolist() if each.requires_grad else None for each in maps] == [
        [2.0] * 3 if each else None for each in wanted
    ]


def test_what_is_only_on_the_cpu_is_no_op_of_other_backends():
    assert hasattr(torch.ops.segops, "test_double") and hasattr(torch.ops.segops_toy, "test_total")
    assert not hasattr(torch.ops.segops_toy, "test_double") and not hasattr(torch.ops.segops_triton, "test_double")
    assert double.schema in library.schemas("cpu") and total.schema in library.schemas("cuda")
    assert double.schema not in library.schemas("cuda")


def test_what_has_no_derivative_says_so():
    input = torch.randn(3, requires_grad=True)
    values, _ = weigh(input, torch.ones(3), 2.0, backend="toy")
    (grad,) = torch.autograd.grad(values, input, torch.ones(3, requires_grad=True), create_graph=True)
    with pytest.raises(RuntimeError, match=r"segops\.weigh: double backward not supported"):
        grad.sum().backward()


def test_eager_calls_pay_for_no_more_than_a_function():
    """PyTorch's autograd for ops of Python is what tracing sees: three times the price."""
    input = torch.randn(3, requires_grad=True)
    assert type(weigh(input, input.detach(), 2.0, backend="toy")[0].grad_fn).__name__ == "test_weighBackward"
    traced, _ = torch.ops.segops_toy.test_weigh(input, input.detach(), 2.0)
    assert type(traced.grad_fn).__name__ != "test_weighBackward"


def test_tracing_sees_the_op():
    input, weight = torch.randn(3), torch.randn(3)
    call = lambda input: weigh(input, weight, 2.0, backend="toy")[0]  # noqa: E731
    graph = make_fx(call)(input).graph
    assert torch.ops.segops_toy.test_weigh.default in [node.target for node in graph.nodes]
    assert "segops_toy::test_weigh" in str(torch.jit.trace(call, (input,)).graph)


def test_tracing_sees_what_running_allocates():
    input = torch.empty(2, 3, device="meta").t()
    values, zeros = weigh(input, torch.empty(3, 2, device="meta"), 2.0, backend="toy")
    assert values.stride() == input.stride() and zeros.dtype == torch.uint8 and values.device.type == "meta"


@pytest.mark.parametrize(
    "name, functions, message",
    [
        (
            "test_typo",
            {"backwards": lambda ctx, grad: grad},
            "test_typo must have no functions but those of `op`; it has backwards",
        ),
        ("test_context", {"setup_context": lambda ctx, out: None}, "must have empty, and backward with setup_context"),
        ("test_empty", {"empty": lambda outer: None}, "must take arguments of the schema, inner; it takes outer"),
    ],
)
def test_a_wrong_declaration_is_refused(name, functions, message):
    whole = {"empty": lambda inner: inner} | functions
    with pytest.raises(TypeError, match=message):
        library.op(f"{name}(Tensor inner) -> Tensor")(type(name, (), whole))
    assert not hasattr(torch.ops.segops_toy, name)  # to be declared again


@pytest.mark.parametrize("schema", ["(float x, Tensor y) -> Tensor", "(Tensor x, int i=2) -> Tensor", "(Tensor x) -> ()"])
def test_a_schema_that_it_cannot_call_is_refused(schema):
    with pytest.raises(TypeError, match="test_schema must take Tensors first"):
        library.op(f"test_schema{schema}")(type("test_schema", (), {"empty": lambda x: x}))
