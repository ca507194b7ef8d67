"""Small trainable parts between the features of a student and of a teacher."""
import torch
import torch.nn as nn


class BatchNorm2d(nn.BatchNorm2d):
    """Batch norm that takes its running statistics where a batch holds one value per channel, which has no variance."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.training and input.numel() == input.shape[1]:
            return nn.functional.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, False, 0., self.eps)
        return super().forward(input)


def conv_norm(in_channels: int, out_channels: int, kernel_size: int) -> nn.Sequential:
    """Return a convolution that keeps the grid, without bias, and a batch norm."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
    return nn.Sequential(conv, BatchNorm2d(out_channels))


def conv1x1(in_channels: int, out_channels: int) -> nn.Conv2d:
    """Return a linear map of channels, without offset."""
    return nn.Conv2d(in_channels, out_channels, 1, bias=False)


def equal_channels(in_channels: int, out_channels: int) -> nn.Module:
    """Return a linear map of channels where their numbers differ, else the identity."""
    return nn.Identity() if in_channels == out_channels else conv1x1(in_channels, out_channels)
