"""Promises of the distillation task."""
import copy
import logging
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from golden_data import GoldenCase, assert_golden, case_id, golden_cases
from ranks import run_ranks
from safetensors.torch import save_file
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask
from tiny_models import Plain, TwoScales

from timm_distill import (
    DataSpec,
    DistillTask,
    MergeError,
    Recipe,
    Teacher,
    UsageError,
    create_distill_task,
    merge_student,
)
from timm_distill.features.spec import Features
from timm_distill.losses import match_grids, n_to_one_loss
from timm_distill.methods import create_method
from timm_distill.methods._composition import create_composition, parse_kd
from timm_distill.student.adapted import AdaptedStudent

SIZE = (3, 32, 32)
CLASSES = 5


def create_model(name: str = 'test_resnet', seed: int = 0, **kwargs: Any) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(name, **{'num_classes': CLASSES, **kwargs})


def create_task(
        kd: str = 'norm+kd',
        seed: int = 0,
        teacher: Optional[nn.Module] = None,
        student: Optional[nn.Module] = None,
        **options: Any,
) -> DistillTask:
    student, teacher = student or create_model(seed=seed), teacher or create_model('test_convnext', seed=7)
    kd_kwargs = options.pop('kd_kwargs', {'norm.segments': 2, 'norm.init': 'official'} if 'norm' in kd else None)
    return create_distill_task(
        student, teacher, kd=kd, kd_kwargs=kd_kwargs, input_size=SIZE, verbose=False, **options).train()


def create_batch(size: int = 4, seed: int = 0) -> Tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, *SIZE, generator=generator), torch.randint(CLASSES, (size,), generator=generator)


def create_optimizer(task: nn.Module) -> torch.optim.Optimizer:
    return create_optimizer_v2(task.get_trainable_module(), opt='sgd', lr=0.02, momentum=0.9, weight_decay=1e-4)


def train(task: Any, steps: int = 3, seed: int = 0) -> List[float]:
    """Train for a few steps and return the losses."""
    optimizer, losses = create_optimizer(task), []
    for step in range(steps):
        loss = task(*create_batch(seed=seed + step))['loss']
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        task.update_ema(step=step)
        losses.append(loss.item())
    return losses


