"""What the emulation rests on: the kernels' files need nothing of CUDA that csrc/common does not have another form of."""

import re

import pytest

from . import ROOT

SOURCES = sorted((ROOT / "csrc").glob("*/*_cuda.cu"))
ONLY_IN_COMMON = r"<<<|\basm\b|cuda(Launch|Func|Occupancy|Memcpy|Stream|Device)\w+\(|\bcub::|extern __shared__|SEGOPS_EMULATION"


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_what_is_more_than_cpp_goes_through_common(source):
    code = re.sub(r"//.*", "", source.read_text(encoding="utf-8"))
    assert not re.findall(ONLY_IN_COMMON, code)
