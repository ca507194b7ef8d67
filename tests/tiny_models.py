"""Small custom models, one for every way that a head can be reached."""
from typing import List, Sequence

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

CHANNELS, CLASSES = 6, 5


class Plain(nn.Module):
    """A model with nothing but a forward and a final linear layer `fc`."""

    def __init__(self) -> None:
        super().__init__()
        self.num_classes = CLASSES
        self.grad_checkpointing = False
        self.stem = nn.Sequential(nn.Conv2d(3, CHANNELS, 10, stride=11), nn.BatchNorm2d(CHANNELS), nn.GELU())
        self.fc = nn.Linear(CHANNELS, CLASSES)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def run_stem(self, x: torch.Tensor) -> torch.Tensor:
        """Return a map, [B, C, 3, 3] of a 32 x 32 input."""
        if self.grad_checkpointing and self.training:
            return checkpoint(self.stem, x, use_reentrant=False)
        return self.stem(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.run_stem(x).mean((2, 3)))


class WithClassifier(Plain):
    """The same with timm's `get_classifier`, and another linear layer that runs after it."""

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Linear(CHANNELS, 1)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = self.run_stem(x).mean((2, 3))
        return self.fc(pooled) * self.auxiliary(pooled.detach()).sigmoid()


class TwoScales(Plain):
    """timm's parts with a list of two features, and a head for each; logits are the mean of both."""

    def __init__(self) -> None:
        super().__init__()
        self.num_features = CHANNELS
        self.fine = nn.Conv2d(3, 4, 4, stride=4)
        self.fc = nn.ModuleList([nn.Linear(4, CLASSES), nn.Linear(CHANNELS, CLASSES)])

    def forward_features(self, x: torch.Tensor) -> List[torch.Tensor]:
        return [self.fine(x), self.run_stem(x)]

    def forward_head(self, x: Sequence[torch.Tensor], pre_logits: bool = False) -> torch.Tensor:
        pooled = [part.mean((2, 3)) for part in x]
        if pre_logits:
            return torch.cat(pooled, 1)
        return torch.stack([head(part) for head, part in zip(self.fc, pooled)]).mean(0)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


class WithoutLinear(Plain):
    """A classifier that no affine map folds into: distances to prototypes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Parameter(torch.randn(CLASSES, CHANNELS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -torch.cdist(self.run_stem(x).mean((2, 3)), self.fc)
