"""NORM against the official code's numbers, and its options."""
from functools import partial
from typing import Any, Dict, List

import pytest
import torch
import torch.nn as nn
from golden_data import (
    GoldenCase,
    GoldenStudent,
    GoldenTeacher,
    adapter_state,
    assert_golden,
    case_id,
    create_golden_adapter,
    golden_cases,
    golden_forms,
    golden_match,
    golden_tap,
)

from timm_distill import DistillTask, UsageError, create_adapter, create_method
from timm_distill.adapters import Match
from timm_distill.features.spec import Features
from timm_distill.losses import match_grids, n_to_one_loss, standardize_logits
from timm_distill.methods.norm import SCHEDULES
from timm_distill.student.adapted import AdaptedStudent

FT_CASES = golden_cases('norm_ft', having='x')
STAGE_CASES = golden_cases('norm_ft', having='fea_s.0')
SCHEDULE_CASES = golden_cases('norm_schedule')


def official_loss(expanded: torch.Tensor, teacher: torch.Tensor, segments: int) -> torch.Tensor:
    return n_to_one_loss(*match_grids(expanded, teacher, pool='max'), segments)


def schedule_name(case: GoldenCase) -> str:
    return case.hparams['dataset'].rstrip('0123456789')


@pytest.mark.parametrize('case,form', golden_forms(FT_CASES))
def test_loss_and_gradients_equal_the_official_codes(case: GoldenCase, form: str) -> None:
    adapter = create_golden_adapter(case, form).train()
    x = case['x'].clone().requires_grad_()
    result = adapter(x, golden_match(case))
    loss = result.loss
    total = loss + (result.output * case['G']).sum()
    parameters = {**dict(adapter.named_parameters()), 'x': x}

    assert_golden(loss, case['loss'])
    assert_golden(total, case['loss_total'])
    only = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
    _compare_gradients(case, 'grad_loss_only.', dict(zip(parameters, only)))
    _compare_gradients(case, 'grad.', dict(zip(parameters, torch.autograd.grad(total, list(parameters.values())))))


@pytest.mark.parametrize('case,form', golden_forms(FT_CASES))
def test_contracting_half_gets_no_gradient_from_the_loss(case: GoldenCase, form: str) -> None:
    adapter = create_golden_adapter(case, form).train()
    adapter(case['x'].clone().requires_grad_(), golden_match(case)).loss.backward()
    contracting = [p.grad for name, p in adapter.named_parameters() if name.startswith('contract')]
    assert all(gradient is None or not gradient.any() for gradient in contracting)


@pytest.mark.parametrize('case', STAGE_CASES, ids=case_id)
def test_several_stages_sum_from_the_deepest_upwards(case: GoldenCase) -> None:
    student = [fea.clone().requires_grad_() for fea in case.stages('fea_s')]
    teacher = case.stages('t')
    segments = case.hparams['co_sponge']
    loss = torch.stack([official_loss(s, t, segments) for s, t in zip(student[::-1], teacher[::-1])]).sum()
    assert_golden(loss, case['loss'])
    for gradient, expected in zip(torch.autograd.grad(loss, student), case.stages('grad.fea_s')):
        assert_golden(gradient, expected)
    if 'loss_last_only' in case:
        assert_golden(official_loss(student[-1], teacher[-1], segments), case['loss_last_only'])


@pytest.mark.parametrize('case,form', golden_forms(golden_cases('norm_total')))
def test_complete_training_loss_and_gradients_equal_the_official_codes(case: GoldenCase, form: str) -> None:
    task = _golden_task(case, form)
    x = case['x'].clone().requires_grad_()
    result = task(x, case['target'])
    assert_golden(result['loss'], case['loss'])
    assert_golden(result['task_loss'], case['loss_cls'])
    assert_golden(result['norm_loss'], case['loss_norm'])
    assert_golden(result['kd_loss'], case['loss_div'])
    assert_golden(result['output'], case['logits'])
    scheduled = task.module.methods['norm'].weight(case.hparams['epoch'])
    assert scheduled == pytest.approx(case['beta1'].item(), rel=1e-12)
    result['loss'].backward()
    (adapter,), student = task.module.adapters, task.module.student
    assert x.grad is not None
    gradients = {name: p.grad for name, p in [*adapter.named_parameters(), *student.named_parameters()]}
    _compare_gradients(case, 'grad.', {**gradients, 'x': x.grad})


