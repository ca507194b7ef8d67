"""WKD-L against the official code's numbers, and its Sinkhorn iterations at their limits."""
import math
from typing import Any

import pytest
import timm
import torch
from golden_data import GoldenCase, assert_golden, case_id, golden_cases

from timm_distill import DistillTask, UsageError, create_distill_task, create_method
from timm_distill.features.spec import Features
from timm_distill.methods import DistillMethod
from timm_distill.methods._schedules import create_weight_schedule
from timm_distill.methods.wkd_l import classifier_cost, others_distribution, transport

CASES = golden_cases('wkd', having='cost')


def create_golden(case: GoldenCase) -> DistillMethod:
    hparams = case.hparams
    return create_method(
        'wkd_l', distance_weight=float(case['logit_weight_now']), temperature=hparams['temperature'],
        regularization=hparams['sinkhorn_lambda'], iterations=hparams['sinkhorn_iter'],
        sharpen=float(hparams['cost_sharpen']))


@pytest.mark.parametrize('case', CASES, ids=case_id)
def test_terms_and_gradient_equal_the_official_codes(case: GoldenCase) -> None:
    logits, method = case['logit_s'].clone().requires_grad_(), create_golden(case)
    if 'fc_t.weight' in case:
        method.set_classifier(case['fc_t.weight'])
        assert_golden(method.cost, case['cost'])
    else:
        method.cost = case['cost']
    terms = method(Features(logits=logits), Features(logits=case['logit_t']), case['target'])
    assert_golden(terms['wkd_l_target_loss'], case['loss_target'])
    assert_golden(terms['wkd_l_loss'], case['logit_weight_now'] * case['loss_wd'])
    loss = sum(terms.values())
    if 'grad_kd.logit_s' in case:
        assert_golden(loss, case['loss_kd'])
        assert_golden(torch.autograd.grad(loss, logits)[0], case['grad_kd.logit_s'])


@pytest.mark.parametrize('case', CASES, ids=case_id)
def test_plan_equals_the_official_codes(case: GoldenCase) -> None:
    hparams, target = case.hparams, case['target']
    student, teacher = (
        others_distribution(case[f'logit_{side}'], target, hparams['temperature']) for side in ('s', 't'))
    _, u, v = transport(
        student, teacher, case['cost'], target, hparams['sinkhorn_lambda'], hparams['sinkhorn_iter'])
    kernel = torch.exp(-(case['cost'].relu() + 1e-8) / hparams['sinkhorn_lambda'])
    plan = u[:, :, None] * kernel * v[:, None]
    for flow, expected, label in zip(plan, case['flow'], target):
        others = [k for k in range(len(kernel)) if k != label]
        assert_golden(flow[others][:, others], expected)


@pytest.mark.parametrize('case', CASES, ids=case_id)
def test_weight_of_the_distance_decays_as_the_official_codes(case: GoldenCase) -> None:
    hparams = case.hparams
    schedule = create_weight_schedule(f'decay:{hparams["cosine_decay_epoch"]}', num_epochs=hparams['epochs'])
    now = hparams['logit_weight'] * schedule(hparams['epoch'] - 1)  # epochs count from 1 there
    assert now == pytest.approx(case['logit_weight_now'].item(), rel=1e-12)


def create_built(classes: int = 5, **options: Any) -> DistillMethod:
    method = create_method('wkd_l', **options)
    method.set_classifier(torch.randn(classes, 8))
    return method


@pytest.mark.parametrize('classes', [2, 3, 50])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('size', [0., 1., 30., 3e4])
def test_logits_of_any_size_have_a_finite_loss_and_gradient(classes: int, dtype: torch.dtype, size: float) -> None:
    torch.manual_seed(0)
    student = (size * torch.randn(4, classes)).clamp(-6e4, 6e4).to(dtype).requires_grad_()
    teacher = (size * torch.randn(4, classes)).clamp(-6e4, 6e4).to(dtype)
    for regularization in (0.05, 0.01):
        method = create_built(classes, regularization=regularization)
        terms = method(Features(logits=student), Features(logits=teacher), torch.tensor([0, 1, 1, 0]))
        sum(terms.values()).backward()
        assert all(term.dtype == torch.float32 and torch.isfinite(term) for term in terms.values())
        assert torch.isfinite(student.grad).all()