def state_of(module: nn.Module) -> Dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same(actual: Dict[str, torch.Tensor], expected: Dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


class LinearStudent(nn.Module):
    """Gives its input as logits, so that golden logits can be its output."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.num_classes = num_classes
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class LogitTeacher(nn.Module):
    """Gives stored logits."""

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.logits = logits

    def forward(self, images: torch.Tensor, outputs: object) -> Features:
        return Features(logits=self.logits)


# Composition, weights and options

def test_loss_is_the_weighted_sum_of_unweighted_terms() -> None:
    batch = create_batch()
    plain = create_task()(*batch)
    task = create_task(kd_weight={'norm': 0.25, 'kd': 3.}, task_loss_weight=0.5, distill_loss_weight=2.)
    result = task(*batch)
    assert set(result) == {'loss', 'output', 'task_loss', 'norm_loss', 'kd_loss'}
    for name in ('task_loss', 'norm_loss', 'kd_loss'):
        assert torch.equal(result[name], plain[name])
    torch.testing.assert_close(
        result['loss'], 0.5 * result['task_loss'] + 2. * (0.25 * result['norm_loss'] + 3. * result['kd_loss']))
    torch.testing.assert_close(plain['loss'], plain['task_loss'] + plain['norm_loss'] + plain['kd_loss'])


def test_task_loss_is_the_criterion_of_the_output() -> None:
    images, target = create_batch()
    result = create_task(criterion=nn.CrossEntropyLoss(label_smoothing=0.1))(images, target)
    torch.testing.assert_close(result['task_loss'], F.cross_entropy(result['output'], target, label_smoothing=0.1))


@pytest.mark.parametrize('options,task_weight,kd_weights', [
    ({}, 1., (1., 1.)),
    (dict(task_loss_weight=0.3), 0.3, (1., 1.)),
    (dict(task_loss_weight=0.), 0., (1., 1.)),
    (dict(task_loss_weight=0.3, distill_loss_weight=2.), 0.3, (2., 2.)),
    (dict(distill_loss_weight=2.), 1., (2., 2.)),
    (dict(task_loss_weight=0.3, kd_weight={'kd': 4.}), 0.3, (1., 4.)),
    (dict(kd_weight={'norm': 0.}), 1., (0., 1.)),
])
def test_each_weight_changes_what_it_names_alone(
        options: Dict[str, Any], task_weight: float, kd_weights: Tuple[float, float]) -> None:
    task = create_task(**options)
    assert task.task_loss_weight == pytest.approx(task_weight)
    assert (task.weights['norm'], task.weights['kd']) == pytest.approx(kd_weights)


@pytest.mark.parametrize('kd_kwargs', [
    {'norm.segments': 3, 'norm.residual': False, 'kd.temperature': 2.},
    {'norm': {'segments': 3, 'residual': False}, 'kd': {'temperature': 2.}},
    {'norm': {'segments': 3}, 'norm.residual': False, 'kd.temperature': 2},
])
def test_options_are_flat_or_nested(kd_kwargs: Dict[str, Any]) -> None:
    module = create_task(kd_kwargs=kd_kwargs).module
    (adapter,) = module.adapters
    assert adapter.segments == 3 and adapter.residual is False
    assert module.methods['kd'].temperature == 2.


@pytest.mark.parametrize('options,parts', [
    (dict(kd='nrom'), ["'nrom'", "'norm'", 'kd takes: ', ', kd, ']),
    (dict(kd='norm+'), ["kd='norm+'", 'norm+kd']),
    (dict(kd='kd+none'), ["kd='kd+none'", 'norm+kd']),
    (dict(kd='kd+kd'), ["kd='kd+kd'", 'norm+kd']),
    (dict(kd='norm', kd_kwargs={'norm.segment': 2}), ['norm.segment', 'norm.segments']),
    (dict(kd='norm', kd_kwargs={'kd.temperature': 2}), ['kd.temperature', 'kd norm']),
    (dict(kd='norm', kd_kwargs={'segments': 2}), ["'segments'", 'METHOD.OPTION=VALUE']),
    (dict(kd='norm', kd_kwargs={'norm.segments': 'many'}), ["norm.segments='many'"]),
    (dict(kd='norm', kd_weight={'kd': 1.}), ['kd_weight', 'kd', 'norm']),
    (dict(kd_tap='logits'), ['kd_tap takes', 'features', 'pre_logits']),
])
def test_wrong_names_and_keys_list_the_valid_ones(options: Dict[str, Any], parts: List[str]) -> None:
    with pytest.raises(UsageError) as error:
        create_task(**options)
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_unknown_student_or_missing_teacher_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="Unknown student 'test_resnett'"):
        create_distill_task('test_resnett', create_model(), verbose=False)
    with pytest.raises(UsageError, match='give teacher'):
        create_distill_task(create_model(), kd='kd', input_size=SIZE, verbose=False)


@pytest.mark.parametrize('kd,names', [
    ('none', []), ('kd', ['kd']), ('norm+kd', ['norm', 'kd']), (' norm + kd', ['norm', 'kd']),
])
def test_methods_are_joined_by_plus(kd: str, names: List[str]) -> None:
    assert parse_kd(kd) == names


def test_names_and_modules_build_the_same_task(tmp_path: Path) -> None:
    teacher = create_model('test_convnext', seed=7)
    save_file(teacher.state_dict(), str(tmp_path / 'teacher.safetensors'))
    named = create_distill_task(
        'test_resnet', 'test_convnext', kd='norm+kd', kd_kwargs={'norm.segments': 2}, num_classes=CLASSES,
        input_size=SIZE, teacher_checkpoint=str(tmp_path / 'teacher.safetensors'), verbose=False).train()
    built = create_task(teacher=teacher)
    built.module.load_state_dict(named.module.state_dict())
    assert built(*create_batch())['loss'] == named(*create_batch())['loss']


def test_recipe_and_data_spec_build_the_task_of_their_fields_as_keywords() -> None:
    fields = dict(kd_weight={'kd': 0.5}, kd_kwargs={'norm.segments': 2}, task_loss_weight=0.25)
    models = create_model(), create_model('test_convnext', seed=7)
    torch.manual_seed(1)
    flat = create_distill_task(*models, 'norm+kd', input_size=SIZE, verbose=False, **fields)
    torch.manual_seed(1)
    grouped = create_distill_task(*models, Recipe('norm+kd', **fields), DataSpec(input_size=SIZE), verbose=False)
    assert grouped.weights == flat.weights and grouped.weights['kd'] == 0.5
    batch = create_batch()
    assert grouped.eval()(*batch)['loss'] == flat.eval()(*batch)['loss']
    overridden = create_distill_task(*models, Recipe('kd', {'kd': 2.}), verbose=False, kd_weight={'kd': 3.})
    assert overridden.weights == {'kd': 3}


@pytest.mark.parametrize('kd', ['kd', 'none'])
@pytest.mark.parametrize('option', ['teacher_wieghts', 'kd_wieght', 'norm'])
def test_unknown_keyword_is_a_type_error_with_every_kd(kd: str, option: str) -> None:
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
        create_task(kd, **{option: 1})


def test_options_that_a_built_teacher_cannot_take_are_refused() -> None:
    with pytest.raises(UsageError, match='teacher_mean: the teacher is given as a ResNet'):
        create_task('kd', teacher=create_model(seed=7), teacher_mean=(0.5, 0.5, 0.5))
    with pytest.raises(UsageError, match='teacher_dtype: the teacher is given as a Teacher'):
        create_task('kd', teacher=Teacher(create_model(seed=7), SIZE), teacher_dtype=torch.bfloat16)


def test_ready_made_teacher_is_used_as_it_is() -> None:
    teacher = Teacher(create_model(seed=7), SIZE)
    assert create_task(teacher=teacher).teacher is teacher


@pytest.mark.parametrize('kd', ['kd', 'norm+kd'])
def test_class_counts_must_agree_for_methods_that_read_logits(kd: str) -> None:
    with pytest.raises(UsageError) as error:
        create_task(kd, teacher=create_model(num_classes=9))
    assert all(part in str(error.value) for part in ('9 classes', f'student {CLASSES}', 'kd kd', 'num_classes'))


def test_class_counts_may_differ_for_methods_that_read_features() -> None:
    assert torch.isfinite(create_task('norm', teacher=create_model(num_classes=9))(*create_batch())['loss'])


def test_ignored_tap_warns(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        create_task('kd', kd_tap='features')
    assert '--kd-tap features is ignored' in caplog.text


def expanded_features(task: DistillTask, images: torch.Tensor) -> List[torch.Tensor]:
    """Return each adapter's expanded feature as a map, from the reference form."""
    module = copy.deepcopy(task.module)
    tap, feature = module.tap, module.student.forward_features(images)
    if tap.point == 'pre_logits':
        feature = module.student.forward_head(feature, pre_logits=True)
    return [
        site.layout.to_map(adapter.expand_contract(site.layout.to_positions(tensor))[1])
        for adapter, site, tensor in zip(module.adapters, tap.sites, tap.read(feature))
    ]


def test_pre_logits_tap_is_matched_with_the_teachers_pre_logits() -> None:
    task = create_task('norm', kd_tap='pre_logits')
    images, target = create_batch()
    teacher = task.teacher(images, frozenset({'pre_logits'})).pre_logits
    (expanded,) = expanded_features(task, images)
    expected = 2 * (expanded.unflatten(1, (2, -1)) - teacher[:, None, :, None, None]).square().mean()
    torch.testing.assert_close(task(images, target)['norm_loss'], expected)


def test_several_adapters_losses_are_summed() -> None:
    task = create_task('norm', student=TwoScales())
    images, target = create_batch()
    maps, teacher = expanded_features(task, images), task.teacher(images, frozenset({'feature'})).feature
    losses = [n_to_one_loss(*match_grids(expanded, teacher, 'avg'), 2) for expanded in maps]
    assert len(losses) == 2
    torch.testing.assert_close(task(images, target)['norm_loss'], sum(losses))


def test_side_adapter_is_matched_with_the_teachers_map_and_is_in_no_checkpoints_weights() -> None:
    task = create_task('norm', kd_tap='side')
    images, target = create_batch()
    (expanded,) = expanded_features(task, images)
    teacher = task.teacher(images, frozenset({'feature'})).feature
    torch.testing.assert_close(
        task(images, target)['norm_loss'], n_to_one_loss(*match_grids(expanded, teacher, 'avg'), 2))
    train(task)
    state = task.get_checkpoint_state()
    assert_same(state['state_dict'], state_of(task.module.student))
    assert state['task_state']['student'] == {} and state['task_state']['adapter']


@pytest.mark.parametrize('kd_tap', ['auto', 'features', 'pre_logits', 'side'])
def test_models_without_a_classifier_by_default_get_the_one_asked_for(kd_tap: str) -> None:
    kwargs = dict(img_size=32, embed_dim=24, depth=1, num_heads=2)
    name = 'vit_tiny_patch16_dinov3_qkvb'
    assert timm.create_model(name, **kwargs).num_classes == 0
    task = create_distill_task(
        name, name, kd='norm+kd', kd_tap=kd_tap, num_classes=CLASSES, student_kwargs=kwargs, teacher_kwargs=kwargs,
        teacher_pretrained=False, input_size=SIZE, verbose=False).train()
    assert task(*create_batch())['output'].shape == (4, CLASSES)
    assert task.module.student.num_classes == task.teacher.num_classes == CLASSES


ENCODERS = pytest.mark.parametrize('name,kwargs', [
    ('test_resnet', dict(num_classes=0)),
    ('vit_tiny_patch16_dinov3_qkvb', dict(img_size=32, embed_dim=24, num_heads=2)),
])


@ENCODERS
def test_student_without_a_classifier_trains_without_labels(name: str, kwargs: Dict[str, Any]) -> None:
    student = timm.create_model(name, **kwargs)
    task = create_task('norm+feature+rkd', student=student, has_labels=False)
    result = task(*create_batch())
    assert 'task_loss' not in result and torch.isfinite(result['loss'])
    result['loss'].backward()
    assert task.get_checkpoint_state()['state_dict'].keys() == timm.create_model(name, **kwargs).state_dict().keys()
    with pytest.raises(UsageError, match='kd needs a student with a classifier.*What works here: .*norm'):
        create_task('kd', student=student, has_labels=False)


@ENCODERS
def test_student_without_a_classifier_asks_for_the_number_of_classes(name: str, kwargs: Dict[str, Any]) -> None:
    with pytest.raises(UsageError, match='has no classifier: give num_classes'):
        create_task('norm', student=timm.create_model(name, **kwargs))


# Schedules and logit scale

def test_schedule_weighs_the_loss_and_not_the_term() -> None:
    task = create_task('norm', kd_kwargs={'norm.segments': 2, 'norm.schedule': '0:0.1,3:2'}, kd_weight={'norm': 0.5})
    for epoch, factor in ((0, 0.05), (2, 0.05), (3, 1.), (9, 1.), (1, 0.05)):
        task.set_epoch(epoch)
        result = task(*create_batch())
        torch.testing.assert_close(result['loss'], result['task_loss'] + factor * result['norm_loss'])


@pytest.mark.parametrize('case', golden_cases('norm_logits'), ids=case_id)
def test_logit_scale_reaches_cross_entropy_and_kd_and_leaves_the_output_alone(case: GoldenCase) -> None:
    hparams, logits = case.hparams, case['logit_s'].clone().requires_grad_()
    norm = create_method('norm', logit_scale=float(hparams['ceta']))
    norm.forward = lambda student, teacher, target: {'norm_loss': logits.new_zeros(())}
    module = AdaptedStudent(LinearStudent(logits.shape[1]), methods={
        'norm': norm, 'kd': create_method('kd', temperature=float(hparams['kd_T']))})
    task = DistillTask(
        module, LogitTeacher(case['logit_t']), nn.CrossEntropyLoss(),
        {'norm': 1., 'kd': hparams['alpha']}, hparams['gamma'], verbose=False)
    result = task(logits, case['target'])
    assert_golden(result['task_loss'], case['loss_cls'])
    assert_golden(result['kd_loss'], case['loss_div'])
    assert_golden(result['loss'], case['loss'])
    assert_golden(torch.autograd.grad(result['loss'], logits)[0], case['grad.logit_s'])
    assert torch.equal(result['output'], logits)


# Targets and precision

@pytest.mark.parametrize('kd', ['none', 'norm+kd'])
def test_mixup_targets_work_and_equal_hard_ones_where_they_are_one_hot(kd: str) -> None:
    images, target = create_batch()
    hard = create_task(kd)(images, target)
    soft = create_task(kd, criterion=SoftTargetCrossEntropy())(images, F.one_hot(target, CLASSES).float())
    torch.testing.assert_close(soft['loss'], hard['loss'])
    mixed = Mixup(mixup_alpha=0.2, num_classes=CLASSES)(images.clone(), target)
    assert torch.isfinite(create_task(kd, criterion=SoftTargetCrossEntropy())(*mixed)['loss'])


@pytest.mark.parametrize('logit_scale', [0., 2.5])
def test_bfloat16_autocast_is_finite(logit_scale: float) -> None:
    task = create_task(kd_kwargs={'norm.segments': 2, 'norm.logit_scale': logit_scale})
    with torch.autocast('cpu', dtype=torch.bfloat16):
        result = task(*create_batch())
    result['loss'].backward()
    assert all(torch.isfinite(value).all() for value in result.values())
    assert all(torch.isfinite(p.grad).all() for p in task.get_trainable_module().parameters())
    assert task.get_checkpoint_state()


@pytest.mark.slow
def test_compiled_task_gives_the_same_loss_and_checkpoint() -> None:
    vit = dict(name='test_vit', img_size=32, depth=1)
    task, compiled = (create_task(student=create_model(**vit), teacher=create_model(**vit, seed=7)) for _ in range(2))
    compiled.compile(backend='aot_eager')
    expected, actual = task(*create_batch()), compiled(*create_batch())
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-5)
    actual['loss'].backward(), expected['loss'].backward()
    for a, b in zip(compiled.module.parameters(), task.module.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)
    saved, plain = compiled.get_checkpoint_state(), task.get_checkpoint_state()
    assert list(saved['state_dict']) == list(plain['state_dict'])
    images = create_batch()[0]
    with torch.no_grad():
        torch.testing.assert_close(compiled.get_eval_model()(images), merge_student(task)(images), rtol=1e-3, atol=1e-4)


