"""Small trainable parts between the features of a student and of a teacher."""
from typing import Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

Shape = Tuple[int, int, int]  # (C, H, W)


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


class HintRegressor(nn.Module):
    """Convolution and batch norm from the student's feature to the teacher's, in the common form for their grids.

    Args:
        student: Shape of the student's feature, (C, H, W).
        teacher: Shape of the teacher's feature, (C, H, W).
        relu: End with a ReLU.
        largest_ratio: Up to which ratio of the grids (this one left out) a kernel covers the difference, whose size
            grows with it. Beyond it, and for other grids of the student that are smaller, the convolution is 1x1 and
            the output on the student's grid.
    """

    def __init__(self, student: Shape, teacher: Shape, relu: bool = True, largest_ratio: float = 3.):
        super().__init__()
        self.conv = _create_convolution(student, teacher, largest_ratio)
        self.bn = BatchNorm2d(teacher[0])
        self.relu = relu

    def forward(self, student: torch.Tensor) -> torch.Tensor:
        x = self.bn(self.conv(student))
        return F.relu(x) if self.relu else x


def _create_convolution(student: Shape, teacher: Shape, largest_ratio: float) -> nn.Module:
    """Halve or double the grid, or cover the difference; for other grids a 1x1 convolution."""
    channels, grid, target = (student[0], teacher[0]), student[1:], teacher[1:]
    if grid == (2 * target[0], 2 * target[1]):
        return nn.Conv2d(*channels, 3, stride=2, padding=1)
    if target == (2 * grid[0], 2 * grid[1]):
        return nn.ConvTranspose2d(*channels, 4, stride=2, padding=1)
    if all(t <= s < largest_ratio * t for s, t in zip(grid, target)):
        return nn.Conv2d(*channels, (1 + grid[0] - target[0], 1 + grid[1] - target[1]))
    return nn.Conv2d(*channels, 1)
