"""The declaration of ops, on ops of its own."""

import pytest
import torch

from segops.ops.common import library

FILLED = []


@library.op("test_weigh(Tensor input, Tensor weight, float factor, str backend) -> (Tensor, Tensor)")
class weigh:
    def empty(input):
        return torch.empty_like(input), torch.empty_like(input, dtype=torch.uint8)

    def fill(out, weight, input, **others):
        FILLED.append((torch.is_autocast_enabled("cpu"), others))
        torch.mul(input, weight * others["factor"], out=out[0])
        out[1].zero_()

    def setup_context(ctx, out, weight, factor):
        ctx.mark_non_differentiable(out[1])
        ctx.save_for_backward(weight)
        ctx.factor = factor

    def backward(ctx, grad, _):
        return (weigh_grad(grad, *ctx.saved_tensors, ctx.factor),)


@library.op("test_weigh_grad(Tensor grad, Tensor weight, float factor) -> Tensor")
class weigh_grad:
    def empty(grad):
        return torch.empty_like(grad)

    def fill(out, grad, weight, factor):
        torch.mul(grad, weight * factor, out=out)

    backward = library.no_double_backward("weigh")


def test_functions_get_what_they_name():
    FILLED.clear()
    input, weight = torch.randn(3, requires_grad=True), torch.tensor([1.0, 2.0, 3.0])
    with torch.autocast("cpu"):
        values, zeros = weigh(input, weight, 2.0, backend="any")
    assert FILLED == [(False, {"factor": 2.0, "backend": "any"})]
    assert torch.equal(values, 2 * weight * input) and not zeros.any() and not zeros.requires_grad
    (grad,) = torch.autograd.grad(values.sum(), input, create_graph=True)
    assert torch.equal(grad, 2 * weight)


def test_what_has_no_derivative_says_so():
    input = torch.randn(3, requires_grad=True)
    values, _ = weigh(input, torch.ones(3), 2.0, "any")
    (grad,) = torch.autograd.grad(values, input, torch.ones(3, requires_grad=True), create_graph=True)
    with pytest.raises(RuntimeError, match=r"segops\.weigh: double backward not supported"):
        grad.sum().backward()


def test_nothing_is_filled_where_all_is_empty():
    FILLED.clear()
    values, _ = weigh(torch.empty(0), torch.empty(0), 2.0, "any")
    assert values.shape == (0,) and not FILLED


def test_tracing_sees_what_running_allocates():
    input = torch.empty(2, 3, device="meta").t()
    values, zeros = weigh(input, torch.empty(3, 2, device="meta"), 2.0, "any")
    assert values.stride() == input.stride() and zeros.dtype == torch.uint8 and values.device.type == "meta"


@pytest.mark.parametrize(
    "name, functions, message",
    [
        (
            "test_typo",
            {"backwards": lambda ctx, grad: grad},
            "test_typo must have no functions but those of `op`; it has backwards",
        ),
        ("test_both", {"compute": lambda inner: inner}, "must have empty, and fill or compute, .* it has compute, empty, fill"),
        ("test_context", {"setup_context": lambda ctx, out: None}, "and backward with setup_context"),
        ("test_fill", {"fill": lambda out, outer: None}, "must take arguments of the schema, inner; it takes outer"),
    ],
)
def test_a_wrong_declaration_is_refused(name, functions, message):
    whole = {"empty": lambda inner: inner, "fill": lambda out, inner: None} | functions
    with pytest.raises(TypeError, match=message):
        library.op(f"{name}(Tensor inner) -> Tensor")(type(name, (), whole))
    assert not hasattr(torch.ops.segops, name)  # to be declared again


@pytest.mark.parametrize("schema", ["(float x, Tensor y) -> Tensor", "(Tensor x, int i=2) -> Tensor", "(Tensor x) -> ()"])
def test_a_schema_that_it_cannot_call_is_refused(schema):
    with pytest.raises(TypeError, match="test_schema must take a Tensor first"):
        library.op(f"test_schema{schema}")
