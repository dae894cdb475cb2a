"""The ops in a network that two processes train."""

import torch
import torch.nn.functional as F

import segops

from .targets import free_port


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = torch.nn.Conv2d(3, 24, 3, padding=1), torch.nn.Conv2d(44, 5, 1)
        self.pyramid, self.gate = segops.nn.PyramidAtrousConv2d(24, 20), segops.nn.PartialAttentionGate()
        self.loss = segops.nn.BoundaryAwareLoss()

    def forward(self, images, labels):
        encoder = self.stem(images)
        pooled, offsets = segops.max_pool2d_with_offsets(encoder, 4)
        unpooled = segops.max_unpool2d_with_offsets(pooled, offsets, 4, encoder.shape)
        decoder = F.avg_pool2d(self.pyramid(unpooled), 2)
        return self.loss(self.head(self.gate(decoder, [encoder])), labels)


def test_distributed_data_parallel():
    """Over gloo: each gradient is the mean of what the two halves of the batch give."""
    torch.multiprocessing.spawn(train_half, (free_port(),), nprocs=2)


def train_half(rank, port):
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    network, images, labels = Network(), torch.randn(2, 3, 8, 10), torch.randint(0, 5, (2, 33, 35))
    expected = torch.autograd.grad(network(images, labels), list(network.parameters()))
    parallel = torch.nn.parallel.DistributedDataParallel(network)
    parallel(images[rank : rank + 1], labels[rank : rank + 1]).backward()
    for parameter, grad in zip(network.parameters(), expected, strict=True):
        assert grad.any()
        torch.testing.assert_close(parameter.grad, grad)
    torch.distributed.destroy_process_group()
