"""How far a result may be off: the bounds of the contract."""

import torch


def relative_error(value, truth):
    """In relative norm; of what is zero, as an absolute size."""
    value, truth = value.detach().double().cpu(), truth.detach().double().cpu()
    return ((value - truth).norm() / (truth.norm() if truth.any() else 1)).item()


def assert_close(name, value, plain, truth, float64=1e-12):
    """In relative norm against float64, bounded by PyTorch's own error in the same dtype, that of `plain`."""
    assert value.shape == truth.shape, name
    error, plain_error = relative_error(value, truth), relative_error(plain, truth)
    if plain.dtype == torch.float64:
        bound = float64
    elif plain.dtype == torch.float32 or not truth.any():
        bound = min(1e-5, max(1e-6, 2 * plain_error))
    else:
        bound = 1.5 * plain_error
    assert error <= bound, f"{name}: {error:.2e}, plain PyTorch {plain_error:.2e}, bound {bound:.2e}"
