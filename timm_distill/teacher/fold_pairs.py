"""Batch norms that fold into the layer before them: found by watching a model run, and measured one by one."""
import copy
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Set, Tuple

import torch
import torch.nn as nn

from ..features.inputs import CANNOT_RUN
from ..features.tracing import output_error
from ..utils._compat import TorchDispatchMode, tree_leaves, writes_to_arguments
from ..utils.affine import AffineMap, batch_norm_affine, scale_shift, to_float64
from ..utils.batch_norm import is_batch_norm

FOLD_TOLERANCE = 1e-9  # relative to each output's spread, in float64
_LINEAR_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
Read = Callable[[nn.Module, torch.Tensor], Sequence[torch.Tensor]]  # model, images -> all that is read of the model


@dataclass(frozen=True)
class Pair:
    """A layer and the batch norm that alone reads what it writes, by name."""
    layer: str
    norm: str


def fold_pair(layer: Any, norm: Any) -> nn.Module:
    """Fold a batch norm into the layer before it, in place; return what is left of the norm.

    Args:
        layer: Convolution or linear layer; it gains a bias where it has none.
        norm: Batch norm; what it has as children (timm's drop and act layers) runs after it.
    """
    scale, shift = batch_norm_affine(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
    bias = torch.zeros_like(shift) if layer.bias is None else to_float64(layer.bias)
    folded = scale_shift(AffineMap(to_float64(layer.weight).flatten(1), bias), scale, shift)
    weight = layer.weight
    layer.weight = _frozen(torch.empty_like(weight).copy_(folded.weight.view(weight.shape).to(weight.dtype)))
    layer.bias = _frozen(folded.bias.to(weight.dtype).to(weight.device))
    after = [child for child in norm.children() if not isinstance(child, nn.Identity)]
    return nn.Sequential(*after) if len(after) > 1 else after[0] if after else nn.Identity()


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def find_pairs(model: nn.Module, images: torch.Tensor, read: Read) -> List[Pair]:
    """Return the layers and the batch norms that fold into them, in the order in which they run.

    Args:
        model: Model in eval mode, in float64.
        images: Batch to watch it on, [B, C, H, W].
        read: Returns everything that is read of the model.
    """
    trace = _Trace(model)
    with trace.watch():
        model(images)
    taken = _layers_read(model, images, read)
    return [pair for pair in trace.pairs() if pair.layer not in taken]


def _layers_read(model: nn.Module, images: torch.Tensor, read: Read) -> Set[str]:
    """Return the layers whose own output, without a norm, is among what is read of the model."""
    outputs: Dict[int, Tuple[str, torch.Tensor]] = {}

    def _keep(name: str) -> Callable:
        return lambda module, args, output: outputs.update({_storage(output): (name, output)})

    handles = [
        module.register_forward_hook(_keep(name))
        for name, module in model.named_modules() if isinstance(module, _LINEAR_LAYERS)]
    try:
        return {outputs[_storage(tensor)][0] for tensor in read(model, images) if _storage(tensor) in outputs}
    finally:
        for handle in handles:
            handle.remove()


class _Trace(TorchDispatchMode):
    """Watches which batch norm reads what a layer wrote, and who else reads it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self._running: List[str] = []  # layers and norms that are being run, innermost last
        self._calls: Counter = Counter()
        self._inputs: Dict[str, torch.Tensor] = {}
        self._outputs: Dict[int, Tuple[str, torch.Tensor]] = {}  # by storage, which lives as long as this does
        self._readers: Dict[str, Set[str]] = defaultdict(set)
        self._candidates: List[Pair] = []

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Watch what runs in this context."""
        handles = []
        for name, module in self.model.named_modules():
            layer = isinstance(module, _LINEAR_LAYERS)
            if layer or is_batch_norm(module):
                handles += [
                    module.register_forward_pre_hook(self._enter(name, layer)),
                    module.register_forward_hook(self._leave(name, layer)),
                ]
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def pairs(self) -> List[Pair]:
        """Return the candidates that run once and whose norm is the only reader."""
        return [
            pair for pair in self._candidates
            if self._readers[pair.layer] == {pair.norm} and self._calls[pair.layer] == self._calls[pair.norm] == 1
        ]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Optional[Dict] = None) -> Any:
        result = func(*args, **(kwargs or {}))
        views = {_storage(t) for t in tree_leaves(result) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor) and _storage(tensor) in self._outputs:
                if writes_to_arguments(func) or _storage(tensor) not in views:  # a view alone reads nothing
                    self._readers[self._outputs[_storage(tensor)][0]].add(self._running[-1] if self._running else '')
        return result

    def _enter(self, name: str, layer: bool) -> Callable:
        def _hook(module: nn.Module, args: Tuple[Any, ...]) -> None:
            self._running.append(name)
            self._calls[name] += 1
            if layer:
                self._inputs[name] = args[0]
        return _hook

    def _leave(self, name: str, layer: bool) -> Callable:
        def _hook(module: nn.Module, args: Tuple[Any, ...], output: torch.Tensor) -> None:
            if not layer and _storage(args[0]) in self._outputs:
                producer, written = self._outputs[_storage(args[0])]
                if _folds(self.model.get_submodule(producer), self._inputs[producer], written, module, args[0], output):
                    self._candidates.append(Pair(producer, name))
            self._running.pop()
            if layer:
                self._outputs[_storage(output)] = name, output
        return _hook


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _folds(
        layer: nn.Module,
        input: torch.Tensor,
        written: torch.Tensor,
        norm: nn.Module,
        read: torch.Tensor,
        output: torch.Tensor,
) -> bool:
    """Measure whether a layer that a norm was folded into gives the norm's output.

    It does not where the layer does not use its weight as it is (standardised or parametrised weights), or where the
    norm reads other channels than the layer's.

    Args:
        layer: The layer.
        input: What it was given.
        written: What it returned.
        norm: The batch norm.
        read: What that was given, `written` or a view of it.
        output: What it returned.
    """
    folded = copy.deepcopy(layer)
    try:
        after = fold_pair(folded, norm)
        actual = folded.forward(input)
        if read.numel() != written.numel() or actual.stride() != written.stride():
            return False
        actual = after(actual.as_strided(read.size(), read.stride(), read.storage_offset()))
    except (*CANNOT_RUN, KeyError):
        return False
    return output_error([actual], [output]) <= FOLD_TOLERANCE
