"""Private names of torch and timm in one place, each with the reason why no public name does.

Whatever a new version of either renames is mended here.
"""
import copy
from typing import Any, Dict, Iterable, Iterator, List, Optional, Sequence

import torch
import torch.nn as nn
from timm.models._features import feature_take_indices  # reads `indices` as timm's models do; exported for these alone
from torch.nn.modules.batchnorm import _BatchNorm as BatchNormBase  # public batch norms have no other base in common
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode  # hooks of modules do not see who reads which storage
from torch.utils._pytree import (  # arguments of operators are nested; the public pytree has no stable name
    tree_flatten,
    tree_leaves,
    tree_unflatten,
)
from torch.utils.data import DataLoader, Dataset

__all__ = [
    'BatchNormBase', 'TorchDispatchMode', 'add_class_to_shards', 'allow_retained_graphs', 'copy_module',
    'count_writes', 'draw_mixing', 'feature_take_indices', 'foreach_add_', 'foreach_copy_', 'foreach_div_',
    'foreach_mul_', 'foreach_sub', 'get_grad_scaler', 'get_learning_rates', 'get_model_kwargs', 'has_started',
    'ignore_in_ddp', 'list_non_persistent_buffers', 'masks_updates', 'replace_dataset', 'tree_flatten',
    'tree_leaves', 'tree_unflatten', 'writes_to_arguments',
]

# One kernel for a list of tensors, as torch's own optimizers run them; torch has no public one.
foreach_add_ = torch._foreach_add_
foreach_copy_ = torch._foreach_copy_
foreach_div_ = torch._foreach_div_
foreach_mul_ = torch._foreach_mul_
foreach_sub = torch._foreach_sub


def writes_to_arguments(operator: Any) -> bool:
    """Whether an operator that a dispatch mode sees changes its arguments: its schema alone tells."""
    return operator._schema.is_mutable


def allow_retained_graphs() -> None:
    """Let compiled graphs be differentiated more than once; to be called before the first of them runs.

    `torch.compile` has no option of its own for it.
    """
    from torch._functorch import config  # reads the environment, and belongs to compiled runs alone
    config.donated_buffer = False


def masks_updates(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer leaves out updates by its `found_inf` on the device, as torch's GradScaler asks."""
    return bool(getattr(optimizer, '_step_supports_amp_scaling', False))


def ignore_in_ddp(module: nn.Module, names: Sequence[str]) -> None:
    """Let DDP neither broadcast nor reduce parameters and buffers; torch names this way in its documentation of DDP."""
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)


def list_non_persistent_buffers(module: nn.Module) -> List[str]:
    """Return the names of a module's own buffers that are in no state dict.

    Comparing names with the state dict would gather the weights of a sharded model, which takes all processes.
    """
    return sorted(module._non_persistent_buffers_set)


def count_writes(tensor: torch.Tensor) -> int:
    """Return how often a tensor's storage was written to: only autograd's counter tells a change in place."""
    return tensor._version


def copy_module(module: nn.Module) -> nn.Module:
    """Return a module with the same tensors and children, and a list of children of its own.

    `copy.copy` shares the list, so that a child given to the copy would be the original's.
    """
    clone = copy.copy(module)
    clone.__dict__['_modules'] = dict(module._modules)
    return clone


def draw_mixing(mixup: Any, size: int) -> Any:
    """Return lambda and whether it is cutmix for each of some images, as timm's Mixup of mode 'elem' draws them."""
    return mixup._params_per_elem(size)


def has_started(loader: torch.utils.data.DataLoader) -> bool:
    """Whether a loader's persistent workers run: only its iterator tells."""
    return loader._iterator is not None


def get_grad_scaler(loss_scaler: Optional[Any]) -> Optional[torch.amp.GradScaler]:
    """Return torch's scaler in timm's, which has no public way to read the scale; None where there is none."""
    return getattr(loss_scaler, '_scaler', None)


def get_learning_rates(scheduler: Any, step: int) -> List[float]:
    """Return the rates that a timm schedule has at a step or epoch, without setting them as its public methods do."""
    return scheduler._get_lr(step)


def get_model_kwargs(model: nn.Module) -> Optional[Dict[str, Any]]:
    """Return the arguments that timm built a model with, None for a model that it did not build.

    timm's `get_model_args` tells the two apart no more, and leaves out the drop rates.
    """
    return getattr(model, '_model_args', None)


def replace_dataset(loader: DataLoader, dataset: Dataset) -> None:
    """Give a loader that was not iterated over another dataset of the same length.

    timm wraps datasets inside of the function that creates the loader, and torch lets nobody assign one later.
    """
    loader.__dict__['dataset'] = dataset


def add_class_to_shards(reader: Any) -> None:
    """Let timm's reader of a WebDataset take samples without `cls`, for which it has no option, as of class 0."""
    if not isinstance(reader.__dict__.get('_lazy_init'), _StartWithClass):
        reader._lazy_init = _StartWithClass(reader)


class _StartWithClass:
    """Makes the pipeline of a WebDataset reader, which it does where it is first read: in a loader's process."""

    def __init__(self, reader: Any):
        self.reader = reader

    def __call__(self) -> None:
        type(self.reader)._lazy_init(self.reader)
        self.reader.ds.pipeline.insert(-2, _add_class)  # before samples are decoded and renamed


def _add_class(samples: Iterable[Dict[str, Any]]) -> Iterator[Dict[str, Any]]:
    for sample in samples:
        yield {**sample, 'cls': b'0'}
