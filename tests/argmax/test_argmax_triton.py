"""The Triton kernels compile for real GPUs, also on a machine that has none."""

import pytest

from ..compile_triton import assert_compiles


def test_compiles():
    pytest.importorskip("triton")
    assert_compiles("tests.argmax.compile_triton")
