"""AB against the official code's numbers, and its options."""
import pytest
import torch
from golden_data import GoldenCase, assert_golden, case_id, golden_cases

from timm_distill import UsageError, create_method
from timm_distill.methods.ab import activation_boundary_loss, match_responses


@pytest.mark.parametrize('case', golden_cases('ab'), ids=case_id)
def test_loss_and_gradients_equal_the_official_codes(case: GoldenCase) -> None:
    students = [x.clone().requires_grad_() for x in case.stages('feat_s')]
    teachers, margin = case.stages('feat_t'), case.hparams['margin']
    loss = activation_boundary_loss(students, teachers, margin)
    assert_golden(loss, case['loss'])
    for i, expected in enumerate(case['loss_per_stage']):
        depth = len(students) - 1 - i
        assert_golden(activation_boundary_loss([students[i]], [teachers[i]], margin) / 2 ** depth, expected)
    for actual, expected in zip(torch.autograd.grad(loss, students), case.stages('grad.feat_s')):
        assert_golden(actual, expected)


def test_a_relu_on_the_teacher_changes_nothing() -> None:
    student, teacher = torch.randn(2, 3, 4, 5, 5)
    assert activation_boundary_loss([student], [teacher]) == activation_boundary_loss([student], [teacher.relu()])


def test_responses_beyond_the_margin_on_the_teachers_side_have_no_loss() -> None:
    teacher = torch.randn(3, 4, 5, 5)
    assert activation_boundary_loss([1.5 * teacher.sign()], [teacher], margin=1.) == 0


def test_a_larger_teacher_grid_is_picked_from_and_not_averaged_which_would_change_signs() -> None:
    student, teacher = match_responses(torch.randn(2, 3, 4, 4), torch.randn(2, 5, 8, 8).relu())
    assert student.shape[2:] == teacher.shape[2:] == (4, 4)
    assert 0.3 < (teacher > 0).float().mean() < 0.7


def test_published_first_phase_is_a_named_schedule() -> None:
    assert create_method('ab').schedules['initialize'] == ((0, 1.), (30, 0.))


def test_margin_must_be_positive() -> None:
    with pytest.raises(UsageError, match='ab.margin'):
        create_method('ab', margin=0.)
