"""A pytest plugin for GPU tests under xdist: -p benchmarks.gpu_faults.

After a kernel fault CUDA is unusable, and every later test in the same process fails. So the worker
that the fault hit ends; xdist names the test and starts another worker for the rest.
"""

import os
import signal
import sys

import pytest


def pytest_configure():
    # `timeout` sends it, and pytest still reports. Python installs no handler of its own if the
    # signal was ignored before.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol():
    result = yield
    torch = sys.modules.get("torch")
    if "PYTEST_XDIST_WORKER" in os.environ and torch is not None and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)
    return result
