"""Merging: the student as trained, adapters included, as a plain timm state dict, verified on the spot.

Knows a student, its adapters and the tap between them; nothing of methods, teachers or the task.
"""
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Callable, Dict, Iterable, Iterator, Optional, Set, Tuple

import torch
import torch.nn as nn
from timm.layers import SplitBatchNorm2d

from ..features.inputs import evaluation_mode
from ..utils._compat import remove_forward_pre_hook
from ..utils.precision import full_float32
from .folding import fold_affine, named_tensors
from .tap import StudentTap

# Largest logit difference, relative to the logits' spread, that rounding explains.
MERGE_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_INSIDE = '_adapted_input'


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
        expected = _first(adapted(images)).double()
        actual = _first(plain(images)).double()
    spread = (expected - expected.mean()).abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return ((actual - expected).abs().max() / spread).item()


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Run outside autocast and without TF32, whose rounding would hide a wrong merge."""
    with full_float32(), torch.autocast(device.type, enabled=False):
        yield


@dataclass
class _Inside:
    """An adapter in front of a classifier, what it matches with in a forward and what runs behind it, and its loss."""
    adapter: nn.Module
    target: Optional[torch.Tensor] = None
    behind: Optional[Callable[[torch.Tensor], torch.Tensor]] = None
    loss: Optional[torch.Tensor] = None


def adapt_input(model: nn.Module, name: str, adapter: nn.Module) -> None:
    """Let a classifier be given what `adapter`, which returns an `AdapterOutput`, makes of its input.

    For models whose own forward alone reaches that input. The layer keeps its class and its forward. The adapter is
    kept outside the module tree: the names of the student's tensors stay those of the architecture. The hook finds the
    adapter through the layer that it is called for, so that a deep copy of student and adapter together runs its own.
    """
    layer = model.get_submodule(name)
    layer.__dict__[_INSIDE] = _Inside(adapter)
    layer.register_forward_pre_hook(_run_adapter)


def _run_adapter(layer: nn.Module, args: Tuple[torch.Tensor, ...]) -> Tuple[torch.Tensor, ...]:
    inside = layer.__dict__[_INSIDE]
    adapted = inside.adapter(args[0], inside.target)
    inside.loss = adapted.loss
    output = adapted.output if inside.behind is None else inside.behind(adapted.output)
    return (output, *args[1:])


def match_inside(
        layer: nn.Module,
        target: Optional[torch.Tensor],
        behind: Optional[Callable[[torch.Tensor], torch.Tensor]] = None,
) -> None:
    """Set what the adapter in front of a layer matches with, and what runs between the two.

    Args:
        layer: The layer.
        target: The teacher's feature, [B, Ct, H, W].
        behind: Function of the adapter's output.
    """
    inside = layer.__dict__[_INSIDE]
    inside.target, inside.behind = target, behind


def pop_inside_loss(layer: nn.Module) -> Optional[torch.Tensor]:
    """Return the loss of the last forward; nothing of a batch stays behind, so that the module can be copied."""
    inside = layer.__dict__[_INSIDE]
    loss, inside.loss, inside.target, inside.behind = inside.loss, None, None, None
    return loss


def plain_input(model: nn.Module, name: str) -> None:
    """Undo `adapt_input`."""
    layer = model.get_submodule(name)
    layer.__dict__.pop(_INSIDE, None)
    remove_forward_pre_hook(layer, _run_adapter)


def _first(logits: torch.Tensor) -> torch.Tensor:
    return logits[0] if isinstance(logits, (tuple, list)) else logits
