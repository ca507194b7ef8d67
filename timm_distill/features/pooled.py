"""Pooled features of a model: the input of its classifier as a vector, what a model without one gives."""
from typing import Sequence

import torch
import torch.nn as nn

from .classifier import is_headless
from .inspection import inspect
from .reader import as_vectors, read

_PRE_LOGITS = frozenset({'pre_logits'})


class PooledFeatures(nn.Module):
    """A model that gives its pre-logits, [B, D].

    Args:
        model: timm model, with or without a classifier.
        input_size: Its input, (channels, height, width).

    Raises:
        UsageError: If it has a classifier whose input cannot be read.
    """

    def __init__(self, model: nn.Module, input_size: Sequence[int]):
        super().__init__()
        self.model = model
        self.spec = None if is_headless(model) else inspect(model, input_size, trains=True, whole=True)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.spec is None:
            return as_vectors(self.model(images))
        pre_logits = read(self.model, self.spec, images, _PRE_LOGITS).pre_logits
        assert pre_logits is not None  # for mypy: it was asked for
        return pre_logits
