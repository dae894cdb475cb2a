import pytest

from . import measure


@pytest.fixture(autouse=True)
def precision(request):
    with measure.precision(getattr(request.node.callspec.params["case"], "tf32", False)):
        yield
