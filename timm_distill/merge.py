"""Merging: the student as trained, adapters included, as a plain timm state dict, verified on the spot.

Knows a student, its adapters and the tap between them; nothing of methods, teachers or the task.
"""
import copy
from contextlib import contextmanager
from typing import Dict, Iterable, Iterator, List, Optional, Set

import torch
import torch.nn as nn
from timm.layers import SplitBatchNorm2d
from torch.func import functional_call

from .folding import fold_affine
from .precision import full_float32
from .probing import evaluation_mode
from .taps import StudentTap

# Largest logit difference, relative to the logits' spread, that rounding explains.
MERGE_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@torch.no_grad()
def merged_tensors(
        student: nn.Module,
        adapters: Iterable[nn.Module],
        tap: Optional[StudentTap],
) -> Dict[str, torch.Tensor]:
    """Return the tensors of the student that merging changes, by name, in the student's own dtype.

    Args:
        student: Student as trained.
        adapters: One for each site of the tap.
        tap: Insertion point, None where there is none.
    """
    tensors = {**dict(student.named_parameters()), **dict(student.named_buffers())}
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
    merged = {**student.state_dict(), **merged_tensors(student, adapters, tap)}
    return {name: value for name, value in merged.items() if name not in split}


def split_batch_norm_tensors(model: nn.Module) -> Set[str]:
    """Return the names of what `--split-bn` adds to a model: batch norms that only further views train."""
    prefixes = [f'{name}.aux_bn' if name else 'aux_bn' for name, m in model.named_modules()
                if isinstance(m, SplitBatchNorm2d)]
    return {name for name in model.state_dict() if prefixes and name.startswith(tuple(prefixes))}


def merged_copy(student: nn.Module, adapters: Iterable[nn.Module], tap: Optional[StudentTap]) -> nn.Module:
    """Return a plain timm model with the merged weights, in eval mode; the student stays as it is."""
    model = copy.deepcopy(student)
    for module in model.modules():
        if isinstance(module, SplitBatchNorm2d):
            module.aux_bn = nn.ModuleList()  # not used in eval mode
    if tap is not None and tap.inside:
        plain_linear(model, tap.inside)
    model.load_state_dict(merged_state_dict(student, adapters, tap))
    return model.eval()


def merge_error(adapted: nn.Module, student: nn.Module, merged: Dict[str, torch.Tensor], images: torch.Tensor) -> float:
    """Measure how far the merged student's logits are from those of the student as trained.

    Args:
        adapted: Module that gives the logits of the student as trained, adapters included.
        student: The plain student.
        merged: Tensors of the student that merging changes.
        images: Probe batch, [B, C, H, W].

    Returns:
        Largest logit difference over the logits' spread; nan where logits are not finite.
    """
    with evaluation_mode(adapted), evaluation_mode(student), full_precision(images.device):
        expected = _first(adapted(images)).double()
        actual = _first(functional_call(student, merged, (images,))).double()
    spread = (expected - expected.mean()).abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return ((actual - expected).abs().max() / spread).item()


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Run outside autocast and without TF32, whose rounding would hide a wrong merge."""
    with full_float32(), torch.autocast(device.type, enabled=False):
        yield


class AdaptedLinear(nn.Linear):
    """A classifier that runs an adapter on its input, for models whose own forward alone reaches that input.

    The adapter is kept outside the module tree: the names of the student's tensors stay those of the architecture, and
    a deep copy of student and adapter together still belongs together.
    """
    _adapter: List[nn.Module]
    _target: Optional[torch.Tensor] = None
    _loss: Optional[torch.Tensor] = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        adapted = self._adapter[0](input, self._target)
        self._loss = adapted.loss
        return super().forward(adapted.output)

    def match_with(self, target: Optional[torch.Tensor]) -> None:
        """Set what the adapter matches with in the next forward: the teacher's feature, [B, Ct, H, W]."""
        self._target = target

    def pop_loss(self) -> Optional[torch.Tensor]:
        """Return the loss of the last forward; nothing of a batch stays behind, so that the module can be copied."""
        loss, self._loss, self._target = self._loss, None, None
        return loss


def adapt_linear(model: nn.Module, name: str, adapter: nn.Module) -> None:
    """Let the linear layer `name` run `adapter`, which returns an `AdapterOutput`, on its input."""
    linear = model.get_submodule(name)
    linear.__class__ = AdaptedLinear
    linear.__dict__['_adapter'] = [adapter]


def plain_linear(model: nn.Module, name: str) -> None:
    """Undo `adapt_linear`."""
    linear = model.get_submodule(name)
    if isinstance(linear, AdaptedLinear):
        linear.__class__ = nn.Linear  # type: ignore[assignment]
        for key in ('_adapter', '_target', '_loss'):
            linear.__dict__.pop(key, None)


def _first(logits: torch.Tensor) -> torch.Tensor:
    return logits[0] if isinstance(logits, (tuple, list)) else logits
