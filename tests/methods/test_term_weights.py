"""What a weight of 0 means, what the log says of weights, and what ranks epochs where the student's metric cannot."""
import copy
import logging
from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest
import timm
import torch
import torch.nn as nn
from ranks import run_ranks
from timm.utils import NativeScaler
from training import train_epoch

import train_distill
from timm_distill import DistillTask, UsageError, create_distill_task, create_method
from timm_distill.features.spec import Features
from timm_distill.losses import standardize_logits
from timm_distill.methods import METHODS, DistillMethod
from timm_distill.methods.dist import dist_losses
from timm_distill.methods.feature import cosine_distance
from timm_distill.methods.logitstd import standardize
from timm_distill.methods.nd import nd_loss
from timm_distill.methods.pkt import probabilistic_transfer_loss

CPU = torch.device('cpu')
SIZE = (3, 32, 32)
CLASSES = 5


class Infinite(DistillMethod):
    """A term that is infinite, with an infinite gradient, and a layer that only it trains."""
    student_outputs = frozenset({'logits', 'pre_logits'})
    teacher_outputs = frozenset()

    def build(self, pair: Any) -> None:
        self.layer = nn.Linear(pair.student.pre_logits, 1)

    def forward(self, student: Features, teacher: Features, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        zero = self.layer(student.pre_logits).sum() * 0.
        return {'infinite_loss': 1. / zero.abs().sqrt()}


def create_task(kd: str = 'kd', seed: int = 0, student: str = 'test_resnet', **options: Any) -> DistillTask:
    torch.manual_seed(seed)
    return create_distill_task(
        timm.create_model(student, num_classes=CLASSES), timm.create_model('test_convnext', num_classes=CLASSES),
        kd=kd, input_size=SIZE, verbose=False, **options).train()


def create_batch(size: int = 4, seed: int = 1) -> Tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(size, *SIZE, generator=torch.Generator().manual_seed(seed)), torch.arange(size) % CLASSES


@pytest.fixture
def infinite(monkeypatch: pytest.MonkeyPatch) -> None:
    METHODS.names()  # all are found before the table is copied
    for name, value in vars(METHODS).items():
        if isinstance(value, dict):
            monkeypatch.setattr(METHODS, name, dict(value))
    METHODS.register('infinite')(Infinite)


def with_infinite(weight: float, schedule: Any = 'const') -> DistillTask:
    return create_task('kd+infinite', kd_weight={'infinite': weight}, kd_schedule={'infinite': schedule}, num_epochs=2)


@pytest.mark.parametrize('weight, schedule, epoch', [(0., 'const', 0), (1., '0:0,5:1', 0), (1., 'stop:3', 3)])
def test_an_infinite_term_without_a_weight_changes_neither_loss_nor_gradients(
        weight: float, schedule: str, epoch: int, infinite: None) -> None:
    task, plain = with_infinite(weight, schedule), create_task('kd')
    task.set_epoch(epoch)
    result, expected = task(*create_batch()), plain(*create_batch())
    assert torch.isinf(result['infinite_loss'])
    assert torch.equal(result['loss'], expected['loss'])
    result['loss'].backward(), expected['loss'].backward()
    gradients = {name: p.grad for name, p in plain.student.named_parameters()}
    assert all(torch.equal(p.grad, gradients[name]) for name, p in task.student.named_parameters())


def test_a_term_with_a_weight_is_as_infinite_as_it_is(infinite: None) -> None:
    assert not torch.isfinite(with_infinite(1.)(*create_batch())['loss'])


def test_an_infinite_term_without_a_weight_stops_no_training_and_spoils_no_average(infinite: None) -> None:
    task = with_infinite(0.)
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.01)
    before = copy.deepcopy(task.student.state_dict())
    metrics = train_epoch(
        task, [create_batch(seed=i) for i in range(4)], optimizer, epoch=0, device=CPU, max_streak=2, log_grad_norm=1)
    assert all(torch.isfinite(torch.tensor(metrics[name])) for name in ('loss', 'kd_loss', 'task_loss'))
    assert metrics['grad_norm_infinite'] == 0
    assert any(not torch.equal(tensor, before[name]) for name, tensor in task.student.state_dict().items())


