import pytest
import torch


@pytest.fixture(autouse=True)
def precision(request):
    """cudnn.benchmark on; TF32 off but for the rows that are about it."""
    tf32 = getattr(request.node.callspec.params["case"], "tf32", False)
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    yield
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