@pytest.mark.parametrize('case', golden_cases('norm_logits'), ids=case_id)
def test_standardised_logits_equal_the_official_codes(case: GoldenCase) -> None:
    for side in ('s', 't'):
        actual = standardize_logits(case[f'logit_{side}'], case.hparams['ceta'], case.hparams['eps'])
        assert_golden(actual, case[f'norm_logit_{side}'])


@pytest.mark.parametrize('case', golden_cases('norm_logits'), ids=case_id)
def test_logit_scale_changes_cross_entropy_and_kd_like_the_official_code(case: GoldenCase) -> None:
    logits = case['logit_s'].clone().requires_grad_()
    norm = create_method('norm', logit_scale=float(case.hparams['ceta']))
    kd = create_method('kd', temperature=float(case.hparams['kd_T']))
    student, teacher = norm.transform_logits(logits), norm.transform_logits(case['logit_t'])
    cls = nn.functional.cross_entropy(student, case['target'])
    div = kd(Features(logits=student), Features(logits=teacher), case['target'])['kd_loss']
    loss = case.hparams['gamma'] * cls + case.hparams['alpha'] * div

    for value, name in ((cls, '_cls'), (div, '_div'), (loss, '')):
        assert_golden(value, case[f'loss{name}'])
        assert_golden(torch.autograd.grad(value, logits, retain_graph=True)[0], case[f'grad{name}.logit_s'])


@pytest.mark.parametrize('case', SCHEDULE_CASES, ids=case_id)
def test_named_schedules_equal_the_official_weights(case: GoldenCase) -> None:
    method = create_method('norm', schedule=schedule_name(case))
    assert schedule_name(case) in SCHEDULES
    for expected in (case['beta1'], case['beta1_epochs_inclusive']):
        weights = [method.weight(epoch) for epoch in range(len(expected))]
        torch.testing.assert_close(torch.tensor(weights, dtype=torch.float64), expected, rtol=1e-12, atol=0.)
    assert len(case['beta1']) == case.hparams['epochs']


@pytest.mark.parametrize('case', SCHEDULE_CASES, ids=case_id)
def test_weight_does_not_depend_on_where_a_run_was_resumed(case: GoldenCase) -> None:
    method = create_method('norm', schedule=schedule_name(case))
    epochs = case.hparams['epochs']
    # The official code falls back to its command line's default when resumed there: beta1_resume_at_last_epoch.
    assert method.weight(epochs) == method.weight(epochs - 1) == create_method(
        'norm', schedule=schedule_name(case)).weight(epochs + 1000)


def test_segments_are_whole_copies_of_the_teacher() -> None:
    teacher = torch.randn(2, 3, 4, 4)
    assert n_to_one_loss(torch.cat([teacher] * 5, dim=1), teacher, 5) == 0
    assert n_to_one_loss(teacher.repeat_interleave(5, dim=1), teacher, 5) > 0


def test_loss_is_the_sum_of_the_segments_mean_squared_errors() -> None:
    teacher, segments = torch.randn(2, 3, 4, 4), [torch.randn(2, 3, 4, 4) for _ in range(4)]
    expected = sum(nn.functional.mse_loss(segment, teacher) for segment in segments)
    torch.testing.assert_close(n_to_one_loss(torch.cat(segments, dim=1), teacher, 4), expected)


def test_no_gradient_goes_to_the_teacher() -> None:
    expanded, teacher = torch.randn(2, 6, 2, 2, requires_grad=True), torch.randn(2, 3, 2, 2, requires_grad=True)
    n_to_one_loss(expanded, teacher, 2).backward()
    assert expanded.grad is not None and teacher.grad is None


