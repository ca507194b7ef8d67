"""A task of few lines whose merge can be made to fail, and a saver of its checkpoints."""
import argparse
from typing import Any, Dict, Tuple

import timm
import torch
import torch.nn as nn
from timm.task import ClassificationTask

from timm_distill.checkpoint.saver import DistillCheckpointSaver
from timm_distill.errors import MergeError


class StubTask(ClassificationTask):
    """Has state of its own, and merges that can be made to fail."""

    def __init__(self, model: nn.Module):
        super().__init__(model, verbose=False)
        self.adapter = torch.zeros(3)
        self.fails_merging = False

    def get_task_state(self, module: Any = None, ema: bool = False) -> Dict[str, Any]:
        return {'adapter': self.adapter + (10 if ema else 0)}

    def load_task_state(self, state: Any, strict: bool = True, module: Any = None, ema: bool = False) -> None:
        if state is not None and not ema:
            self.adapter = state['adapter']

    def get_checkpoint_state(self, ema: bool = False, **kwargs: Any) -> Dict[str, Any]:
        torch.rand(3)  # as a check on random images may
        state = super().get_checkpoint_state(ema=ema, **kwargs)
        if self.fails_merging:
            raise MergeError('Merged logits differ by 3', state)
        return state


def create_task(arch: str = 'test_resnet', seed: int = 0) -> Tuple[StubTask, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    task = StubTask(timm.create_model(arch, num_classes=4))
    return task, torch.optim.AdamW(task.parameters(), lr=1e-3)


def train_step(task: StubTask, optimizer: torch.optim.Optimizer) -> None:
    task.get_trainable_module().train()
    optimizer.zero_grad()
    task(torch.randn(4, 3, 32, 32), torch.randint(4, (4,)))['loss'].backward()
    optimizer.step()
    task.update_ema(step=1)


def create_saver(folder: Any, task: StubTask, optimizer: torch.optim.Optimizer, **kwargs: Any) -> Any:
    args = argparse.Namespace(model='test_resnet', lr=1e-3, model_kwargs={})
    return DistillCheckpointSaver(
        task.get_trainable_module(), optimizer, task=task, args=args,
        checkpoint_dir=str(folder), recovery_dir=str(folder), **kwargs)


def save_epochs(folder: Any, epochs: int = 3) -> Any:
    task, optimizer = create_task()
    saver = create_saver(folder, task, optimizer)
    for epoch in range(epochs):
        saver.save_checkpoint(epoch, metric=float(epoch))
    return saver