# The plain student

def test_kd_none_gives_exactly_the_losses_of_timms_classification_task() -> None:
    ours = create_distill_task(create_model(), kd='none', input_size=SIZE, verbose=False).train()
    timms = ClassificationTask(create_model(), nn.CrossEntropyLoss(), verbose=False).train()
    assert train(ours) == train(timms)
    assert_same(ours.get_checkpoint_state()['state_dict'], timms.get_checkpoint_state()['state_dict'])


def test_kd_none_needs_no_teacher_and_builds_none() -> None:
    task = create_distill_task(create_model(), kd='none', input_size=SIZE, verbose=False)
    assert task.teacher is None and not task.module.adapters
    assert set(task(*create_batch())) == {'loss', 'output'}  # as timm's own tasks


def test_methods_of_weight_zero_leave_the_students_gradient_that_of_the_task_loss() -> None:
    task, plain = create_task('kd', kd_weight={'kd': 0.}), create_task('none')
    task(*create_batch())['loss'].backward(), plain(*create_batch())['loss'].backward()
    for a, b in zip(task.module.parameters(), plain.module.parameters()):
        torch.testing.assert_close(a.grad, b.grad)


def test_building_with_a_teacher_does_not_move_the_students_start() -> None:
    assert_same(state_of(create_task().module.student), state_of(create_model()))


