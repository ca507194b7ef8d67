"""FSP against the official code's numbers, and for stages that it could not compare."""
import pytest
import torch
import torch.nn as nn
from feature_pairs import create_features, create_pair
from golden_data import GoldenCase, assert_golden, case_id, golden_cases

from timm_distill import UsageError, create_method
from timm_distill.losses import match_grids
from timm_distill.methods.fsp import flow_loss


def flow(bottom: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    """Return the flow matrix by its definition, [B, C_top, C_bottom]."""
    bottom, top = match_grids(bottom, top)
    return torch.einsum('bchw,bdhw->bdc', bottom, top) / (top.shape[2] * top.shape[3])


@pytest.mark.parametrize('case', golden_cases('fsp'), ids=case_id)
def test_loss_and_gradients_equal_the_official_codes(case: GoldenCase) -> None:
    students = [x.clone().requires_grad_() for x in case.stages('feat_s')]
    teachers = case.stages('feat_t')
    loss = flow_loss(students, teachers)
    assert_golden(loss, case['loss'])
    for i, (expected, matrix) in enumerate(zip(case['loss_per_stage'], case.stages('fsp_s'))):
        assert_golden(flow_loss(students[i:i + 2], teachers[i:i + 2]), expected)
        assert_golden(flow(*students[i:i + 2]), matrix)
    for actual, expected in zip(torch.autograd.grad(loss, students), case.stages('grad.feat_s')):
        assert_golden(actual, expected)


@pytest.mark.parametrize('channels', [3, 80], ids=['narrow', 'wide'])
def test_both_forms_are_the_distance_of_flow_matrices(channels: int) -> None:
    student = [torch.randn(2, channels, 4, 4, dtype=torch.float64), torch.randn(2, channels, 2, 2, dtype=torch.float64)]
    teacher = [torch.randn(2, channels, 6, 6, dtype=torch.float64), torch.randn(2, channels, 3, 3, dtype=torch.float64)]
    expected = (flow(*student) - flow(*teacher)).square().mean()
    torch.testing.assert_close(flow_loss(student, teacher), expected)


def test_stages_of_equal_width_have_no_connector_and_others_a_linear_one() -> None:
    student, teacher = create_features('student'), create_features('teacher')
    method = create_method('fsp')
    method.build(create_pair(student, teacher))
    assert [type(c) for c in method.connectors] == [nn.Conv2d] * 3
    method.build(create_pair(teacher, teacher))
    assert [type(c) for c in method.connectors] == [nn.Identity] * 3
    assert method(teacher, teacher, torch.zeros(1))['fsp_loss'] < 1e-10


@pytest.mark.parametrize('method', ['fsp', 'kdsvd'])
def test_a_single_stage_is_refused_with_alternatives(method: str) -> None:
    student, teacher = create_features('student', grids=(4,)), create_features('teacher', grids=(4,))
    with pytest.raises(UsageError, match=f'{method} compares.*--kd at, sp or fitnet'):
        create_method(method).build(create_pair(student, teacher))
