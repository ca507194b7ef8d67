"""The task in the hands of libraries that save and restore a module whole (Accelerate, Lightning): plain loops."""
import copy
from pathlib import Path
from typing import Any, Dict, Tuple

import pytest
import timm
import torch
import torch.nn as nn
from timm.utils import ModelEmaV3

from timm_distill import DistillTask, create_distill_task

SIZE = (3, 32, 32)
CLASSES = 5


def create_task(kd: str = 'norm+srrl', seed: int = 0, teacher_seed: int = 7) -> DistillTask:
    torch.manual_seed(teacher_seed)
    teacher = timm.create_model('test_convnext', num_classes=CLASSES)
    torch.manual_seed(seed)
    student = timm.create_model('test_resnet', num_classes=CLASSES)
    return create_distill_task(
        student, teacher, kd=kd,
        kd_kwargs={'norm.segments': 2, 'norm.init': 'official'} if 'norm' in kd else None, input_size=SIZE,
        verbose=False).train()


class LightningLike(nn.Module):
    """A module around the task, as a LightningModule is."""

    def __init__(self, task: DistillTask):
        super().__init__()
        self.task = task

    def forward(self, images: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.task(images, target)['loss']


def create_batch(step: int) -> Tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(4, *SIZE, generator=generator), torch.randint(CLASSES, (4,), generator=generator)


def create_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01, momentum=0.9)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        loss = model(*create_batch(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def teacher_of(model: nn.Module) -> Dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.task.teacher.state_dict().items()}


def assert_same(actual: Dict[str, Any], expected: Dict[str, Any]) -> None:
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def with_teacher(model: nn.Module) -> Dict[str, torch.Tensor]:
    """A state dict as it was when tasks still saved their teachers."""
    return {**model.state_dict(), **model.task.teacher.state_dict(prefix='task.teacher.')}


def test_a_plain_loop_that_saves_a_module_whole_saves_no_teacher_and_goes_on_bit_identical(tmp_path: Path) -> None:
    whole, stopped = (LightningLike(create_task()) for _ in range(2))
    optimizer = create_optimizer(whole)
    train(whole, optimizer, 0, 4)
    optimizer = create_optimizer(stopped)
    train(stopped, optimizer, 0, 2)
    torch.save({'state_dict': stopped.state_dict(), 'optimizer': optimizer.state_dict()}, tmp_path / 'last.ckpt')
    saved = torch.load(tmp_path / 'last.ckpt', weights_only=True)
    assert not any('teacher' in name for name in saved['state_dict'])
    resumed = LightningLike(create_task(seed=3))
    teacher = teacher_of(resumed)
    resumed.load_state_dict(saved['state_dict'], strict=True)
    assert_same(teacher_of(resumed), teacher)
    optimizer = create_optimizer(resumed)
    optimizer.load_state_dict(saved['optimizer'])
    train(resumed, optimizer, 2, 4)
    assert_same(resumed.state_dict(), whole.state_dict())


@pytest.mark.parametrize('assign', [False, True])
def test_a_state_dict_with_a_teacher_loads_strictly_and_leaves_the_teacher_as_it_is(assign: bool) -> None:
    source, model = LightningLike(create_task()), LightningLike(create_task(seed=3, teacher_seed=8))
    teacher, state = teacher_of(model), with_teacher(source)
    assert any('teacher' in name for name in state)
    names = set(state)
    model.load_state_dict(state, strict=True, assign=assign)
    assert_same(teacher_of(model), teacher)
    assert_same(model.state_dict(), source.state_dict())
    assert set(state) == names and not any(p.requires_grad for p in model.task.teacher.parameters())


def test_what_is_missing_or_too_much_is_still_an_error() -> None:
    task = create_task()
    state = task.state_dict()
    name = next(iter(state))
    with pytest.raises(RuntimeError, match='Missing'):
        task.load_state_dict({key: value for key, value in state.items() if key != name})
    with pytest.raises(RuntimeError, match='Unexpected'):
        task.load_state_dict({**state, 'other': torch.zeros(1)})


@pytest.mark.parametrize('kd', ['norm', 'srrl', 'kd', 'none'])
def test_state_dict_holds_what_the_trainable_module_holds(kd: str) -> None:
    task = create_task(kd)
    assert set(task.state_dict()) == {f'trainable_module.{name}' for name in task.trainable_module.state_dict()}
    assert set(task.state_dict(prefix='a.')) == {f'a.{name}' for name in task.state_dict()}


def test_copies_and_averages_of_the_whole_task_keep_a_teacher_and_save_none() -> None:
    model = LightningLike(create_task())
    ema = ModelEmaV3(model, decay=0.5)
    train(model, create_optimizer(model), 0, 2)
    ema.update(model)
    clone = copy.deepcopy(model)
    for other in (clone, ema.module):
        assert_same(teacher_of(other), teacher_of(model))
        assert set(other.state_dict()) == set(model.state_dict())
        other.load_state_dict(model.state_dict())
        assert_same(other.state_dict(), model.state_dict())
        assert torch.isfinite(other(*create_batch(9)))
    assert clone.task.teacher is not model.task.teacher


def test_ema_of_the_task_itself_is_in_its_state_dict_without_a_teacher() -> None:
    task, other = create_task(), create_task(seed=3)
    for each in (task, other):
        each.setup_ema(decay=0.5)
    assert any('ema' in name for name in task.state_dict())
    other.load_state_dict(task.state_dict())
    assert_same(other.state_dict(), task.state_dict())
