"""Blocks of the CIFAR networks: residual, pre-activation, inverted residual, shuffle units."""
import torch
import torch.nn as nn
import torch.nn.functional as F


def conv_norm(
        in_chs: int,
        out_chs: int,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        act: bool = True,
        bias: bool = False,
) -> nn.Sequential:
    layers = [
        nn.Conv2d(in_chs, out_chs, kernel, stride, kernel // 2, groups=groups, bias=bias),
        nn.BatchNorm2d(out_chs),
    ]
    return nn.Sequential(*layers, nn.ReLU(inplace=True)) if act else nn.Sequential(*layers)


class _Residual(nn.Module):
    """Add a branch to its input, projected where the shapes differ, and rectify the sum."""

    def __init__(self, branch: nn.Module, in_chs: int, out_chs: int, stride: int):
        super().__init__()
        self.branch = branch
        self.shortcut = nn.Identity() if stride == 1 and in_chs == out_chs else conv_norm(
            in_chs, out_chs, 1, stride, act=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.branch(x) + self.shortcut(x))


def basic_block(in_chs: int, out_chs: int, stride: int) -> nn.Module:
    branch = nn.Sequential(conv_norm(in_chs, out_chs, 3, stride), conv_norm(out_chs, out_chs, 3, act=False))
    return _Residual(branch, in_chs, out_chs, stride)


def bottleneck_block(in_chs: int, out_chs: int, stride: int) -> nn.Module:
    mid = out_chs // 4
    branch = nn.Sequential(
        conv_norm(in_chs, mid), conv_norm(mid, mid, 3, stride), conv_norm(mid, out_chs, act=False))
    return _Residual(branch, in_chs, out_chs, stride)


class PreActivationBlock(nn.Module):
    """Basic block of WRN: norm and activation come before each convolution, and before a projection."""

    def __init__(self, in_chs: int, out_chs: int, stride: int):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_chs)
        self.conv1 = nn.Conv2d(in_chs, out_chs, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_chs)
        self.conv2 = nn.Conv2d(out_chs, out_chs, 3, 1, 1, bias=False)
        self.shortcut = nn.Identity() if in_chs == out_chs else nn.Conv2d(in_chs, out_chs, 1, stride, bias=False)
        self.projects = in_chs != out_chs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        activated = F.relu(self.norm1(x))
        branch = self.conv2(F.relu(self.norm2(self.conv1(activated))))
        return branch + self.shortcut(activated if self.projects else x)


class InvertedResidual(nn.Module):
    """Block of MobileNetV2, expanded in the first one too."""

    def __init__(self, in_chs: int, out_chs: int, stride: int, expansion: int):
        super().__init__()
        mid = in_chs * expansion
        self.branch = nn.Sequential(
            conv_norm(in_chs, mid), conv_norm(mid, mid, 3, stride, mid), conv_norm(mid, out_chs, act=False))
        self.has_skip = stride == 1 and in_chs == out_chs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.branch(x) if self.has_skip else self.branch(x)


def _shuffle(x: torch.Tensor, groups: int) -> torch.Tensor:
    """Interleave the channels of groups."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


class ShuffleUnitV1(nn.Module):
    """Unit of ShuffleNetV1: one that halves the map concatenates its pooled input, the others add it."""

    def __init__(self, in_chs: int, out_chs: int, stride: int, groups: int, first_groups: int):
        super().__init__()
        branch_chs = out_chs - (in_chs if stride == 2 else 0)
        mid = branch_chs // 4
        self.groups = first_groups
        self.stride = stride
        self.reduce = conv_norm(in_chs, mid, groups=first_groups)
        self.spatial = conv_norm(mid, mid, 3, stride, mid)
        self.expand = conv_norm(mid, branch_chs, groups=groups, act=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = self.expand(self.spatial(_shuffle(self.reduce(x), self.groups)))
        if self.stride == 2:
            return F.relu(torch.cat([branch, F.avg_pool2d(x, 3, 2, 1)], 1))
        return F.relu(branch + x)


class ShuffleUnitV2(nn.Module):
    """Unit of ShuffleNetV2: one that halves the map runs two branches, the others pass half of the channels on."""

    def __init__(self, in_chs: int, out_chs: int, stride: int):
        super().__init__()
        mid = out_chs // 2
        self.splits = stride == 1
        branch_in = in_chs // 2 if self.splits else in_chs
        self.branch = nn.Sequential(
            conv_norm(branch_in, mid), conv_norm(mid, mid, 3, stride, mid, act=False), conv_norm(mid, mid))
        self.shortcut = nn.Identity() if self.splits else nn.Sequential(
            conv_norm(in_chs, in_chs, 3, stride, in_chs, act=False), conv_norm(in_chs, mid))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        passed, taken = x.chunk(2, 1) if self.splits else (x, x)
        return _shuffle(torch.cat([self.shortcut(passed), self.branch(taken)], 1), 2)


class PoolLarge(nn.Module):
    """Halve maps larger than 4 x 4: VGG's last pooling, which 32 x 32 images leave out and 64 x 64 images need."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(x, 2) if min(x.shape[-2:]) > 4 else x
