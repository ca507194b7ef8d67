"""Separate momenta: the optimizer against the official code's numbers, and the loop that gives it two gradients."""
import copy
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Sequence

import pytest
import timm
import torch
import torch.nn as nn
from golden_data import GoldenCase, assert_golden, case_id, golden_cases
from ranks import run_ranks
from timm.optim import create_optimizer_v2
from timm.utils import NativeScaler
from torch.utils.flop_counter import FlopCounterMode

import train_distill
from timm_distill import DistillTask, UsageError, create_distill_task
from timm_distill.engine.dot import (
    SGD_FAMILY,
    DistillationOrientedSGD,
    backward_apart,
    clip_together,
    create_dot,
    split_loss,
)
from timm_distill.engine.evaluate import ComputeSpec
from timm_distill.engine.train import UpdateSpec, train_one_epoch

CASES = golden_cases('dot')
PLAIN = UpdateSpec()
CLASSES, SIZE = 5, (3, 32, 32)


@pytest.mark.parametrize('case', CASES, ids=case_id)
def test_parameters_and_both_buffers_equal_the_official_codes_after_every_step(case: GoldenCase) -> None:
    names = [name for name in case.tensors if not name.startswith('step')]
    parameters = {name: nn.Parameter(case[name].clone()) for name in names}
    options = {name: case.hparams[name] for name in ('lr', 'momentum', 'delta', 'weight_decay', 'dampening')}
    optimizer = DistillationOrientedSGD(parameters.values(), **options)
    for step in range(case.hparams['steps']):
        optimizer.zero_grad()
        optimizer.add_distill_gradients([case.tensors.get(f'step{step}.grad_kd.{name}') for name in names])
        for name, parameter in parameters.items():
            gradient = case.tensors.get(f'step{step}.grad_task.{name}')
            parameter.grad = None if gradient is None else gradient.clone()
        optimizer.step()
        for name, parameter in parameters.items():
            assert_golden(parameter, case[f'step{step}.after.{name}'])
            for buffer, official in (('momentum_buffer', 'momentum'), ('momentum_buffer_kd', 'momentum_kd')):
                expected = case.tensors.get(f'step{step}.{official}.{name}')
                actual = optimizer.state[parameter].get(buffer)
                assert (actual is None) == (expected is None), (name, buffer)
                if expected is not None:
                    assert_golden(actual, expected)


def test_a_task_momentum_of_zero_keeps_no_buffer_for_it() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = DistillationOrientedSGD([parameter], lr=0.1, momentum=0.25, delta=0.25)
    for _ in range(2):
        optimizer.add_distill_gradients([torch.ones(3)])
        parameter.grad = torch.ones(3)
        optimizer.step()
        optimizer.zero_grad()
    assert set(optimizer.state[parameter]) == {'momentum_buffer_kd'}
    torch.testing.assert_close(parameter.detach(), torch.full((3,), 1 - 0.1 * (1 + 1 + 1 + 1.5)))


# The loop

def create_task(seed: int = 0, kd: str = 'kd+fitnet', **kwargs: Any) -> DistillTask:
    """Return a task of two methods, one of which trains a layer of its own that the label loss does not reach."""
    torch.manual_seed(seed)
    student, teacher = (timm.create_model(name, num_classes=CLASSES) for name in ('test_efficientnet', 'test_resnet'))
    weights = {'fitnet': 1.} if 'fitnet' in kd else {}
    return create_distill_task(
        student, teacher, kd=kd, kd_weight=weights, input_size=SIZE, dtype=torch.float64, verbose=False,
        **kwargs).train()


class Loader:
    """Batches that are the same each time."""

    def __init__(self, batches: int = 3, size: int = 4):
        generator = torch.Generator().manual_seed(0)
        self.batches = [
            (torch.randn(size, *SIZE, generator=generator, dtype=torch.float64), torch.arange(size) % CLASSES)
            for _ in range(batches)]
        self.dataset = range(batches * size)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        return iter(self.batches)


def create_optimizer(task: DistillTask, delta: Optional[float], opt: str = 'momentum', **kwargs: Any) -> Any:
    options = {'lr': 0.005, 'momentum': 0.9, 'weight_decay': 0., **kwargs}
    optimizer = create_optimizer_v2(task.trainable_module, opt=opt, **options)
    return optimizer if delta is None else create_dot(optimizer, delta)


def train(
        task: DistillTask, optimizer: Any, update: UpdateSpec = PLAIN, epochs: Sequence[int] = (0,)) -> None:
    compute = ComputeSpec(torch.device('cpu'), prefetcher=False)
    for epoch in epochs:
        train_one_epoch(task, Loader(), optimizer, compute, epoch=epoch, update=update)


