"""Replayed modules: copies that give recorded outputs instead of computing, and the calls that they are recorded of."""
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn

from ..utils._compat import copy_module, count_writes, tree_leaves

_NO_HOOKS: Dict[str, Any] = {'_forward_hooks': {}, '_forward_pre_hooks': {}}


@dataclass(frozen=True)
class TensorTemplate:
    """Template of a tensor that a skipped module gives.

    Attributes:
        shape: Its shape for a batch of one.
        batched: Which dimensions grow with the batch.
        dtype: Its dtype.
        value: What it is for whatever images, None where it depends on them: then zeros, which take no memory.
    """
    shape: Tuple[int, ...]
    batched: Tuple[bool, ...]
    dtype: torch.dtype
    value: Optional[torch.Tensor] = None

    def create(self, batch_size: int, like: torch.Tensor) -> torch.Tensor:
        """Return the tensor for a batch, of a dtype and device like those of another."""
        dtype = like.dtype if self.dtype.is_floating_point else self.dtype
        shape = [size * batch_size if batched else size for size, batched in zip(self.shape, self.batched)]
        if self.value is None:
            return torch.zeros((), dtype=dtype, device=like.device).expand(shape)
        return self.value.to(like.device, dtype).expand(shape)


@dataclass(frozen=True)
class Call:
    """One run of a module in a forward pass.

    Attributes:
        name: The module's name in the model.
        ancestors: Which calls it is inside of, by their index; outermost first.
        begin: When it began, by the number of events before it.
        end: When it ended.
        output: What it returned.
        versions: How often each tensor of it had been written to by then.
    """
    name: str
    ancestors: Tuple[int, ...]
    begin: int
    end: int
    output: Any = field(repr=False)
    versions: Tuple[int, ...]


def trace_calls(model: nn.Module, run: Callable[[], Any]) -> Tuple[List[Call], Any]:
    """Return the calls of modules in a forward pass, in the order in which they began, and what it returned."""
    begun: List[List[Any]] = []  # name, ancestors, begin, end, output
    running: List[int] = []
    clock = 0

    def _enter(name: str) -> Any:
        def _hook(module: nn.Module, args: Any) -> None:
            nonlocal clock
            begun.append([name, tuple(running), clock, -1, None, ()])
            running.append(len(begun) - 1)
            clock += 1
        return _hook

    def _leave(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal clock
        versions = tuple(count_writes(leaf) for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor))
        begun[running.pop()][3:] = [clock, output, versions]
        clock += 1

    handles = []
    for name, module in model.named_modules():
        if name:
            handles += [module.register_forward_pre_hook(_enter(name)), module.register_forward_hook(_leave)]
    try:
        output = run()
    finally:
        for handle in handles:
            handle.remove()
    return [Call(*call) for call in begun], output


def create_template(value: Any, other: Any) -> Any:
    """Return what is given in place of a leaf, from its values for a batch of two and for other images, three."""
    if not isinstance(value, torch.Tensor):
        return value
    batched = tuple(a * 3 == b * 2 and a != b for a, b in zip(value.shape, other.shape))
    if any(a != b and not grows for a, b, grows in zip(value.shape, other.shape, batched)):
        raise ValueError(f'a tensor of shape {list(value.shape)} before the stage does not grow with the batch')
    shape = tuple(size // 2 if grows else size for size, grows in zip(value.shape, batched))
    single = value[tuple(slice(0, size) for size in shape)]
    constant = torch.equal(single, other[tuple(slice(0, size) for size in shape)])
    is_expandable = all(size == 1 for size, grows in zip(shape, batched) if grows)
    return TensorTemplate(shape, batched, value.dtype, single.clone() if constant and is_expandable else None)


def replace_modules(model: nn.Module, outputs: Dict[str, List[Any]]) -> Any:
    """Return a model of the same modules, except for those that give outputs without computing them."""
    clones: Dict[str, nn.Module] = {'': copy_module(model)}

    def _clone(name: str) -> nn.Module:
        if name not in clones:
            parent, _, child = name.rpartition('.')
            clones[name] = copy_module(model.get_submodule(name))
            _clone(parent).register_module(child, clones[name])
        return clones[name]

    for name, given in outputs.items():
        module = _clone(name)
        module.__dict__.update(forward=_Replay(given, module.forward), **_NO_HOOKS)  # what did not run is not seen
    return clones['']


class _Replay:
    """Gives outputs one after the other, then computes."""

    def __init__(self, outputs: Sequence[Any], forward: Any):
        self.outputs: Iterator[Any] = iter(outputs)
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for output in self.outputs:
            return output
        return self.forward(*args, **kwargs)