# What trains, and the teacher that does not

@pytest.mark.parametrize('student', ['test_resnet', 'test_vit', 'test_convnext', 'test_efficientnet'])
def test_every_trainable_tensor_gets_a_gradient_and_is_in_the_optimizer(student: str) -> None:
    kwargs = dict(img_size=32) if student == 'test_vit' else {}
    task = create_distill_task(
        create_model(student, **kwargs), create_model(), kd='norm+kd', input_size=SIZE, verbose=False)
    module = task.get_trainable_module()
    task(*create_batch())['loss'].backward()
    assert not [name for name, p in module.named_parameters() if p.grad is None]
    optimized = {id(p) for group in create_optimizer(task).param_groups for p in group['params']}
    assert optimized == {id(p) for p in module.parameters()} == {id(p) for p in task.get_clip_parameters()}


def test_teacher_is_bit_identical_after_training_and_only_outside_of_what_is_saved() -> None:
    teacher = create_model('test_efficientnet', seed=7, drop_rate=0.5)
    task = create_task(teacher=teacher)
    task.setup_ema(decay=0.5)
    task.train()
    before = state_of(task.teacher)
    train(task)
    assert_same(state_of(task.teacher), before)
    assert not any(module.training for module in task.teacher.modules())
    own = {p.data_ptr() for p in teacher.parameters()}
    assert not own & {p.data_ptr() for p in task.get_trainable_module().parameters()}
    assert not own & {p.data_ptr() for p in task.get_trainable_module(ema=True).parameters()}
    assert not any('teacher' in name for name in task.get_trainable_module(ema=True).state_dict())
    saved = {**task.get_checkpoint_state(), **task.get_checkpoint_state(ema=True)}
    assert not own & {tensor.data_ptr() for tensor in _tensors(saved)}


