"""FitNet against the official code's numbers, and its regressors."""
from typing import Any, Tuple

import pytest
import timm
import torch
from feature_pairs import create_features, create_pair
from golden_data import GoldenCase, assert_golden, case_id, golden_cases

from timm_distill import UsageError, create_distill_task, create_method
from timm_distill.methods._layers import HintRegressor
from timm_distill.methods.fitnet import hint_loss

CASES = golden_cases('fitnet')


def create_regressor(case: GoldenCase) -> HintRegressor:
    shapes: Any = [tuple(case[name].shape[1:]) for name in ('feat_s', 'feat_t')]
    regressor = HintRegressor(*shapes, largest_ratio=float('inf')).double().train()
    weights = {f'{part}.{k}': v for part in ('conv', 'bn') for k, v in case.under(f'{part}.').items()}
    assert not regressor.load_state_dict(weights, strict=False).unexpected_keys
    return regressor


@pytest.mark.parametrize('case', CASES, ids=case_id)
def test_loss_and_gradients_equal_the_official_codes(case: GoldenCase) -> None:
    regressor = create_regressor(case)
    student = case['feat_s'].clone().requires_grad_()
    regressed = regressor(student)
    loss = hint_loss([regressed], [case['feat_t']])
    loss.backward()
    assert_golden(regressed, case['regressed'])
    assert_golden(loss, case['loss'])
    assert_golden(student.grad, case['grad.feat_s'])
    scale = case['grad.conv.weight'].abs().max().item()
    for name, parameter in regressor.named_parameters():
        # the convolution's bias stands in front of a batch norm: its gradient is rounding alone
        torch.testing.assert_close(parameter.grad, case[f'grad.{name}'], rtol=1e-9, atol=1e-12 * scale)
    for name, expected in case.under('after.').items():
        assert_golden(regressor.state_dict()[name], expected)


@pytest.mark.parametrize('student, teacher, grid', [
    ((8, 8), (4, 4), (4, 4)), ((4, 4), (8, 8), (8, 8)), ((7, 7), (6, 5), (6, 5)), ((14, 14), (3, 3), (14, 14)),
    ((9, 9), (4, 4), (4, 4)), ((9, 6), (4, 3), (4, 3)), ((12, 12), (4, 4), (12, 12)),
    ((2, 2), (7, 7), (2, 2)), ((8, 4), (4, 4), (4, 4)),
])
def test_any_two_grids_have_a_regressor(student: Tuple, teacher: Tuple, grid: Tuple) -> None:
    regressed = HintRegressor((3, *student), (5, *teacher))(torch.randn(2, 3, *student))
    assert regressed.shape == (2, 5, *grid)
    assert torch.isfinite(hint_loss([regressed], [torch.randn(2, 5, *teacher)]))


@pytest.mark.parametrize('student, teacher', [((9, 9), (4, 4)), ((14, 14), (3, 3)), ((9, 5), (4, 5))])
def test_kernel_covers_the_difference_of_the_grids(student: Tuple, teacher: Tuple) -> None:
    regressor = HintRegressor((3, *student), (5, *teacher), largest_ratio=5.)
    assert regressor.conv.kernel_size == tuple(1 + s - t for s, t in zip(student, teacher))
    assert regressor(torch.randn(2, 3, *student)).shape == (2, 5, *teacher)


def test_the_largest_ratio_is_an_option() -> None:
    student, teacher = create_features('student', grids=(9,)), create_features('teacher', grids=(4,))
    for ratio, kernel in ((3., (6, 6)), (2., (1, 1))):
        method = create_method('fitnet', largest_ratio=ratio)
        method.build(create_pair(student, teacher))
        assert method.regressors[0].conv.kernel_size == kernel
        assert torch.isfinite(method(student, teacher, torch.zeros(4))['fitnet_loss'])


def test_regressor_ends_with_a_relu_where_the_teachers_stage_does() -> None:
    student = timm.create_model('test_efficientnet', num_classes=5)
    for name, relu in (('test_resnet', True), ('test_vit', False)):
        teacher = timm.create_model(name, num_classes=5, **(dict(img_size=32) if name == 'test_vit' else {}))
        for option, expected in ((None, relu), (True, True), (False, False)):
            task = create_distill_task(
                student, teacher, kd='fitnet', kd_kwargs={'fitnet.relu': option},
                input_size=(3, 32, 32), verbose=False)
            assert [r.relu for r in task.module.methods['fitnet'].regressors] == [expected], (name, option)


def test_relu_is_a_switch() -> None:
    with pytest.raises(UsageError, match='fitnet.relu'):
        create_method('fitnet', relu='yes')
