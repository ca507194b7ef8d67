"""Merging: the student as trained, adapters included, as a plain timm state dict, verified on the spot.

Knows a student, its adapters and the tap between them; nothing of methods, teachers or the task.
"""
from contextlib import contextmanager
from typing import Dict, Iterable, Iterator, Optional, Set

import torch
import torch.nn as nn
from timm.layers import SplitBatchNorm2d

from ..features.inputs import evaluation_mode, logits_of
from ..utils.precision import full_float32
from .folding import fold_affine, named_tensors
from .tap import StudentTap

# Largest logit difference, relative to the logits' spread, that rounding explains.
MERGE_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@torch.no_grad()
def merged_tensors(
        student: nn.Module,
        adapters: Iterable[nn.Module],
        tap: Optional[StudentTap],
) -> Dict[str, torch.Tensor]:
    """Return the tensors of the student that merging changes, by each of their names, in the student's own dtype.

    Args:
        student: Student as trained.
        adapters: One for each site of the tap.
        tap: Insertion point, None where there is none.
    """
    tensors = named_tensors(student)
    changed: Dict[str, torch.Tensor] = {}
    for adapter, site in zip(adapters, tap.sites if tap is not None else ()):
        if site.consumers:
            changed.update(fold_affine(student, tensors, site.consumers, adapter.affine()))
    return {name: value.to(tensors[name].device, tensors[name].dtype) for name, value in changed.items()}


def merged_state_dict(
        student: nn.Module,
        adapters: Iterable[nn.Module],
        tap: Optional[StudentTap],
) -> Dict[str, torch.Tensor]:
    """Return the merged student's state dict: keys, shapes and dtypes of the plain architecture."""
    split = split_batch_norm_tensors(student)
    merged = merged_tensors(student, adapters, tap)
    return {name: merged.get(name, value) for name, value in student.state_dict().items() if name not in split}


def split_batch_norm_tensors(model: nn.Module) -> Set[str]:
    """Return the names of what `--split-bn` adds to a model: batch norms that only further views train."""
    prefixes = [
        f'{name}.aux_bn' if name else 'aux_bn' for name, m in model.named_modules()
        if isinstance(m, SplitBatchNorm2d)]
    return {name for name in model.state_dict() if prefixes and name.startswith(tuple(prefixes))}


def merge_error(adapted: nn.Module, plain: nn.Module, images: torch.Tensor) -> float:
    """Measure how far the logits of a plain student, merged, are from those of the student as trained.

    Args:
        adapted: Module that gives the logits of the student as trained, adapters included.
        plain: Model that the merged state dict was loaded into; shares no tensor with the former.
        images: Probe batch, [B, C, H, W].

    Returns:
        Largest logit difference over the logits' spread; nan where logits are not finite.
    """
    with evaluation_mode(adapted), evaluation_mode(plain), full_precision(images.device):
        expected = logits_of(adapted(images)).double()
        actual = logits_of(plain(images)).double()
    spread = (expected - expected.mean()).abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return ((actual - expected).abs().max() / spread).item()


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Run outside autocast and without TF32, whose rounding would hide a wrong merge."""
    with full_float32(), torch.autocast(device.type, enabled=False):
        yield
