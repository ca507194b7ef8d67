"""Merging: the student as trained, adapter included, as a plain timm state dict, verified on the spot.

Knows a student, an adapter and the tap between them; nothing of methods, teachers or the task.
"""
import copy
from contextlib import contextmanager
from typing import Dict, Iterator, Optional

import torch
import torch.nn as nn
from torch.func import functional_call

from .adapters import Adapter
from .taps import StudentTap, evaluation_mode, fold_affine

# Largest logit difference, relative to the logits' spread, that rounding explains.
MERGE_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@torch.no_grad()
def merged_tensors(
        student: nn.Module,
        adapter: Optional[Adapter],
        tap: Optional[StudentTap],
) -> Dict[str, torch.Tensor]:
    """Return the tensors of the student that merging changes, by name, in the student's own dtype.

    Args:
        student: Student as trained.
        adapter: Adapter at the tap, None where there is none.
        tap: Insertion point of the adapter.
    """
    if adapter is None or tap is None:
        return {}
    tensors = {**dict(student.named_parameters()), **dict(student.named_buffers())}
    changed = fold_affine(student, tensors, tap.consumers, adapter.affine())
    return {name: value.to(tensors[name].device, tensors[name].dtype) for name, value in changed.items()}


def merged_state_dict(
        student: nn.Module,
        adapter: Optional[Adapter],
        tap: Optional[StudentTap],
) -> Dict[str, torch.Tensor]:
    """Return the merged student's state dict: keys, shapes and dtypes of the plain architecture."""
    return {**student.state_dict(), **merged_tensors(student, adapter, tap)}


def merged_copy(student: nn.Module, adapter: Optional[Adapter], tap: Optional[StudentTap]) -> nn.Module:
    """Return a plain timm model with the merged weights, in eval mode; the student stays as it is."""
    model = copy.deepcopy(student)
    model.load_state_dict(merged_state_dict(student, adapter, tap))
    return model.eval()


def merge_error(adapted: nn.Module, student: nn.Module, merged: Dict[str, torch.Tensor], images: torch.Tensor) -> float:
    """Measure how far the merged student's logits are from those of the student as trained.

    Args:
        adapted: Module that gives the logits of the student as trained, adapter included.
        student: The student in it.
        merged: Tensors of the student that merging changes.
        images: Probe batch, [B, C, H, W].

    Returns:
        Largest logit difference over the logits' spread; nan where logits are not finite.
    """
    with evaluation_mode(adapted), full_precision(images.device):
        expected = _first(adapted(images)).double()
        actual = _first(functional_call(student, merged, (images,))).double()
    spread = (expected - expected.mean()).abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return ((actual - expected).abs().max() / spread).item()


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Run outside autocast and without TF32, whose rounding would hide a wrong merge."""
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


def _first(logits: torch.Tensor) -> torch.Tensor:
    return logits[0] if isinstance(logits, (tuple, list)) else logits
