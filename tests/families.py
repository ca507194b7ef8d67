"""One representative of every distinct head in timm, built small, for the tests that cover them all.

A head stays as it is; `small` in the list leaves fewer blocks or channels before it, where these cost much, and `cut`
does where no argument of timm's can.
"""
import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

import pytest
import timm
import torch
import torch.nn as nn

from timm_distill.features.inputs import CANNOT_RUN, evaluation_mode

LIST = Path(__file__).resolve().parent / 'head_families.json'
CLASSES = 5
HUGE_M = 140.  # million parameters
_SIZES = (64, 96)
_BUILD_SIZES = (64, 112, 128)  # for models of one size that can be built for another: patches of 8, 14 and 16


@dataclass(frozen=True)
class Family:
    """A representative of a family of heads.

    Attributes:
        name: timm architecture.
        module: Its module in timm.
        size: Height and width that it is published for.
        params_m: Million parameters, as published.
        small: Arguments that build it with fewer blocks or channels.
        cut: What `cut_models` takes away beyond that.
    """
    name: str
    module: str
    size: int
    params_m: float
    small: Dict[str, Any] = field(default_factory=dict, hash=False)
    cut: Dict[str, int] = field(default_factory=dict, hash=False)

    def create(self, **kwargs: Any) -> nn.Module:
        """Return the model as it is published."""
        return timm.create_model(self.name, num_classes=CLASSES, **kwargs)

    def create_small(self, **kwargs: Any) -> nn.Module:
        """Return the model with fewer blocks or channels."""
        return self.create(**self.small, **kwargs)


@dataclass(frozen=True)
class Built:
    """A model of a family at the smallest of the sizes tried.

    Attributes:
        family: Its family.
        model: The model.
        stock: Another one with the same weights, which no test changes.
        input_size: Input that it runs on.
    """
    family: Family
    model: nn.Module
    stock: nn.Module
    input_size: Tuple[int, int, int]


def list_families() -> List[Family]:
    """Return all families, the smallest first."""
    rows = json.loads(LIST.read_text(encoding='utf-8'))
    return [
        Family(
            row['name'], row['module'], row['input_size'][1], row['params_m'], row.get('small', {}), row.get('cut', {}))
        for row in rows]


def family_params() -> List[Any]:
    """Return the families as test parameters."""
    return [pytest.param(family, id=family.name) for family in list_families()]


def build_small(family: Family) -> Built:
    """Build a family's model for the smallest of the sizes tried that it runs on."""
    torch.manual_seed(0)
    model = family.create_small()
    for kwargs, size in _small_sizes(family):
        candidate = _create(family, kwargs) if kwargs else model
        if candidate is not None and _runs(candidate, size):
            return Built(family, candidate, copy.deepcopy(candidate), (3, size, size))
    return Built(family, model, copy.deepcopy(model), (3, family.size, family.size))


def _small_sizes(family: Family) -> Iterator[Tuple[Dict[str, Any], int]]:
    for size in _SIZES:
        yield {}, size
    for size in _BUILD_SIZES:
        if size < family.size:
            yield dict(img_size=size), size


def _create(family: Family, kwargs: Dict[str, Any]) -> Optional[nn.Module]:
    try:
        return family.create_small(**kwargs)
    except CANNOT_RUN:
        return None


def _runs(model: nn.Module, size: int) -> bool:
    try:
        with evaluation_mode(model):
            model(torch.zeros(2, 3, size, size))
    except CANNOT_RUN:
        return False
    return True
