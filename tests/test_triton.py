"""The Triton kernels compile for real GPUs, also on a machine that has none."""

import pytest

from .compile_triton import assert_compiles
from .targets import TRITON


@TRITON
@pytest.mark.parametrize("op", ["argmax", "bal", "pac", "pag"])
def test_compiles(op):
    pytest.importorskip("triton")
    assert_compiles(f"tests.{op}.compile_triton")