def test_clipping_can_leave_out_the_students_classifier() -> None:
    task = create_task()
    head = {id(p) for p in task.module.student.get_classifier().parameters()}
    kept = {id(p) for p in task.get_clip_parameters(exclude_head=True)}
    assert head and kept == {id(p) for p in task.get_trainable_module().parameters()} - head


def create_distilled_deit() -> nn.Module:
    return create_model('deit_tiny_distilled_patch16_224', img_size=32, embed_dim=24, depth=1, num_heads=2)


@pytest.mark.parametrize('factory,names', [(TwoScales, ['fc']), (create_distilled_deit, ['head', 'head_dist'])])
def test_clipping_can_leave_out_every_kind_of_classifier(
        factory: Callable[[], nn.Module], names: List[str]) -> None:
    task = create_task('norm', student=factory())
    head = {id(p) for name in names for p in task.module.student.get_submodule(name).parameters()}
    kept = {id(p) for p in task.get_clip_parameters(exclude_head=True)}
    assert head and kept == {id(p) for p in task.get_trainable_module().parameters()} - head


def test_clipping_takes_everything_of_a_student_that_does_not_name_its_classifier() -> None:
    task = create_task('norm', student=Plain())
    kept = {id(p) for p in task.get_clip_parameters(exclude_head=True)}
    assert kept == {id(p) for p in task.get_trainable_module().parameters()}