def state_of(task: DistillTask) -> Dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in task.module.state_dict().items()}


def assert_like(actual: Dict[str, torch.Tensor], expected: Dict[str, torch.Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-8, atol=1e-10, msg=lambda text, n=name: f'{n}: {text}')


UPDATES = {
    'plain': PLAIN,
    'accumulation': UpdateSpec(grad_accum_steps=2),
    'clipped norm': UpdateSpec(clip_grad=0.5),
    'clipped values': UpdateSpec(clip_grad=0.01, clip_mode='value'),
    'agc': UpdateSpec(clip_grad=0.01, clip_mode='agc'),
}


@pytest.mark.parametrize('opt', SGD_FAMILY)
def test_with_a_delta_of_zero_it_is_the_sgd_of_that_name(opt: str) -> None:
    tasks = create_task(), create_task()
    for task, delta in zip(tasks, (None, 0.)):
        train(task, create_optimizer(task, delta, opt, weight_decay=1e-3 if opt == 'sgd' else 0.))
    # the one difference is the official code's: no decay in the first step of what the label loss does not reach
    students = [{n: v for n, v in state_of(task).items() if n.startswith('student')} for task in tasks]
    assert_like(students[1], students[0])


@pytest.mark.parametrize('update', UPDATES.values(), ids=UPDATES)
def test_with_a_delta_of_zero_accumulation_and_clipping_are_those_of_sgd(update: UpdateSpec) -> None:
    tasks = create_task(), create_task()
    for task, delta in zip(tasks, (None, 0.)):
        train(task, create_optimizer(task, delta), update)
    assert_like(*(state_of(task) for task in tasks))


def test_a_loss_scaler_changes_nothing_and_its_overflow_leaves_both_buffers() -> None:
    tasks = create_task(), create_task()
    scaler = NativeScaler(device='cpu')
    scaler._scaler = torch.amp.GradScaler('cpu', init_scale=1024.)
    for task, loss_scaler in zip(tasks, (None, scaler)):
        train(task, create_optimizer(task, 0.075), UpdateSpec(loss_scaler=loss_scaler, clip_grad=1.))
    assert_like(*(state_of(task) for task in tasks))
    task = tasks[1]
    optimizer = create_optimizer(task, 0.075)
    before = [p.detach().clone() for p in task.module.parameters()]
    task.weights['kd'] = float('inf')  # of the distillation's gradient alone
    scaler._scaler = torch.amp.GradScaler('cpu', init_scale=1024.)
    compute = ComputeSpec(torch.device('cpu'), prefetcher=False)
    train_one_epoch(task, Loader(1), optimizer, compute, epoch=0, update=UpdateSpec(loss_scaler=scaler))
    assert all(torch.equal(p, b) for p, b in zip(task.module.parameters(), before))
    assert not optimizer.state and scaler._scaler.get_scale() < 1024


def test_delta_gives_distillation_the_larger_momentum() -> None:
    task = create_task()
    optimizer = create_optimizer(task, 0.075)
    result = task(*Loader().batches[0])
    weighted = task.weighted_terms(result)
    parameters = list(task.module.parameters())
    expected = {
        name: torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        for name, loss in (('task', weighted.pop('task')), ('kd', sum(weighted.values())))}
    backward_apart(split_loss(task, result), task.module, optimizer, lambda loss: loss)
    for p, own, other in zip(parameters, expected['task'], expected['kd']):
        for actual, gradient in ((p.grad, own), (optimizer._distill.get(p), other)):
            assert (actual is None) == (gradient is None)
            if gradient is not None:
                torch.testing.assert_close(actual, gradient)
    layers = [p for method in task.module.methods.values() for p in method.parameters()]
    assert layers and all(p.grad is None and p in optimizer._distill for p in layers)


def test_any_number_of_terms_takes_one_forward_and_two_backward_passes() -> None:
    batch = Loader().batches[0]
    flops = {}
    for kd in ('kd', 'kd+at+sp+rkd'):
        for delta in (None, 0.075):
            task = create_task(kd=kd)
            optimizer, forwards = create_optimizer(task, delta), []
            task.student.register_forward_hook(lambda *args, seen=forwards: seen.append(1))
            with FlopCounterMode(display=False) as counter:
                result = task(*batch)
                if delta is None:
                    result['loss'].backward()
                else:
                    backward_apart(split_loss(task, result), task.module, optimizer, lambda loss: loss)
            flops[kd, delta] = counter.get_total_flops()
    # a backward pass is two thirds of a step of the student alone; the teacher's forward is in both
    assert 1.2 < flops['kd', 0.075] / flops['kd', None] < 1.7
    extra = {kd: flops[kd, 0.075] - flops[kd, None] for kd in ('kd', 'kd+at+sp+rkd')}
    assert extra['kd+at+sp+rkd'] < 1.1 * extra['kd']


def test_weights_that_are_zero_leave_plain_momentum() -> None:
    tasks = create_task(kd='kd'), create_task(kd='kd')
    for task in tasks:
        task.weights['kd'] = 0.
    for task, delta in zip(tasks, (None, 0.075)):
        train(task, create_optimizer(task, delta))
    assert_like(*(state_of(task) for task in tasks))
    alone = create_task(kd='kd')
    alone.task_loss_weight = 0.
    train(alone, create_optimizer(alone, 0.075))
    assert all(torch.isfinite(value).all() for value in state_of(alone).values())


@pytest.mark.parametrize('bad', ['task', 'distill'])
def test_gradients_that_are_not_finite_skip_the_update_whichever_they_are_of(bad: str) -> None:
    task = create_task(kd='kd')
    if bad == 'task':
        task.task_loss_weight = float('nan')
    else:
        task.weights['kd'] = float('nan')
    optimizer = create_optimizer(task, 0.075)
    before = state_of(task)
    train(task, optimizer, UpdateSpec(max_streak=None), (0,))
    assert all(torch.equal(value, before[name]) for name, value in state_of(task).items())
    assert not optimizer.state


def test_grad_checkpointing_moves_no_statistics_in_the_second_pass() -> None:
    tasks = create_task(), create_task()
    tasks[1].student.set_grad_checkpointing()
    for task in tasks:
        optimizer = create_optimizer(task, 0.075)
        backward_apart(split_loss(task, task(*Loader().batches[0])), task.module, optimizer, lambda loss: loss)
    plain, again = ([p.grad for p in task.student.parameters()] for task in tasks)
    assert all(torch.allclose(a, b) for a, b in zip(plain, again))


def test_groups_keep_their_own_rates_and_decay() -> None:
    task = create_task()
    sgd = create_optimizer_v2(task.trainable_module, opt='sgd', lr=0.1, momentum=0.9, weight_decay=0.1, layer_decay=0.5)
    optimizer = create_dot(sgd, 0.05)
    kept = ('lr', 'weight_decay', 'lr_scale', 'nesterov', 'momentum', 'dampening')
    for own, other in zip(optimizer.param_groups, sgd.param_groups):
        assert own['params'] == other['params'] and own['delta'] == 0.05
        assert {key: own[key] for key in kept} == {key: other[key] for key in kept}
    assert len({group['lr_scale'] for group in optimizer.param_groups}) > 1


def test_state_saved_and_loaded_goes_on_bit_identical() -> None:
    task = create_task()
    optimizer = create_optimizer(task, 0.075, weight_decay=1e-3)
    train(task, optimizer, epochs=(0,))
    other = copy.deepcopy(task)
    resumed = create_optimizer(other, 0.075, weight_decay=1e-3)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, its_optimizer in ((task, optimizer), (other, resumed)):
        train(each, its_optimizer, epochs=(1,))
    expected, actual = state_of(task), state_of(other)
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_clipping_shortens_both_gradients_as_their_sum_is() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = DistillationOrientedSGD([parameter])
    optimizer.add_distill_gradients([torch.tensor([3., 0.])])
    parameter.grad = torch.tensor([0., 4.])
    clip_together([parameter], optimizer, 1., 'norm')
    torch.testing.assert_close(parameter.grad, torch.tensor([0., 0.8]))
    torch.testing.assert_close(optimizer.distill_gradients()[0], torch.tensor([0.6, 0.]))


@pytest.mark.parametrize('create', [
    lambda p: torch.optim.AdamW([p]),
    lambda p: create_optimizer_v2([p], opt='lookahead_sgd', lr=0.1),
    lambda p: torch.optim.SGD([p], lr=0.1, momentum=0.9, maximize=True),
], ids=['adamw', 'lookahead', 'maximize'])
def test_other_optimizers_are_refused_by_one_message(create: Callable[[nn.Parameter], Any]) -> None:
    with pytest.raises(UsageError, match='--kd-optimizer dot.*--opt sgd, momentum or nesterov'):
        create_dot(create(nn.Parameter(torch.zeros(1))), 0.05)


@pytest.mark.parametrize('momentum, delta', [(0.9, 0.1), (0.9, 0.5), (0.05, 0.1), (0., 0.1)])
def test_momenta_outside_of_their_range_are_named(momentum: float, delta: float) -> None:
    with pytest.raises(UsageError, match=f'--dot-delta {delta:g} at --momentum {momentum:g}'):
        DistillationOrientedSGD([nn.Parameter(torch.zeros(1))], momentum=momentum, delta=delta)


# Two processes

def _run_rank(rank: int, world_size: int) -> Dict[str, Dict[str, torch.Tensor]]:
    states = {}
    for name, update in (('accumulation', UpdateSpec(grad_accum_steps=2, clip_grad=1.)), ('plain', UpdateSpec())):
        task = create_task(kd='kd+fitnet')
        optimizer = create_optimizer(task, 0.075)
        task.prepare_distributed(device_ids=[torch.device('cpu')])
        freeze_statistics(task)
        loader = Loader()
        loader.batches = [(x[rank::world_size], y[rank::world_size]) for x, y in loader.batches]
        compute = ComputeSpec(torch.device('cpu'), prefetcher=False, distributed=True)
        train_one_epoch(task, loader, optimizer, compute, epoch=0, update=update)
        states[name] = dict(task.module.named_parameters())
    return states


def freeze_statistics(task: DistillTask) -> None:
    """Let batch norms normalise by their running statistics, so that a batch may be split."""
    for module in task.module.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
            module.train = lambda mode=True, m=module: m  # type: ignore[method-assign]


@pytest.mark.dist
@pytest.mark.slow
def test_two_processes_train_as_one_with_both_halves_of_each_batch(tmp_path: Path) -> None:
    ranks = run_ranks(_run_rank, tmp_path)
    for name, update in (('accumulation', UpdateSpec(grad_accum_steps=2, clip_grad=1.)), ('plain', UpdateSpec())):
        task = create_task(kd='kd+fitnet')
        optimizer = create_optimizer(task, 0.075)
        freeze_statistics(task)
        train(task, optimizer, update, (0,))
        expected = {n: p.detach() for n, p in task.module.named_parameters()}
        assert all(torch.equal(ranks[0][name][n], ranks[1][name][n]) for n in expected)
        assert_like({n: p.detach() for n, p in ranks[0][name].items()}, expected)


# Runs

def run(few_digits_dir: Path, output: Path, *flags: str) -> Any:
    return train_distill.main([
        '--data-dir', str(few_digits_dir), '--model', 'test_efficientnet', '--teacher', 'test_resnet',
        '--no-teacher-pretrained', '--kd', 'kd', '--kd-optimizer', 'dot', '--num-classes', '10', '--input-size', '3',
        '32', '32', '-b', '100', '--epochs', '2', '-j', '0', '--device', 'cpu', '--no-report', '--lr', '1e-2',
        '--warmup-epochs', '0', '--output', str(output), '--experiment', 'run', *flags])


def weights(output: Path) -> Dict[str, torch.Tensor]:
    return torch.load(output / 'run' / 'last.pth.tar', weights_only=False)['state_dict']


def test_a_resumed_run_ends_as_one_that_never_stopped(few_digits_dir: Path, tmp_path: Path) -> None:
    run(few_digits_dir, tmp_path / 'whole')
    run(few_digits_dir, tmp_path / 'parts', '--stop-epoch', '1')
    with pytest.raises(UsageError, match='another optimizer: --kd-optimizer dot -> None'):
        resume = ['--resume', str(tmp_path / 'parts' / 'run' / 'last.pth.tar')]
        args = [
            '--data-dir', str(few_digits_dir), '--model', 'test_efficientnet', '--teacher', 'test_resnet', '--kd', 'kd',
            '--no-teacher-pretrained', '--num-classes', '10', '--input-size', '3', '32', '32', '-b', '100', '--epochs',
            '2', '-j', '0', '--device', 'cpu', '--no-report', '--output', str(tmp_path / 'none')]
        train_distill.main([*args, *resume])
    run(few_digits_dir, tmp_path / 'parts', '--resume', 'auto')
    expected, actual = weights(tmp_path / 'whole'), weights(tmp_path / 'parts')
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_another_optimizer_is_refused_before_anything_is_written(few_digits_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match='--kd-optimizer dot is a rule for SGD.*AdamW'):
        run(few_digits_dir, tmp_path, '--opt', 'adamw')
    assert not list(tmp_path.iterdir())
