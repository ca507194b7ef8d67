"""Nothing in a training step that the step does not need: no wait for the device, no second forward, nothing kept."""
import copy
from collections import Counter
from functools import cache
from typing import Any, Dict, List, Tuple

import pytest
import timm
import torch
import torch.nn as nn
from timm.optim import create_optimizer_v2
from torch.profiler import ProfilerActivity, profile
from training import train_epoch

from timm_distill import DistillTask, Teacher, create_distill_task, list_methods
from timm_distill.methods._composition import methods_of

SIZE = (3, 32, 32)
CLASSES = 5
STEPS = 4
# what makes the CPU wait for a GPU's values or for the size of its result
WAITING = (
    'aten::item', 'aten::_local_scalar_dense', 'aten::is_nonzero', 'aten::equal', 'aten::nonzero',
    'aten::masked_select', 'aten::_unique2', 'aten::repeat_interleave')
STUDENT: Tuple[str, Dict[str, Any]] = ('test_efficientnet', {})
TOKEN_STUDENT: Tuple[str, Dict[str, Any]] = (
    'deit_tiny_distilled_patch16_224', dict(img_size=32, embed_dim=32, depth=2, num_heads=2))
DECOMPOSING = {'kdsvd'}  # torch looks at whether an eigendecomposition converged, which waits
NAMES = ['sdd:nkd' if name == 'sdd' else name for name in list_methods()]
each_method = pytest.mark.parametrize('method', NAMES)
each_method_that_need_not_wait = pytest.mark.parametrize('method', sorted({*NAMES} - DECOMPOSING))


@cache
def _teacher(device: str, **options: Any) -> Teacher:
    return Teacher(timm.create_model('test_resnet', num_classes=CLASSES, **options), SIZE, device=device)


@cache
def _task(method: str, device: str) -> DistillTask:
    torch.manual_seed(0)
    classes = methods_of(method).values()
    name, options = TOKEN_STUDENT if any('token_logits' in cls.student_outputs for cls in classes) else STUDENT
    grid = {'output_stride': 8} if ':' in method else {}  # regions of a map of 4 x 4
    student = timm.create_model(name, num_classes=CLASSES, **options, **grid)
    task = create_distill_task(
        student, _teacher(device, **grid), kd=method, sample_labels=torch.arange(12) % CLASSES, input_size=SIZE,
        device=device, verbose=False)
    if task.class_means_shape is not None:
        task.set_class_means(torch.randn(task.class_means_shape))
    if task.needs_target_statistics:
        task.standardize_targets([(torch.randn(16, *SIZE, device=device), torch.zeros(16))])
    return task


def create_task(method: str, device: str = 'cpu') -> DistillTask:
    """Return a task of its own for a test."""
    return copy.deepcopy(_task(method, device))


def create_batches(device: str = 'cpu') -> List[Tuple[torch.Tensor, torch.Tensor]]:
    images, target = torch.randn(STEPS, 4, *SIZE, device=device), torch.arange(4, device=device)
    return [(image, target) for image in images]


def train(task: DistillTask, batches: List[Any], epoch: int = 0) -> None:
    if task.needs_indices:
        batches = [(images, torch.stack([target, target], 1)) for images, target in batches]
    optimizer = create_optimizer_v2(task.trainable_module, 'sgd', lr=1e-3)
    device = torch.device(batches[0][0].device)
    train_epoch(task, batches, optimizer, epoch=epoch, device=device, clip_grad=1., log_interval=100)


def count_operators(task: DistillTask) -> Counter:
    """Return how often each operator ran in an epoch, the one before which nothing is counted."""
    batches = create_batches()
    train(task, batches)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        train(task, batches, epoch=1)
    # names alone: averages of times take longer than the steps
    return Counter(event.name() for event in profiler.profiler.kineto_results.events())


@each_method_that_need_not_wait
def test_no_step_waits_for_the_device(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # on the CPU, where that costs nothing, the loop looks at each update
    monkeypatch.setattr('timm_distill.engine.nonfinite._on_cpu', lambda tensors: False)
    task = create_task(method)
    task.setup_ema()
    counts = count_operators(task)
    assert counts['aten::cross_entropy_loss'] >= STEPS  # the steps are in the profile
    assert {name: counts[name] for name in WAITING if counts[name]} == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@each_method_that_need_not_wait
def test_no_step_waits_for_the_gpu(method: str) -> None:
    task, batches = create_task(method, 'cuda'), create_batches('cuda')
    train(task, batches)
    optimizer = create_optimizer_v2(task.trainable_module, 'sgd', lr=1e-3)
    torch.cuda.set_sync_debug_mode('error')
    try:
        for input, target in batches:
            task(input, target)['loss'].backward()
            optimizer.step()
            optimizer.zero_grad()
    finally:
        torch.cuda.set_sync_debug_mode('default')


@each_method
def test_student_and_teacher_run_once_in_a_step(method: str) -> None:
    task = create_task(method)
    assert task.teacher is not None
    calls: Counter = Counter()

    def _count(who: str, model: nn.Module) -> None:
        stem = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
        stem.register_forward_hook(lambda *_: calls.update([who]))

    _count('student', task.module.student)
    _count('teacher', task.teacher.model)
    train(task, create_batches())
    assert calls == {'student': STEPS, 'teacher': STEPS}


@each_method
def test_gradients_are_freed_after_an_update(method: str) -> None:
    task = create_task(method)
    train(task, create_batches())
    assert all(p.grad is None for p in task.parameters())


def test_the_probe_of_the_merge_is_copied_once_in_an_epoch() -> None:
    task = create_task('norm')
    first, second, *_ = create_batches()
    task.set_epoch(0)
    task(*first)
    probe = task._merged.probe
    task(*second)
    assert task._merged.probe is probe