# Checkpoints

def _tensors(state: Any) -> List[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state]
    return [tensor for value in state.values() for tensor in _tensors(value)] if isinstance(state, dict) else []


@pytest.mark.parametrize('kd', ['none', 'kd', 'norm', 'norm+kd'])
def test_checkpoint_state_brings_a_fresh_task_back_bit_identical(kd: str, tmp_path: Path) -> None:
    task, fresh = create_task(kd), create_task(kd, seed=3)
    for built in (task, fresh):
        built.setup_ema(decay=0.5)
    train(task)
    torch.save({**task.get_checkpoint_state(), **task.get_checkpoint_state(ema=True)}, tmp_path / 'last.pth.tar')
    saved = torch.load(tmp_path / 'last.pth.tar', weights_only=True)
    assert set(saved) == {'state_dict', 'task_state', 'state_dict_ema', 'task_state_ema'}
    fresh.load_checkpoint_state(saved['state_dict'], saved['task_state'])
    fresh.load_checkpoint_state(saved['state_dict_ema'], saved['task_state_ema'], ema=True)
    for ema in (False, True):
        assert_same(state_of(fresh.get_trainable_module(ema=ema)), state_of(task.get_trainable_module(ema=ema)))
    assert train(fresh.train(), seed=10) == train(task.train(), seed=10)


def test_saved_student_is_the_evaluated_one() -> None:
    task = create_task()
    train(task)
    state = task.get_checkpoint_state()['state_dict']
    assert_same(state_of(task.get_eval_model()), state)
    images = create_batch()[0]
    with torch.no_grad():
        assert torch.equal(task.get_eval_model()(images), merge_student(task)(images))


def test_evaluated_model_follows_training() -> None:
    task = create_task()
    task.setup_ema(decay=0.5)
    train(task)
    models = [task.get_eval_model(), task.get_eval_model(ema=True)]
    before = [state_of(model) for model in models]
    train(task, seed=5)
    for ema, old in zip((False, True), before):
        model = task.get_eval_model(ema=ema)
        assert not model.training and not torch.equal(model.state_dict()['fc.weight'], old['fc.weight'])
        assert_same(state_of(model), state_of(merge_student(task, ema=ema)))


