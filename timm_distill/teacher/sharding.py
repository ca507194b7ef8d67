"""A frozen model in several processes: the same weights in all, or a share in each by torch's `fully_shard`.

A model that does not fit a device is sharded: each process keeps its share of the parameters and gathers those of one
part of the model at a time, when that part runs. Parts are found by size, not by name.
"""
import logging
import os
from typing import Any, List, Sequence

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..errors import UsageError
from ..features.classifier import classifier_linear, last_linear
from ..features.inputs import CANNOT_RUN, random_images
from ..features.reader import ModelReader

_logger = logging.getLogger(__name__)

_LARGEST, _SMALLEST = 1 / 8, 1 / 200  # of the model's parameters: what is gathered at once, and what is worth it


def find_parts(model: nn.Module, whole: List[nn.Module]) -> List[nn.Module]:
    """Return the largest submodules that hold a modest share of the parameters.

    Args:
        model: What to take apart.
        whole: Modules that stay with the model itself, and so do those around them: they are called one by one.
    """
    total = count_parameters(model)
    kept = {id(module) for module in whole}

    def _collect(module: nn.Module) -> List[nn.Module]:
        size = count_parameters(module)
        holds_kept = any(id(m) in kept for m in module.modules())
        if size < _SMALLEST * total or id(module) in kept:
            return []
        children = list(module.children())
        if not holds_kept and type(module) not in (nn.ModuleList, nn.ModuleDict) and (
                size <= _LARGEST * total or not children):
            return [module]
        return [part for child in children for part in _collect(child)]

    return _collect(model)


def count_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def count_local_parameters(module: nn.Module) -> int:
    """Return how many parameters of a sharded module this process holds."""
    return sum(_local(p).numel() for p in module.parameters())


def _local(parameter: Any) -> torch.Tensor:
    return parameter.to_local() if hasattr(parameter, 'to_local') else parameter


def create_mesh(device: torch.device) -> DeviceMesh:
    """Return the mesh to shard over: the processes of a node, so that parts are not gathered through the network."""
    world_size = dist.get_world_size()
    per_node = int(os.environ.get('LOCAL_WORLD_SIZE', world_size))
    if per_node == world_size or world_size % per_node:
        return init_device_mesh(device.type, (world_size,))
    return init_device_mesh(device.type, (world_size // per_node, per_node), mesh_dim_names=('replicate', 'shard'))


@torch.no_grad()
def shard_reader(reader: ModelReader, input_size: Sequence[int], device: torch.device) -> None:
    """Spread the parameters of a frozen model over the processes, in place, and move it to the device.

    Args:
        reader: Reads the model, whatever is read of it.
        input_size: What the model is fed, (channels, height, width).
        device: Where processes compute.

    Raises:
        UsageError: If the sharded model does not give what it gave before.
    """
    name = type(reader.model).__name__
    if not dist.is_initialized():
        raise UsageError('--teacher-fsdp spreads the teacher over processes: start them with torchrun.')
    for parameter in reader.parameters():
        parameter.data = parameter.data.contiguous()  # shards know no other memory order
    images = random_images(reader.model, input_size)
    expected = reader(images, reader.spec.outputs).tensors()
    classifier = classifier_linear(reader.model) or last_linear(reader.model, images)
    parts = find_parts(reader.model, [] if classifier is None else [classifier])
    shard(reader, parts, device)
    try:
        actual = reader(images.to(device), reader.spec.outputs).tensors()
        wrong = max(((a.cpu() - e).abs().max() / e.abs().max()).item() for a, e in zip(actual, expected))
    except CANNOT_RUN as e:
        raise UsageError(
            f'--teacher-fsdp: the teacher {name} does not run in shards: '
            f'{" ".join(str(e).split())[:200]}. Leave it out.') from e
    if not wrong <= 1e-2:  # another device rounds otherwise
        raise UsageError(
            f'--teacher-fsdp: the teacher {name} gives other outputs in shards '
            f'(relative difference {wrong:.2g}). Leave it out.')
    _logger.info(
        f'Teacher: {count_local_parameters(reader.model):,} of its parameters on this process, gathered in '
        f'{len(parts)} parts.')


def shard(root: nn.Module, parts: List[nn.Module], device: torch.device) -> None:
    """Shard a module in place, its parts each for themselves, and move it to the device.

    Args:
        root: Runs the model; what is in no part is gathered at its first forward and stays.
        parts: Run through their own forward alone.
        device: Where processes compute; parts move there one after the other.
    """
    from torch.distributed.fsdp import fully_shard
    mesh = create_mesh(device)
    for part in parts:
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    fully_shard(root, mesh=mesh, reshard_after_forward=False)
