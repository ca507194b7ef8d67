"""AT against the official code's numbers, and its options."""
import pytest
import torch
from feature_pairs import create_features, create_pair
from golden_data import GoldenCase, assert_golden, case_id, golden_cases

from timm_distill import UsageError, create_method
from timm_distill.methods.at import attention_map, attention_transfer_loss


@pytest.mark.parametrize('case', golden_cases('at'), ids=case_id)
def test_loss_and_gradients_equal_the_official_codes(case: GoldenCase) -> None:
    students = [x.clone().requires_grad_() for x in case.stages('feat_s')]
    teachers, power = case.stages('feat_t'), case.hparams['p']
    loss = attention_transfer_loss(students, teachers, power)
    assert_golden(loss, case['loss'])
    for expected, s, t in zip(case['loss_per_stage'], students, teachers):
        assert_golden(attention_transfer_loss([s], [t], power), expected)
    for actual, expected in zip(torch.autograd.grad(loss, students), case.stages('grad.feat_s')):
        assert_golden(actual, expected)


@pytest.mark.parametrize('power', [2., 3., 4.])
def test_attention_map_is_the_mean_power_at_each_position_with_unit_length(power: float) -> None:
    feature = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    energy = feature.abs().pow(power).mean(1).flatten(1)
    torch.testing.assert_close(attention_map(feature, power), energy / energy.norm(dim=1, keepdim=True))


def test_a_scaled_feature_has_the_same_attention() -> None:
    x = torch.randn(2, 3, 4, 4)
    assert attention_transfer_loss([5 * x], [x]) < 1e-12


def test_stages_with_a_single_position_are_left_out_because_their_attention_is_constant() -> None:
    student, teacher = create_features('student'), create_features('teacher')
    method = create_method('at')
    method.build(create_pair(student, teacher))
    grids = [student.stages[i].shape[-1] for i, _ in method.pairs]
    assert student.stages[-1].shape[-1] == 1 and grids == [8, 4]


def test_a_pair_without_positions_is_refused_with_alternatives() -> None:
    student, teacher = create_features('student', grids=(1,)), create_features('teacher', grids=(1,))
    with pytest.raises(UsageError, match='at compares positions.*--kd rkd'):
        create_method('at').build(create_pair(student, teacher))


@pytest.mark.parametrize('power', [1., 0., float('inf')])
def test_power_must_be_more_than_one(power: float) -> None:
    with pytest.raises(UsageError, match='at.power'):
        create_method('at', power=power)