@pytest.mark.parametrize('pool', ['avg', 'max'])
@pytest.mark.parametrize('student,teacher', [(8, 4), (4, 8), (7, 3), (3, 7), (4, 4)])
def test_spatial_mismatch_is_pooled_both_ways(pool: str, student: int, teacher: int) -> None:
    adapter = create_adapter('norm', 4, 3, segments=2, pool=pool).train()
    x, target = torch.randn(2, 4, student, student), torch.randn(2, 3, teacher, teacher)
    loss = adapter(x, Match(target, lambda positions: positions)).loss
    expected = n_to_one_loss(*match_grids(adapter.expand_contract(x)[1], target, pool), 2)
    assert loss.ndim == 0
    torch.testing.assert_close(loss, expected)


def test_losses_of_several_adapters_are_summed() -> None:
    losses = torch.rand(3)
    result = create_method('norm')(Features(matched=tuple(losses)), Features(), torch.zeros(2))
    assert result['norm_loss'] == losses.sum()


def test_student_without_adapter_is_an_error() -> None:
    with pytest.raises(ValueError, match='needs a student with its adapter'):
        create_method('norm')(Features(), Features(), torch.zeros(2))


def test_methods_options_are_the_adapters() -> None:
    method = create_method(
        'norm', segments=2, batch_norm=False, residual=False, pool='max', form='direct', init='official')
    adapter = create_adapter(method.adapter, 4, 3, **method.adapter_options)
    actual = (adapter.segments, adapter.batch_norm, adapter.residual, adapter.pool, adapter.form, adapter.init)
    assert actual == (2, False, False, 'max', 'direct', 'official')


def test_logit_standardisation_is_off_by_default() -> None:
    logits = torch.randn(2, 5)
    assert create_method('norm').transform_logits(logits) is logits


@pytest.mark.parametrize('options,names', [
    (dict(schedule='imagenet22k'), ['norm.schedule', 'const', 'imagenet', 'cifar']),
    (dict(logit_scale=-1.), ['norm.logit_scale', '-1']),
    (dict(segment=4), ['norm.segment', 'norm.segments']),
])
def test_wrong_option_names_value_and_what_is_allowed(options: Dict[str, Any], names: List[str]) -> None:
    with pytest.raises(UsageError) as error:
        create_method('norm', **options)
    assert all(name in str(error.value) for name in names)


@pytest.mark.parametrize('option,known', [
    ('pool', ['avg', 'max']), ('form', ['auto', 'direct', 'moments']),
    ('init', ['auto', 'identity', 'official'])])
def test_wrong_option_of_the_adapter_names_value_and_what_is_allowed(option: str, known: List[str]) -> None:
    method, adapter = partial(create_method, 'norm'), partial(create_adapter, create_method('norm').adapter, 4, 3)
    for create in (method, adapter):
        with pytest.raises(UsageError) as error:
            create(**{option: 'median'})
        assert all(name in str(error.value) for name in (f"norm.{option}='median'", '--kd-kwargs', *known))


def _golden_task(case: GoldenCase, form: str) -> DistillTask:
    hparams = case.hparams
    methods = {
        'norm': create_method(
            'norm', segments=hparams['co_sponge'], schedule=schedule_name(case),
            logit_scale=float(hparams['ceta'])),
        'kd': create_method('kd', temperature=float(hparams['kd_T'])),
    }
    module = AdaptedStudent(
        GoldenStudent(case), [create_golden_adapter(case, form)], golden_tap(case['x'].shape[1]), methods).train()
    task = DistillTask(
        module, GoldenTeacher(case), nn.CrossEntropyLoss(),
        {'norm': hparams['beta'], 'kd': hparams['alpha']}, hparams['gamma'], verbose=False)
    task.set_epoch(hparams['epoch'])
    return task


def _compare_gradients(case: GoldenCase, prefix: str, gradients: Dict[str, Any]) -> None:
    """Compare with every stored gradient of a prefix, so that none is forgotten."""
    stored = {**adapter_state(case, prefix)}
    stored.update({k: v for k, v in case.under(prefix).items() if not k.startswith(('expand.', 'contract.'))})
    renamed = {f'fc.{k}' if k in ('weight', 'bias') else k: v for k, v in gradients.items()}
    for name, expected in stored.items():
        assert renamed[name] is not None, name
        assert_golden(renamed[name], expected)