def test_an_infinite_task_loss_of_weight_zero_is_left_out() -> None:
    def criterion(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return 1. / (logits.sum() * 0.).abs().sqrt()

    task = create_task('norm', criterion=criterion, task_loss_weight=0.)
    result = task(*create_batch())
    result['loss'].backward()
    assert torch.isinf(result['task_loss']) and torch.equal(result['loss'], result['norm_loss'])
    assert all(torch.isfinite(p.grad).all() for p in task.module.parameters() if p.grad is not None)


def test_an_epoch_in_which_nothing_has_a_weight_trains_nothing_and_goes_on() -> None:
    task = create_task('norm', task_loss_weight=0., kd_schedule={'norm': 'stop:1'})
    task.set_epoch(1)
    loss = task(*create_batch())['loss']
    loss.backward()
    assert loss == 0 and all(not p.grad.any() for p in task.module.parameters())


@pytest.mark.parametrize('name, options, left', [
    ('dist', {'beta': 0.}, {'dist_intra_loss'}),
    ('dist', {'gamma': 0.}, {'dist_inter_loss'}),
    ('srrl', {'logit_weight': 0.}, {'srrl_stat_loss'}),
    ('rkd', {'angle_weight': 0.}, {'rkd_distance_loss'}),
])
def test_an_option_of_weight_zero_leaves_its_term_out(name: str, options: Dict[str, float], left: set) -> None:
    task = create_task(name, kd_kwargs={name: options})
    assert {x for x in task(*create_batch()) if x.startswith(name)} == left


@pytest.mark.parametrize('name, options', [
    ('dist', {'beta': 0., 'gamma': 0.}), ('dkd', {'alpha': 0., 'beta': 0.})])
def test_a_method_whose_parts_all_have_weight_zero_is_an_error(name: str, options: Dict[str, float]) -> None:
    with pytest.raises(UsageError, match='both 0'):
        create_method(name, **options)


# Rows without a scale of their own

def constant(value: float, size: int) -> torch.Tensor:
    return torch.full((6, size), value)


@pytest.mark.parametrize('size', [5, 10, 37, 1000])
@pytest.mark.parametrize('value', [0., 0.1, -2.3026, 3.7, -6.9])
@pytest.mark.parametrize('function', [
    lambda x, y: sum(dist_losses(x, y)),
    lambda x, y: (standardize(x) * standardize(y)).sum(1).mean(),
    lambda x, y: (standardize_logits(x, 2.5) * standardize_logits(y, 2.5)).sum(1).mean(),
], ids=['dist', 'logitstd', 'norm.logit_scale'])
def test_constant_logits_have_a_gradient_as_others_have(function: Any, value: float, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    teacher, norms = torch.randn(6, size, generator=generator), []
    for student in (torch.randn(6, size, generator=generator), constant(value, size)):
        student.requires_grad_()
        function(student, teacher).backward()
        norms.append(student.grad.norm().item())
        assert torch.isfinite(function(teacher, student))
    assert norms[1] < 30 * norms[0]


@pytest.mark.parametrize('function', [
    probabilistic_transfer_loss, cosine_distance, lambda x, y: nd_loss(x, y, y + 1.)], ids=['pkt', 'feature', 'nd'])
@pytest.mark.parametrize('both', [False, True])
def test_features_without_a_direction_have_a_small_gradient(function: Any, both: bool) -> None:
    student = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    student[2] = 0.
    teacher = student.clone() if both else torch.randn(6, 10, generator=torch.Generator().manual_seed(1))
    student.requires_grad_()
    loss = function(student, teacher)
    loss.backward()
    assert torch.isfinite(loss) and student.grad.norm() < 10


def test_opposite_features_have_a_finite_transfer_loss() -> None:
    direction = torch.randn(1, 1000, generator=torch.Generator().manual_seed(0))
    student = torch.cat([direction, -direction, 3. * direction]).requires_grad_()
    loss = probabilistic_transfer_loss(student, torch.randn(3, 1000))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(student.grad).all()


@pytest.mark.parametrize('kd, options', [
    ('dist', {}), ('logitstd', {}), ('norm+kd', {'norm.logit_scale': 2.5, 'norm.segments': 2})])
def test_a_student_whose_classifier_starts_at_zero_trains(kd: str, options: Dict[str, Any]) -> None:
    task = create_task(kd, kd_kwargs=options)
    nn.init.zeros_(task.student.get_classifier().weight)
    nn.init.zeros_(task.student.get_classifier().bias)
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(15):
        loss = task(*create_batch(8))['loss']
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert max(p.abs().max() for p in task.student.parameters()) < 20


# One map of all logits

def test_logits_of_a_distillation_token_are_standardised_with_all_others() -> None:
    torch.manual_seed(0)
    student = timm.create_model(
        'deit_tiny_distilled_patch16_224', img_size=32, embed_dim=32, depth=2, num_heads=2,
        num_classes=CLASSES)
    task = create_distill_task(
        student, timm.create_model('test_convnext', num_classes=CLASSES), kd='norm+token', input_size=SIZE,
        kd_kwargs={'norm.logit_scale': 2.5, 'norm.segments': 2, 'token.hard': False}, verbose=False).train()
    images, target = create_batch()
    seen: Dict[str, Features] = {}
    task.module.methods['token'].register_forward_pre_hook(
        lambda m, args: seen.update(student=args[0], teacher=args[1]))
    task(images, target)
    for logits in (seen['student'].token_logits, seen['student'].logits, seen['teacher'].logits):
        torch.testing.assert_close(logits.std(1, unbiased=False), torch.full((4,), 2.5), rtol=1e-3, atol=1e-3)


def test_logits_that_a_method_projects_itself_are_standardised_with_all_others() -> None:
    options = {'norm.segments': 2, 'ofa.stages': 1}
    task = create_task('norm+ofa', kd_kwargs={**options, 'norm.logit_scale': 2.5})
    projected: List[torch.Tensor] = []
    task.module.methods['ofa'].projectors[0].register_forward_hook(lambda m, args, out: projected.append(out))
    batch = create_batch()
    result = task(*batch)
    from timm_distill.methods.ofa import ofa_loss
    teacher = standardize_logits(task.teacher(batch[0]).logits, 2.5)
    expected = ofa_loss(standardize_logits(projected[0], 2.5), teacher, batch[1])
    torch.testing.assert_close(result['ofa_stages_loss'], expected)


# What the log says

def run_epoch(task: DistillTask, batches: int = 5, **kwargs: Any) -> Dict[str, float]:
    torch.manual_seed(2)
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.05, momentum=0.9)
    return train_epoch(task, [create_batch(seed=i) for i in range(batches)], optimizer, device=CPU, **kwargs)


def shares_of(caplog: pytest.LogCaptureFixture) -> List[str]:
    return [record.message for record in caplog.records if record.message.startswith('Gradient on the student')]


def test_weights_and_shares_are_logged_at_the_first_two_log_lines(caplog: pytest.LogCaptureFixture) -> None:
    task = create_task('norm+kd', kd_weight={'kd': 0.25}, kd_schedule={'norm': 'imagenet'}, task_loss_weight=0.5)
    with caplog.at_level(logging.INFO):
        run_epoch(task, epoch=0, log_shares=True, log_interval=2)
    first, second = shares_of(caplog)
    assert 'at update 0: task ' in first and 'at update 2: task ' in second
    for part in ('% (weight 0.5), ', 'norm ', '% (weight 0.1), ', 'kd ', '% (weight 0.25).'):
        assert part in first
    percent = [float(x.split()[-1]) for x in first.split(' %')[:-1]]
    assert sum(percent) == pytest.approx(100, abs=3)


def test_shares_are_those_of_the_gradient_norms(caplog: pytest.LogCaptureFixture) -> None:
    task = create_task('kd')
    with caplog.at_level(logging.INFO):
        norms = run_epoch(task, 1, epoch=0, log_shares=True, log_grad_norm=1, loss_scaler=NativeScaler(device='cpu'))
    (line,) = shares_of(caplog)
    expected = 100 * norms['grad_norm_kd'] / (norms['grad_norm_kd'] + norms['grad_norm_task'])
    assert float(line.split('kd ')[1].split(' %')[0]) == pytest.approx(expected, rel=0.05)


def test_a_share_of_nearly_all_is_written_as_a_number_of_percent(caplog: pytest.LogCaptureFixture) -> None:
    task = create_task('kd', kd_weight={'kd': 1e-6})
    with caplog.at_level(logging.INFO):
        run_epoch(task, 1, epoch=0, log_shares=True)
    (line,) = shares_of(caplog)
    assert ' task 100 % (weight 1), kd ' in line and 'e+' not in line


@pytest.mark.parametrize('accumulation', [1, 2])
def test_training_is_the_same_with_and_without_shares(accumulation: int) -> None:
    states = []
    for log_shares in (False, True):
        task = create_task('norm+kd', kd_kwargs={'norm.segments': 2})
        task.student.set_grad_checkpointing(True)
        metrics = run_epoch(task, epoch=0, log_shares=log_shares, log_interval=1, grad_accum_steps=accumulation)
        states.append(({**task.module.state_dict(), 'random': torch.rand(3)}, metrics))
    assert all(torch.equal(states[1][0][name], tensor) for name, tensor in states[0][0].items())
    assert states[0][1] == states[1][1]


def test_at_most_two_updates_of_an_epoch_are_measured() -> None:
    task, calls = create_task('kd'), []
    original = task.weighted_terms
    task.weighted_terms = lambda result: calls.append(1) or original(result)  # type: ignore[method-assign]
    run_epoch(task, 6, epoch=0, log_shares=True, log_interval=2)
    assert len(calls) == 2


def test_shares_that_cannot_be_measured_stop_no_training(caplog: pytest.LogCaptureFixture) -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.used = False
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            if ctx.used:
                raise AssertionError('the second time')
            raise_first = not Once.failed
            Once.failed = True
            if raise_first:
                raise RuntimeError('This backward function was compiled with non-empty donated buffers')
            return gradient

    Once.failed = False  # type: ignore[attr-defined]
    task = create_task('kd', criterion=lambda logits, target: nn.functional.cross_entropy(Once.apply(logits), target))
    with caplog.at_level(logging.INFO):
        run_epoch(task, 2, epoch=0, log_shares=True)
    assert 'task (weight 1), kd (weight 1). Their gradients cannot be measured' in caplog.text


def test_epochs_with_other_terms_than_the_one_before_are_those_whose_shares_are_logged() -> None:
    task = create_task('norm+kd', kd_schedule={'norm': 'stop:3', 'kd': '0:0,2:0.5,4:1'})
    assert [epoch for epoch in range(6) if task.changes_terms(epoch)] == [0, 2, 3]


# What ranks epochs

@pytest.mark.parametrize('kd, weights, trained', [
    ('norm', {}, False), ('fitnet', {}, False), ('kd', {}, True), ('norm+kd', {}, True),
    ('norm+kd', {'kd': 0.}, False),
])
def test_a_classifier_is_trained_by_the_task_loss_or_a_weighted_method_on_logits(
        kd: str, weights: Dict[str, float], trained: bool) -> None:
    assert create_task(kd, kd_weight=weights, task_loss_weight=0.).trains_classifier == trained
    assert create_task(kd, kd_weight=weights, task_loss_weight=0.1).trains_classifier


@pytest.mark.parametrize('kd', [name for name in METHODS.names() if name not in ('crd', 'nd', 'sdd', 'token')])
def test_the_ranking_loss_is_the_loss_where_there_is_no_schedule(kd: str) -> None:
    task = create_task(kd if kd in ('kd', 'norm') else f'{kd}+kd')
    if task.needs_target_statistics:
        task.standardize_targets([create_batch(16)])
    result = task(*create_batch())
    averages = {name: value.item() for name, value in result.items() if name != 'output'}
    assert task.unscheduled_loss(averages) == pytest.approx(averages['loss'], rel=1e-5)


def test_the_ranking_loss_leaves_schedules_out() -> None:
    task = create_task('norm+kd', kd_weight={'norm': 2.}, kd_schedule={'norm': 'imagenet'}, task_loss_weight=0.5)
    averages = {'loss': 0., 'task_loss': 1., 'norm_loss': 10., 'kd_loss': 100.}
    for epoch in (0, 20):
        task.set_epoch(epoch)
        assert task.unscheduled_loss(averages) == 0.5 + 20. + 100.


FAST = [
    '--num-classes', '10', '--img-size', '32', '-b', '60', '--opt', 'adamw', '--warmup-epochs', '0', '--device',
    'cpu', '-j', '0', '--student', 'test_efficientnet', '--teacher', 'test_resnet', '--no-teacher-pretrained',
    '--no-teacher-eval', '--no-report', '--sched', 'none']


def run(data_dir: Path, output: Path, *flags: Any) -> Any:
    return train_distill.main([str(x) for x in ('--data-dir', data_dir, '--output', output, *FAST, *flags)])


def test_without_a_trained_classifier_the_best_epoch_is_that_of_the_least_distillation_loss(
        digits_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        result = run(digits_dir, tmp_path, '--kd', 'feature', '--task-loss-weight', 0, '--epochs', 3, '--lr', '2e-3')
    assert 'nothing trains the classifier' in caplog.text
    losses = {entry['epoch']: entry['train']['feature_loss'] for entry in result.history}
    assert result.best_epoch == min(losses, key=losses.__getitem__) == result.history[-1]['epoch'] == 2
    assert result.best_metric == pytest.approx(losses[2])
    best = torch.load(Path(result.output_dir) / 'model_best.pth.tar', weights_only=False)
    assert best['epoch'] == 2
    card = (Path(result.output_dir) / 'hub' / 'README.md').read_text()
    weights = torch.load(result.checkpoint, weights_only=False)['provenance']['training']['weights']
    assert weights == {'task': 0., 'feature': 1.}  # defaults are written down, too
    assert 'training loss without schedules' in card and 'validation top1' not in card and 'Top-1' not in card


def test_without_validation_data_a_schedule_does_not_choose_the_best_epoch(digits_dir: Path, tmp_path: Path) -> None:
    result = run(
        digits_dir, tmp_path, '--kd', 'feature', '--kd-schedule', 'feature=0:0,1:100', '--epochs', 3, '--lr',
        '2e-3', '--val-split', '')
    assert result.best_epoch == 2
    assert result.history[-1]['train']['loss'] > result.history[0]['train']['loss']
    assert 'validation' not in (Path(result.output_dir) / 'hub' / 'README.md').read_text()


def test_a_student_trained_alone_on_purpose_names_no_teacher(digits_dir: Path, tmp_path: Path) -> None:
    result = run(digits_dir, tmp_path, '--kd', 'none', '--epochs', 1, '--lr', '1e-3')
    provenance = torch.load(result.checkpoint, weights_only=False)['provenance']
    assert 'teacher' not in provenance and 'weights' not in provenance['training']


def _run_rank(rank: int, world_size: int) -> List[Dict[str, torch.Tensor]]:
    task = create_task('fitnet', kd_schedule={'fitnet': 'stop:1'})
    task.prepare_distributed(device_ids=[CPU])
    for epoch in range(3):
        run_epoch(task, 3, epoch=epoch, distributed=True, log_shares=task.changes_terms(epoch))
    other = create_task('fitnet', task_loss_weight=0.)
    other.prepare_distributed(device_ids=[CPU])
    run_epoch(other, 3, epoch=0, distributed=True)
    return [dict(t.module.named_parameters()) for t in (task, other)]


@pytest.mark.dist
def test_two_processes_train_on_where_a_term_has_no_weight_and_its_layers_no_gradient(tmp_path: Path) -> None:
    for first, second in zip(*run_ranks(_run_rank, tmp_path)):
        assert all(torch.equal(second[name], tensor) for name, tensor in first.items())
