"""What the public functions do under autocast: they cast their arguments first."""

import torch


def autocast_dtype(tensor):
    """The dtype that autocast asks for on the tensor's device, or None where it is off."""
    if not torch._C._is_any_autocast_enabled():
        return None
    device = tensor.device.type
    enabled = device != "meta" and torch.is_autocast_enabled(device)  # it raises for meta, which has no autocast
    return torch.get_autocast_dtype(device) if enabled else None


def cast(*arguments, to):
    """The arguments; where autocast is on for the first one's device, floating-point tensors in the
    dtype `to`(autocast's, theirs).

    Any argument may be of the wrong type: that is for the checks that follow to say.
    """
    if not torch._C._is_any_autocast_enabled():
        return arguments
    dtype = autocast_dtype(arguments[0]) if _is_floating(arguments[0]) else None
    if dtype is None:
        return arguments
    dtype = to(dtype, [each.dtype for each in arguments if _is_floating(each)])
    return tuple(each.to(dtype) if _is_floating(each) else each for each in arguments)


def _is_floating(argument):
    return isinstance(argument, torch.Tensor) and argument.is_floating_point()
