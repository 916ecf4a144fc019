"""Batch norm over the batches of all ranks, on any device (torch's SyncBatchNorm needs a GPU)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pyvit.ops.loss_tiles import all_sum


class SyncBatchNorm1d(nn.BatchNorm1d):
    """``nn.BatchNorm1d`` whose training statistics are over the rows of all ranks. Input (B, D), with the same B on
    every rank."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(x)
        wide = x.float()
        mean = all_sum(wide.mean(0), dist.group.WORLD) / dist.get_world_size()
        # E[(x - mean)^2], not E[x^2] - E[x]^2: the difference would cancel for a small variance and a large mean.
        var = all_sum((wide - mean).square().mean(0), dist.group.WORLD) / dist.get_world_size()
        if self.running_mean is not None and self.running_var is not None:
            n = len(x) * dist.get_world_size()
            with torch.no_grad():
                self.num_batches_tracked += 1  # type: ignore[operator]
                self.running_mean.lerp_(mean.detach(), self.momentum or 0.0)
                self.running_var.lerp_(var.detach() * n / max(n - 1, 1), self.momentum or 0.0)
        y = (wide - mean) * torch.rsqrt(var + self.eps)
        if self.affine:
            y = y * self.weight + self.bias
        return y.to(x.dtype)

    @staticmethod
    def convert(module: nn.Sequential) -> nn.Sequential:
        """Replace the BatchNorm1d layers of a newly initialised ``module``."""
        for i, layer in enumerate(module):
            if type(layer) is nn.BatchNorm1d:
                module[i] = SyncBatchNorm1d(layer.num_features, layer.eps, layer.momentum, layer.affine)
                for ours, theirs in zip(module[i].parameters(), layer.parameters(), strict=True):
                    ours.requires_grad_(theirs.requires_grad)
        return module
