"""What guarded memory must catch."""

import ctypes

import pytest
import torch

from .guard import guarded, holds
from .targets import ON_LINUX

pytestmark = ON_LINUX


@pytest.mark.parametrize("at", [-1, 40, 40 + 200])
def test_writes_beyond_a_tensor(at):
    with pytest.raises(AssertionError, match="written beyond a tensor"), guarded(0xFF):
        tensor = torch.empty(10)
        ctypes.memset(tensor.data_ptr() + at, 0, 1)


def test_what_is_not_written_shows():
    for byte, check in ((0xFF, torch.isnan), (0xC2, lambda x: x < 0)):
        with guarded(byte):
            tensor, more = torch.empty(10), torch.empty(3, dtype=torch.bfloat16)
            assert holds(tensor) and check(tensor).all() and check(more).all()
    assert not holds(torch.empty(10))
