"""An epoch of training for tests, its settings by their own names whichever group they belong to."""
from dataclasses import fields
from typing import Any, Dict, List

import torch
from timm.task import TrainingTask

from timm_distill.engine.evaluate import ComputeSpec
from timm_distill.engine.train import EpochHooks, LogSpec, UpdateSpec, train_one_epoch

CPU = torch.device('cpu')


def train_epoch(
        task: TrainingTask,
        batches: List[Any],
        optimizer: torch.optim.Optimizer,
        device: torch.device = CPU,
        epoch: int = 0,
        **options: Any,
) -> Dict[str, float]:
    """Run `train_one_epoch`.

    Args:
        options: More of its arguments, and fields of what it is given.
    """
    def group(cls: Any, **values: Any) -> Any:
        names = [field.name for field in fields(cls) if field.name in options]
        return cls(**values, **{name: options.pop(name) for name in names})

    compute, groups = group(ComputeSpec, device=device), dict(
        update=group(UpdateSpec), hooks=group(EpochHooks), log=group(LogSpec))
    return train_one_epoch(task, batches, optimizer, compute, epoch=epoch, **groups, **options)
