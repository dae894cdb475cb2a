"""Optimizers with a learning rate for each kind of parameter, and schedules per iteration."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from segops.models import Backbone


@dataclass
class Optimizer:
    """An optimizer and the schedule of its learning rate.

    Args:
        name: "sgd" (default), "adam" or "adamw".
        lr: learning rate at the start, default 0.007 (DeepLab v3).
        momentum: of SGD, default 0.9; nesterov: its Nesterov form (default False).
        betas: of Adam, default (0.9, 0.999).
        weight_decay: default 1e-4.
        head_lr: factor on the learning rate of all parameters that are not the backbone's, default 1 (DeepLab v1 and v2: 10). A VGG's fully connected
            layers as convolutions are the backbone's.
        bias_lr: factor on that of biases (of convolutions and linear layers), default 1 (Caffe's networks: 2; with head_lr=10 the head's biases get 20, as in DeepLab v2).
        bias_weight_decay: weight decay of biases, default that of the others (Caffe's networks: 0).
        schedule: of the learning rate, at every iteration: "poly" (default), (1 - t)^power from lr down to min_lr, t the share of iterations that is done;
            "fixed"; "step", times `factor` every `every` iterations.
        power: default 0.9. min_lr: default 0. every: default 2000; factor: default 0.1 (DeepLab v1).
    """

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = 0.007
    momentum: float = 0.9
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-4
    head_lr: float = 1.0
    bias_lr: float = 1.0
    bias_weight_decay: float | None = None
    schedule: Literal["poly", "fixed", "step"] = "poly"
    power: float = 0.9
    min_lr: float = 0.0
    every: int = 2000
    factor: float = 0.1

    def __post_init__(self):
        if self.name not in ("sgd", "adam", "adamw"):
            raise ValueError(f"optimizer name must be 'sgd', 'adam' or 'adamw'; got {self.name!r}")
        if self.schedule not in ("poly", "fixed", "step"):
            raise ValueError(f"schedule must be 'poly', 'fixed' or 'step'; got {self.schedule!r}")
        if not self.lr > 0:
            raise ValueError(f"lr must be positive; got {self.lr!r}")
        if not 0 <= self.min_lr <= self.lr:
            raise ValueError(f"min_lr must be at least 0 and at most lr, {self.lr!r}; got {self.min_lr!r}")
        if self.every < 1:
            raise ValueError(f"every must be at least 1; got {self.every!r}")

    def build(self, modules, iterations):
        """(optimizer, scheduler to be stepped at every iteration) for the parameters of some modules.

        Args:
            modules: an nn.Module, or several.
            iterations: of the whole training.

        Raises:
            ValueError: head_lr is not 1, and no module has a backbone.
        """
        groups = self._groups(nn.ModuleList([modules] if isinstance(modules, nn.Module) else modules))
        if self.name == "sgd":
            optimizer = torch.optim.SGD(groups, self.lr, self.momentum, nesterov=self.nesterov)
        else:
            kind = torch.optim.Adam if self.name == "adam" else torch.optim.AdamW
            optimizer = kind(groups, self.lr, self.betas)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: self.rate(done, iterations))

    def rate(self, done, iterations):
        """The factor on every learning rate after `done` of all iterations."""
        if self.schedule == "fixed":
            return 1.0
        if self.schedule == "step":
            return self.factor ** (done // self.every)
        least = self.min_lr / self.lr
        return least + (1 - least) * max(1 - done / iterations, 0) ** self.power

    def _groups(self, modules):
        backbones = [module for module in modules.modules() if isinstance(module, Backbone) or hasattr(module, "of_backbone")]
        inside = {id(parameter) for backbone in backbones for parameter in backbone.parameters()}
        if self.head_lr != 1 and not inside:
            raise ValueError(f"head_lr must be 1 for a model without a backbone; got {self.head_lr}")
        biases = {
            id(layer.bias)
            for layer in modules.modules()
            if isinstance(layer, nn.Linear | nn.modules.conv._ConvNd) and layer.bias is not None
        }
        groups = {}
        for parameter in modules.parameters():
            if not parameter.requires_grad:
                continue
            bias = id(parameter) in biases
            factor = (1.0 if id(parameter) in inside else self.head_lr) * (self.bias_lr if bias else 1.0)
            decay = self.weight_decay if not bias or self.bias_weight_decay is None else self.bias_weight_decay
            groups.setdefault((factor, decay), []).append(parameter)
        return [
            {"params": parameters, "lr": self.lr * factor, "weight_decay": decay}
            for (factor, decay), parameters in groups.items()
        ]
