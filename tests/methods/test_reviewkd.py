"""ReviewKD against the official codes' numbers, and over stages of any two models."""
from typing import Any, List

import pytest
import torch
from golden_data import GoldenCase, assert_golden, case_id, golden_cases

from timm_distill import UsageError, create_method
from timm_distill.features.spec import Features, FeatureSpec, PairSpec, Stage
from timm_distill.methods.reviewkd import ReviewKD, hierarchical_context_loss

FUSION_CASES = golden_cases('reviewkd', having='abfs.0.conv1.0.weight')


def create_golden_method(case: GoldenCase) -> ReviewKD:
    hparams = case.hparams
    method = create_method('reviewkd', mid_channels=hparams.get('mid_channel', 0))
    method.build_fusions(list(zip(hparams['in_channels'], hparams['out_channels'])))
    state = case.under('abfs.')
    method.double().abfs.load_state_dict(state, strict=False)  # batch counters start at 0
    assert set(state) == {name for name in method.abfs.state_dict() if not name.endswith('num_batches_tracked')}
    return method.train()


@pytest.mark.parametrize('case', FUSION_CASES, ids=case_id)
def test_fusion_loss_and_gradients_equal_the_official_codes(case: GoldenCase) -> None:
    method = create_golden_method(case)
    student = [feature.clone().requires_grad_() for feature in case.stages('feat_s')]
    teacher = case.stages('feat_t')
    outputs, fused = method.review(student, [feature.shape[-2:] for feature in teacher])
    for output, expected in zip(outputs, case.stages('out')):
        assert_golden(output, expected)
    for residual, expected in zip(fused, case.stages('residual')):
        assert_golden(residual, expected)
    losses = torch.stack([hierarchical_context_loss(*pair) for pair in zip(outputs, teacher)])
    assert_golden(losses.sum(), case['loss'])
    losses.sum().backward()
    for feature, expected in zip(student, case.stages('grad.feat_s')):
        assert_golden(feature.grad, expected, rtol=1e-7)
    gradients = case.under('grad.abfs.')
    assert set(gradients) == {name for name, _ in method.abfs.named_parameters()}
    for name, parameter in method.abfs.named_parameters():
        assert_golden(parameter.grad, gradients[name], rtol=1e-7)


@pytest.mark.parametrize('case', FUSION_CASES, ids=case_id)
def test_method_adds_the_pre_logits_as_the_deepest_stage(case: GoldenCase) -> None:
    method = create_golden_method(case)
    student, teacher = case.stages('feat_s'), case.stages('feat_t')
    method.pairs = tuple((i, i) for i in range(len(student) - 1))
    features = [Features(stages=tuple(x[:-1]), pre_logits=x[-1].flatten(1)) for x in (student, teacher)]
    assert_golden(method(*features, torch.zeros(1))['reviewkd_loss'], case['loss'])


@pytest.mark.parametrize('case', golden_cases('reviewkd', lacking='abfs.0.conv1.0.weight'), ids=case_id)
def test_hierarchical_context_loss_equals_the_official_codes(case: GoldenCase) -> None:
    student = [feature.clone().requires_grad_() for feature in case.stages('feat_s')]
    losses = torch.stack([hierarchical_context_loss(*pair) for pair in zip(student, case.stages('feat_t'))])
    assert_golden(losses, case['loss_per_stage'])
    assert_golden(losses.sum(), case['loss'])
    losses.sum().backward()
    for feature, expected in zip(student, case.stages('grad.feat_s')):
        assert_golden(feature.grad, expected)


def create_spec(shapes: List[Any], pre_logits: int) -> FeatureSpec:
    stages = tuple(Stage(i, shape) for i, shape in enumerate(shapes))
    return FeatureSpec(5, shapes[-1], pre_logits, stages, (3, 32, 32))


def create_features(spec: FeatureSpec, batch_size: int) -> Features:
    stages = tuple(torch.randn(batch_size, *stage.shape, requires_grad=True) for stage in spec.stages)
    return Features(stages=stages, pre_logits=torch.randn(batch_size, spec.pre_logits, requires_grad=True))


STUDENT = create_spec([(4, 16, 16), (6, 8, 8), (8, 4, 4), (10, 2, 2)], 10)
TEACHERS = {
    'convolutional': create_spec([(3, 16, 16), (5, 8, 8), (7, 4, 4), (9, 2, 2)], 11),
    'one grid': create_spec([(12, 7, 7)] * 4, 12),
    'not square': create_spec([(3, 16, 8), (5, 8, 4), (7, 4, 2), (9, 2, 1)], 11),
    'a vector': create_spec([(12, 1, 1)], 12),
}


@pytest.mark.parametrize('teacher', TEACHERS)
@pytest.mark.parametrize('batch_size', [1, 2])
def test_stages_of_any_grid_are_compared_in_batches_of_any_size(teacher: str, batch_size: int) -> None:
    method = create_method('reviewkd')
    method.build(PairSpec(STUDENT, TEACHERS[teacher]))
    student = create_features(STUDENT, batch_size)
    loss = method(student, create_features(TEACHERS[teacher], batch_size), torch.zeros(1))['reviewkd_loss']
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in method.parameters())


def test_number_of_stages_counts_from_the_deepest() -> None:
    method = create_method('reviewkd', stages=2)
    method.build(PairSpec(STUDENT, TEACHERS['convolutional']))
    assert method.pairs == ((2, 2), (3, 3)) and len(method.abfs) == 3


@pytest.mark.parametrize('options, message', [
    (dict(stages=0), 'reviewkd.stages'), (dict(mid_channels=-1), 'reviewkd.mid_channels')])
def test_wrong_option_is_named(options: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        create_method('reviewkd', **options)