@pytest.mark.parametrize('resumed', ['none', 'kd', 'norm', 'norm+kd'])
@pytest.mark.parametrize('trained', ['none', 'kd', 'norm', 'norm+kd'])
def test_resuming_into_another_kd_is_a_usage_error(trained: str, resumed: str) -> None:
    saved = create_task(trained).get_checkpoint_state()
    task = create_task(resumed)
    if trained == resumed:
        task.load_checkpoint_state(saved['state_dict'], saved['task_state'])
        return
    with pytest.raises(UsageError, match='--kd'):
        task.load_checkpoint_state(saved['state_dict'], saved['task_state'])


@pytest.mark.parametrize('ema', [False, True])
def test_weights_that_are_not_finite_raise_a_merge_error_with_the_raw_tensors(ema: bool) -> None:
    task = create_task()
    task.setup_ema(decay=0.5)
    train(task)
    module = task.get_trainable_module(ema=ema)
    with torch.no_grad():
        next(p for name, p in module.named_parameters() if 'contract.weight' in name).fill_(float('nan'))
    with pytest.raises(MergeError, match='not finite') as error:
        task.get_checkpoint_state(ema=ema)
    assert ('EMA student' in str(error.value)) == ema
    raw = error.value.raw_state
    trained = module.module if ema else module
    assert_same(raw['state_dict'], state_of(trained.student))
    assert torch.isnan(raw['task_state']['adapter']['0.contract.weight']).all()


def test_merge_is_verified_before_any_batch_was_seen() -> None:
    assert create_task().get_checkpoint_state()


@pytest.mark.parametrize('kd, given, expected', [
    ('at', None, {'at': 1000.}),
    ('at', {'at': 5.}, {'at': 5.}),
    ('norm+crd+logitstd', None, {'norm': 1., 'crd': 0.8, 'logitstd': 9.}),
    ('norm+at', {'norm': 2.}, {'norm': 2., 'at': 1000.}),
    ('kd++', None, {'kd': 2.5, 'nd': 1.}),
])
def test_a_method_has_its_published_weight_unless_another_is_given(
        kd: str, given: Optional[Dict[str, float]], expected: Dict[str, float]) -> None:
    assert create_composition(Recipe(kd, given)).weights == expected
    twice = create_composition(Recipe(kd, given, distill_loss_weight=2., task_loss_weight=0.5))
    assert twice.weights == {name: 2 * weight for name, weight in expected.items()}


@pytest.mark.parametrize('options', [{'distill_loss_weight': 0.}, {'kd_weight': {'norm': 0., 'kd': 0.}}])
def test_weights_with_which_nothing_would_train_are_an_error(options: Dict[str, Any]) -> None:
    with pytest.raises(UsageError, match='nothing would train'):
        create_composition(Recipe('norm+kd', task_loss_weight=0., **options))


def test_verified_merge_is_logged_with_its_difference(caplog: pytest.LogCaptureFixture) -> None:
    task = create_task()
    task.verbose = True
    with caplog.at_level(logging.INFO):
        task.get_checkpoint_state()
    assert 'largest logit difference' in caplog.text


def test_saving_does_not_move_the_random_state_or_the_training() -> None:
    task, other = create_task(), create_task()
    for built in (task, other):
        built(*create_batch())['loss'].backward()
    random_state = torch.get_rng_state()
    task.get_checkpoint_state()
    task.get_eval_model()
    assert torch.equal(torch.get_rng_state(), random_state)
    assert_same(state_of(task.module), state_of(other.module))
    assert task.module.training


def test_ema_cannot_be_loaded_without_one() -> None:
    task = create_task()
    assert task.get_checkpoint_state(ema=True) == {} and task.get_eval_model(ema=True) is None
    with pytest.raises(RuntimeError, match='setup_ema'):
        task.load_checkpoint_state({}, {}, ema=True)


def test_double_precision_holds_for_student_adapter_and_teacher() -> None:
    task = create_task(dtype=torch.float64)
    assert {t.dtype for t in [*task.parameters(), *task.buffers()] if t.is_floating_point()} == {torch.float64}
    images, target = create_batch()
    assert task(images.double(), target)['loss'].dtype == torch.float64


