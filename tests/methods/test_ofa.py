"""OFA's loss against the official code's numbers, and its projectors."""
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden_data import GoldenCase, assert_golden, case_id, golden_cases

from timm_distill import UsageError, create_method
from timm_distill.features.spec import Features, FeatureSpec, PairSpec, Stage
from timm_distill.methods.ofa import ofa_loss

each_case = pytest.mark.parametrize('case', golden_cases('ofa'), ids=case_id)
SHAPES = [(4, 16, 16), (6, 8, 8), (8, 4, 4), (10, 2, 2)]


def create_spec(feature: Any, shapes: Any = ()) -> FeatureSpec:
    stages = tuple(Stage(i, shape) for i, shape in enumerate(shapes))
    return FeatureSpec(5, feature, feature[0], stages, (3, 32, 32))


def create_pair(shapes: Any = tuple(SHAPES)) -> PairSpec:
    return PairSpec(create_spec(shapes[-1], shapes), create_spec((12, 3, 3)))


@each_case
def test_loss_and_gradient_equal_the_official_codes(case: GoldenCase) -> None:
    logits = case['logit_s'].clone().requires_grad_()
    loss = ofa_loss(logits, case['logit_t'], case['target'], case.hparams['eps'], case.hparams['temperature'])
    assert_golden(loss, case['loss'])
    loss.backward()
    assert_golden(logits.grad, case['grad.logit_s'])


@each_case
def test_soft_targets_count_by_their_largest_class(case: GoldenCase) -> None:
    soft = F.one_hot(case['target'], case['logit_s'].shape[1]) * 0.6 + 0.01
    args = case['logit_s'], case['logit_t']
    assert_golden(ofa_loss(*args, soft, case.hparams['eps'], case.hparams['temperature']), case['loss'])


@pytest.mark.parametrize('logit', [-1e4, 1e4])
def test_confident_models_give_a_finite_loss_and_gradient(logit: float) -> None:
    student = torch.tensor([[logit, 0.]], requires_grad=True)
    loss = ofa_loss(student, torch.tensor([[0., logit]]), torch.tensor([1]), 1.5)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(student.grad).all()


@pytest.mark.parametrize('shapes', [SHAPES, [(6, 7, 7)] * 4, [(6, 1, 1)]], ids=['stages', 'one grid', 'a vector'])
@pytest.mark.parametrize('batch_size', [1, 3])
def test_every_stage_is_projected_to_logits(shapes: Any, batch_size: int) -> None:
    method = create_method('ofa')
    method.build(create_pair(shapes))
    stages = tuple(torch.randn(batch_size, *shape, requires_grad=True) for shape in shapes)
    assert [projector(x).shape for projector, x in zip(method.projectors, stages)] == [(batch_size, 5)] * len(shapes)
    teacher = Features(logits=torch.randn(batch_size, 5))
    losses = method(Features(logits=torch.randn(batch_size, 5), stages=stages), teacher, torch.arange(batch_size))
    losses['ofa_stages_loss'].backward()
    assert all(torch.isfinite(stage.grad).all() and stage.grad.abs().sum() > 0 for stage in stages)
    assert all(torch.isfinite(p.grad).all() for p in method.parameters())


def test_stages_and_final_logits_have_exponents_of_their_own() -> None:
    method = create_method('ofa', eps=1.5, stage_eps=[1., 1.2], stages=2)
    method.build(create_pair())
    stages = tuple(torch.randn(2, *shape) for shape in SHAPES)
    student, teacher, target = torch.randn(2, 5), torch.randn(2, 5), torch.tensor([1, 3])
    losses = method.eval()(Features(logits=student, stages=stages), Features(logits=teacher), target)
    torch.testing.assert_close(losses['ofa_logits_loss'], ofa_loss(student, teacher, target, 1.5))
    expected = sum(
        ofa_loss(projector(stage), teacher, target, eps)
        for projector, stage, eps in zip(method.projectors, stages[2:], (1., 1.2)))
    torch.testing.assert_close(losses['ofa_stages_loss'], expected)


@pytest.mark.parametrize('options, message', [
    (dict(eps=0.), 'ofa.eps'), (dict(temperature=-1.), 'ofa.temperature'), (dict(stages=0), 'ofa.stages'),
    (dict(stage_eps=[1., 2.]), '2 values for 4 stages'), (dict(stage_eps='no'), 'ofa.stage_eps')])
def test_wrong_option_is_named(options: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        create_method('ofa', **options).build(create_pair())
