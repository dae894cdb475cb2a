"""Every implementation of an op, for tests to run on, and a port for two processes to meet at."""

import socket

import pytest
import torch

CUDA = pytest.mark.cuda
# (device, backend): every implementation that this machine can run. The Triton interpreter serves where there is no GPU.
TARGETS = [
    pytest.param(("cpu", "native"), id="cpu-native"),
    pytest.param(("cuda", "native"), id="cuda-native", marks=CUDA),
    pytest.param(("cuda", "triton"), id="cuda-triton", marks=CUDA),
]
if not torch.cuda.is_available():
    TARGETS.append(pytest.param(("cpu", "triton"), id="interpreted-triton"))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
