"""Gradient norms of single terms: the right numbers, and no influence on training."""
import copy
import logging
from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest
import timm
import torch
import torch._functorch.config
import torch.nn.functional as F
from ranks import run_ranks
from timm.task import TrainingTask
from timm.utils import NativeScaler
from training import train_epoch

from timm_distill import DistillTask, create_distill_task

CPU = torch.device('cpu')
SIZE = (3, 32, 32)
CLASSES = 5


def create_task(kd: str = 'norm+kd', student: str = 'test_resnet', dtype: torch.dtype = torch.float64) -> DistillTask:
    torch.manual_seed(0)
    kwargs = {'img_size': 32, 'depth': 2} if 'vit' in student else {'drop_rate': 0.1, 'drop_path_rate': 0.1}
    model = timm.create_model(student, num_classes=CLASSES, **kwargs)
    teacher = timm.create_model('test_convnext', num_classes=CLASSES, depths=(1, 1, 1, 1))
    return create_distill_task(
        model, teacher, kd=kd, kd_weight={'kd': 0.5} if 'kd' in kd else None, input_size=SIZE,
        dtype=dtype, verbose=False).train()


def create_batches(count: int = 4, dtype: torch.dtype = torch.float64) -> List[Tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, *SIZE, generator=generator).to(dtype), torch.arange(4)) for _ in range(count)]


def train(task: Any, batches: List[Any], lr: float = 0.05, **kwargs: Any) -> Dict[str, float]:
    torch.manual_seed(2)
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=lr, momentum=0.9)
    return train_epoch(task, batches, optimizer, epoch=0, device=CPU, **kwargs)


def expected_norms(task: DistillTask, batches: List[Any]) -> Dict[str, float]:
    """Norms of the terms' gradients over a joint update of batches, each by a backward pass of its own."""
    norms = {}
    for name in ('task', 'norm', 'kd'):
        clone = copy.deepcopy(task)
        for images, target in batches:
            terms = clone.weighted_terms(clone(images, target))
            (terms[name] / len(batches)).backward()
        gradients = [p.grad.flatten() for p in clone.student.parameters() if p.grad is not None]
        norms[f'grad_norm_{name}'] = torch.cat(gradients).norm().item()
    return norms


def norms_of(metrics: Dict[str, float]) -> Dict[str, float]:
    return {name: value for name, value in metrics.items() if name.startswith('grad_norm_')}


@pytest.mark.parametrize('checkpointing', [False, True])
@pytest.mark.parametrize('accumulation', [1, 2])
def test_training_is_bit_identical_with_and_without(checkpointing: bool, accumulation: int) -> None:
    states = []
    for interval in (0, 1):
        task = create_task(dtype=torch.float32)
        task.student.set_grad_checkpointing(checkpointing)
        train(task, create_batches(dtype=torch.float32), log_grad_norm=interval, grad_accum_steps=accumulation)
        states.append({**task.module.state_dict(), 'random': torch.rand(3)})
    assert all(torch.equal(states[1][name], tensor) for name, tensor in states[0].items())


@pytest.mark.parametrize('accumulation', [1, 2])
def test_norms_are_those_of_each_weighted_term_on_the_student(accumulation: int) -> None:
    task, batches = create_task(student='test_vit'), create_batches(accumulation)
    expected = expected_norms(task, batches)
    actual = norms_of(train(task, batches, log_grad_norm=1, grad_accum_steps=accumulation))
    assert actual == pytest.approx(expected, rel=1e-9)
    assert len(set(actual.values())) == 3


def test_loss_scaler_is_taken_out_again() -> None:
    task, batches = create_task(student='test_vit'), create_batches(1)
    expected = expected_norms(task, batches)
    scaler = NativeScaler(device='cpu')
    assert scaler._scaler.get_scale() > 1
    actual = norms_of(train(task, batches, log_grad_norm=1, loss_scaler=scaler))
    assert actual == pytest.approx(expected, rel=1e-9)


def test_schedule_is_part_of_the_weight() -> None:
    task, batches = create_task(student='test_vit'), create_batches(1)
    task.schedules['kd'] = lambda epoch: 0.
    assert norms_of(train(task, batches, log_grad_norm=1))['grad_norm_kd'] == 0


@pytest.mark.parametrize('interval, measured', [(1, 5), (2, 3), (100, 1)])
def test_every_nth_update_is_measured_from_the_first_on(interval: int, measured: int) -> None:
    task = create_task('feature')
    calls = []
    original = task.weighted_terms
    task.weighted_terms = lambda result: calls.append(1) or original(result)  # type: ignore[method-assign]
    train(task, create_batches(5), log_grad_norm=interval)
    assert len(calls) == measured


def test_log_lines_name_each_norm(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        train(create_task(), create_batches(1), log_grad_norm=1)
    (line,) = [record.message for record in caplog.records if record.message.startswith('Train:')]
    assert all(f'grad_norm_{name}: ' in line for name in ('task', 'norm', 'kd'))


def test_student_alone_has_the_norm_of_its_loss() -> None:
    task = create_task('none', 'test_vit')
    (images, target), = batches = create_batches(1)
    clone = copy.deepcopy(task)
    F.cross_entropy(clone(images, target)['output'], target).backward()
    expected = torch.cat([p.grad.flatten() for p in clone.student.parameters()]).norm().item()
    assert norms_of(train(task, batches, log_grad_norm=1)) == pytest.approx({'grad_norm_task': expected})


def test_compiled_task_has_the_norms_of_the_eager_one() -> None:
    task, batches = create_task(student='test_vit'), create_batches(1)
    expected = expected_norms(task, batches)
    task.compile(backend='aot_eager')
    with torch._functorch.config.patch(donated_buffer=False):  # as the script sets it
        assert norms_of(train(task, batches, log_grad_norm=1)) == pytest.approx(expected, rel=1e-9)


def test_task_of_timm_is_trained_as_ever() -> None:
    class Plain(TrainingTask):
        def forward(self, input: torch.Tensor, target: torch.Tensor) -> Dict[str, torch.Tensor]:
            return {'loss': F.cross_entropy(self.trainable_module(input), target)}

    task = Plain(verbose=False)
    task.trainable_module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, CLASSES)).double()
    assert list(train(task, create_batches(1))) == ['loss']


def _run_rank(rank: int, world_size: int) -> List[Dict[str, Any]]:
    states = []
    for interval in (0, 1):
        task = create_task('feature+kd', 'test_vit')
        task.prepare_distributed(device_ids=[CPU])
        metrics = train(task, create_batches(2)[rank:rank + 1], log_grad_norm=interval, distributed=True)
        states.append({'norms': norms_of(metrics), 'state': task.module.state_dict()})
    return states


@pytest.mark.dist
def test_two_processes_have_the_norms_of_the_joint_batch_and_train_as_without(tmp_path: Path) -> None:
    joint = norms_of(train(
        create_task('feature+kd', 'test_vit'), create_batches(2), log_grad_norm=1,
        grad_accum_steps=2))
    for without, measured in run_ranks(_run_rank, tmp_path):
        assert measured['norms'] == pytest.approx(joint, rel=1e-9) and without['norms'] == {}
        assert all(torch.equal(measured['state'][name], tensor) for name, tensor in without['state'].items())
