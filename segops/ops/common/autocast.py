"""What the ops do under autocast: public functions cast their arguments first, implementations compute outside it."""

import contextlib

import torch


def autocast_dtype(tensor):
    """The dtype that autocast asks for on the tensor's device, or None where it is off."""
    device = tensor.device.type
    enabled = device != "meta" and torch.is_autocast_enabled(device)  # it raises for meta, which has no autocast
    return torch.get_autocast_dtype(device) if enabled else None


def cast(*arguments, to):
    """The arguments, where autocast is on for the first one's device floating-point tensors in dtype `to`(autocast's, those tensors).

    Any argument may be of the wrong type: that is for the checks that follow to say.
    """
    if not isinstance(arguments[0], torch.Tensor):
        return arguments
    dtype = autocast_dtype(arguments[0])
    if dtype is None:
        return arguments
    floating = [each for each in arguments if isinstance(each, torch.Tensor) and each.is_floating_point()]
    dtype = to(dtype, floating)
    return tuple(each.to(dtype) if any(each is one for one in floating) else each for each in arguments)


def full_precision(tensor):
    """A context in which autocast leaves ops on the tensor's device alone."""
    if autocast_dtype(tensor) is None:
        return contextlib.nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)