def test_deep_copy_trains_on_its_own() -> None:
    task = create_task()
    clone = copy.deepcopy(task)
    before = state_of(task.module)
    train(clone)
    assert_same(state_of(task.module), before)


# Several processes

def _create_ddp_task() -> DistillTask:
    """Return a task without batch norms, whose statistics would be each process's own."""
    student = create_model('test_vit', img_size=32)
    return create_distill_task(
        student, create_model('test_convnext', seed=7), kd='norm+kd', input_size=SIZE, dtype=torch.float64,
        kd_kwargs={'norm.segments': 2, 'norm.batch_norm': False}, verbose=False).train()


def _gradients(task: DistillTask, images: torch.Tensor, target: torch.Tensor) -> Dict[str, torch.Tensor]:
    task(images.double(), target)['loss'].backward()
    return {name: p.grad for name, p in task.module.named_parameters()}


def _run_rank(rank: int, world_size: int) -> Dict[str, Any]:
    task = _create_ddp_task()
    task.prepare_distributed(device_ids=[torch.device('cpu')])
    images, target = create_batch(8)
    part = slice(4 * rank, 4 * rank + 4)
    gradients = _gradients(task, images[part], target[part])
    return {'gradients': gradients, 'state': task.get_checkpoint_state()}


@pytest.mark.dist
def test_two_processes_give_the_gradients_and_checkpoint_of_the_joint_batch(tmp_path: Path) -> None:
    task = _create_ddp_task()
    expected = _gradients(task, *create_batch(8))
    state = task.get_checkpoint_state()
    for saved in run_ranks(_run_rank, tmp_path):
        assert saved['gradients'].keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(saved['gradients'][name], gradient, rtol=1e-9, atol=1e-12)
        assert_same(saved['state']['state_dict'], state['state_dict'])


# A student that comes with weights

def logits_after_steps(kd: str, student: nn.Module, steps: int = 3, **options: Any) -> torch.Tensor:
    """Return the saved student's logits after steps of a learning rate that changes running statistics alone."""
    task = create_task(kd, student=copy.deepcopy(student), **options)
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=1e-9)
    for step in range(steps):
        images, target = create_batch(16, seed=step)
        task(images, target)['loss'].backward()
        optimizer.step()
    plain = copy.deepcopy(student)
    plain.load_state_dict(task.get_checkpoint_state()['state_dict'])
    with torch.no_grad():
        return plain.eval()(create_batch(64, seed=9)[0])


@pytest.mark.parametrize('steps', [0, 3])
@pytest.mark.parametrize('kd_tap', ['features', 'pre_logits'])
@pytest.mark.parametrize('name', ['test_resnet', 'test_efficientnet', 'test_vit'])
def test_student_that_comes_with_weights_keeps_its_accuracy_until_it_learns(
        name: str, kd_tap: str, steps: int) -> None:
    student = create_model(name, **(dict(img_size=SIZE[1]) if name == 'test_vit' else {}))
    expected = logits_after_steps('none', student, steps)
    options = dict(kd_tap=kd_tap, student_pretrained=True)
    actual = logits_after_steps('norm', student, steps, kd_kwargs={'norm.segments': 2}, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(actual.argmax(1), expected.argmax(1))
    official = logits_after_steps('norm', student, steps, kd_kwargs={'norm.init': 'official'}, **options)
    assert not torch.allclose(official, expected, rtol=0.1, atol=0.1 * expected.std().item())


@pytest.mark.parametrize('student,options,identity', [
    ('test_resnet', {}, True),
    ('test_resnet', dict(student_pretrained=False), True),
    ('module', {}, True),
    ('module', dict(student_pretrained=True), True),
    ('test_resnet', dict(student_kwargs=dict(checkpoint_path='student.pth')), True),
    ('test_resnet', dict(kd_kwargs={'norm.init': 'official'}), False),
])
def test_adapter_starts_as_the_identity_unless_it_is_told_to_start_at_random(
        student: str, options: Dict[str, Any], identity: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(create_model().state_dict(), 'student.pth')
    task = create_distill_task(
        create_model() if student == 'module' else student, create_model('test_convnext', seed=7), kd='norm',
        num_classes=CLASSES, input_size=SIZE, verbose=False, **options)
    assert bool((task.module.adapters[0].contract_bn.weight == 0).all()) == identity