def test_a_student_that_equals_its_teacher_has_almost_no_distance() -> None:
    logits = torch.randn(4, 5)
    method = create_method('wkd_l', iterations=200)
    method.set_classifier(torch.eye(5))  # classes that are all equally far
    assert method(Features(logits=logits), Features(logits=logits), torch.arange(4))['wkd_l_loss'] < 1e-3


def test_the_largest_class_of_a_soft_label_is_the_target() -> None:
    student, teacher, target = torch.randn(3, 5), torch.randn(3, 5), torch.arange(3)
    method = create_built()
    hard, soft = (
        method(Features(logits=student), Features(logits=teacher), labels)
        for labels in (target, 0.6 * torch.eye(5)[target] + 0.4 * torch.eye(5)[target + 1]))
    torch.testing.assert_close(soft, hard)


@pytest.mark.parametrize('weight', [None, torch.randn(1, 4)])
def test_a_teacher_without_a_linear_classifier_of_two_classes_is_refused(weight: Any) -> None:
    with pytest.raises(UsageError, match="wkd_l takes the cost between classes from the teacher's classifier"):
        create_method('wkd_l').set_classifier(weight)


def test_cost_is_that_of_the_teachers_own_classifier() -> None:
    task = create_task()
    expected = classifier_cost(task.teacher.model.get_classifier().weight)
    torch.testing.assert_close(task.module.methods['wkd_l'].cost, expected)


def create_task(**options: Any) -> DistillTask:
    torch.manual_seed(0)
    return create_distill_task(
        timm.create_model('test_efficientnet', num_classes=5), timm.create_model('test_resnet', num_classes=5),
        kd='wkd_l', input_size=(3, 32, 32), verbose=False, **options).train()


def test_a_schedule_acts_on_the_distance_and_leaves_the_target_term() -> None:
    task = create_task(kd_schedule={'wkd_l': 'decay:1'}, num_epochs=3)
    batch = torch.randn(4, 3, 32, 32), torch.arange(4)
    for epoch, factor in enumerate((1., 0.5, 0.)):
        task.set_epoch(epoch)
        result = task(*batch)
        weights = task.term_weights()
        assert weights['wkd_l'] == pytest.approx(factor, abs=1e-12) and weights['wkd_l_target'] == 1.
        expected = result['task_loss'] + result['wkd_l_target_loss'] + weights['wkd_l'] * result['wkd_l_loss']
        torch.testing.assert_close(result['loss'], expected)
        torch.testing.assert_close(result['loss'], sum(task.weighted_terms(result).values()))
        assert result['wkd_l_target_loss'].requires_grad and task.changes_terms(epoch) == (epoch != 1)
    task.weights['wkd_l'] = 0.
    task.set_epoch(0)
    assert not task(*batch)['wkd_l_target_loss'].requires_grad


def test_a_decay_needs_the_length_of_the_run() -> None:
    with pytest.raises(UsageError, match='num_epochs'):
        create_task(kd_schedule={'wkd_l': 'decay:1'})
    with pytest.raises(UsageError, match='decay:-1'):
        create_task(kd_schedule={'wkd_l': 'decay:-1'}, num_epochs=3)
    held = create_weight_schedule('decay:5', num_epochs=3)
    assert [held(epoch) for epoch in range(3)] == [1., 1., 1.]


def test_cost_is_one_minus_the_cosine_sharpened() -> None:
    weight = torch.tensor([[2., 0.], [0., 3.], [-1., 0.]])
    expected = torch.tensor([[0., 1., 2.], [1., 0., 1.], [2., 1., 0.]])
    torch.testing.assert_close(classifier_cost(weight, 0.), expected)
    torch.testing.assert_close(classifier_cost(weight, 2.)[0, 1].item(), 1 - math.exp(-2.))
