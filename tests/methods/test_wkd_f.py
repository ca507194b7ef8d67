"""WKD-F against the official code's numbers, and cells of any map."""
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from feature_pairs import create_features, create_pair
from golden_data import GoldenCase, assert_golden, case_id, golden_cases

from timm_distill import UsageError, create_method
from timm_distill.methods import DistillMethod
from timm_distill.methods.wkd_f import cell_moments

CASES = golden_cases('wkd', having='feat_s')


def create_golden(case: GoldenCase) -> tuple:
    """Return the method with a case's weights and the features of both models."""
    hparams, features = case.hparams, (create_features('student'), create_features('teacher'))
    features[0].feature, features[1].feature = case['feat_s'].clone().requires_grad_(), case['feat_t']
    method = create_method(
        'wkd_f', grid=hparams['spatial_grid'], mean_weight=hparams['mean_cov_ratio'], eps=hparams['eps'], relu=True,
        projector='bottleneck' if hparams['projector'] == 'bottleneck' else 'conv', width=hparams['hidden'] or 256)
    method.build(create_pair(*features))
    method.double().train()
    missing = method.projector.load_state_dict(case.under('conv_reg.'), strict=False)
    assert not missing.unexpected_keys and all('num_batches' in name for name in missing.missing_keys)
    return method, *features


@pytest.mark.parametrize('case', CASES, ids=case_id)
def test_terms_gradients_and_statistics_equal_the_official_codes(case: GoldenCase) -> None:
    method, student, teacher = create_golden(case)
    terms = method(student, teacher, torch.zeros(1))
    assert_golden(terms['wkd_f_mean_loss'], method.mean_weight * case['loss_mean'])
    assert_golden(terms['wkd_f_std_loss'], case['loss_std'])
    loss = case['feature_weight_now'] * sum(terms.values())
    if 'logit_t' not in case:
        assert_golden(loss, case['loss_kd'])
    loss.backward()
    assert_golden(student.feature.grad, case['grad.feat_s'])
    scale = max(g.abs().max().item() for g in case.under('grad.conv_reg.').values())
    for name, parameter in method.projector.named_parameters():
        # an offset in front of a batch norm has a gradient of rounding alone
        torch.testing.assert_close(
            parameter.grad, case[f'grad.conv_reg.{name}'], rtol=1e-9, atol=1e-11 * scale)
    for name, expected in case.under('after.conv_reg.').items():
        assert_golden(method.projector.state_dict()[name], expected)


@pytest.mark.parametrize('case', CASES, ids=case_id)
def test_moments_of_the_cells_equal_the_official_codes(case: GoldenCase) -> None:
    method, student, teacher = create_golden(case)
    projected = method.projector(student.feature)
    assert_golden(projected, case['projected_s'])
    for side, feature in (('s', projected), ('t', teacher.feature)):
        moments = cell_moments(feature, case.hparams['spatial_grid'], case.hparams['eps'])
        for name, moment in zip(('mean', 'std'), moments):
            assert_golden(moment.reshape(case[f'{name}_{side}'].shape), case[f'{name}_{side}'])


@pytest.mark.parametrize('shape', [(7, 7), (4, 6), (1, 1), (3, 9)])
@pytest.mark.parametrize('grid', [1, 2, 4])
def test_cells_are_those_of_adaptive_pooling(shape: tuple, grid: int) -> None:
    feature = torch.randn(2, 3, *shape)
    means, deviations = cell_moments(feature, grid)
    torch.testing.assert_close(means, F.adaptive_avg_pool2d(feature, grid))
    assert torch.isfinite(deviations).all() and (deviations >= 0).all()


def test_a_cell_of_one_position_has_no_deviation_and_a_warning_says_so(caplog: pytest.LogCaptureFixture) -> None:
    method, student, teacher = create_built(grids=(4,))
    assert 'single position' in caplog.text and 'wkd_f.grid=4' in caplog.text
    terms = method(student, teacher, torch.zeros(4))
    assert terms['wkd_f_std_loss'] == 0 and terms['wkd_f_mean_loss'] > 0
    caplog.clear()
    create_built(grids=(8,))
    create_built(grids=(4,), std_weight=0.)
    assert not caplog.text


def create_built(grids: tuple, **options: Any) -> tuple:
    student, teacher = create_features('student', grids=grids), create_features('teacher', grids=grids)
    method: DistillMethod = create_method('wkd_f', **options)
    method.build(create_pair(student, teacher))
    return method, student, teacher


def test_deviations_of_a_shifted_map_are_those_of_the_map() -> None:
    feature = torch.randn(2, 3, 8, 8)
    expected, actual = (cell_moments(x, 2)[1] for x in (feature, feature + 100))
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


def test_a_weight_of_zero_leaves_a_term_out_and_two_are_refused() -> None:
    method, student, teacher = create_built(grids=(8,), mean_weight=0.)
    assert list(method(student, teacher, torch.zeros(4))) == ['wkd_f_std_loss']
    with pytest.raises(UsageError, match='wkd_f.mean_weight and wkd_f.std_weight are both 0'):
        create_method('wkd_f', mean_weight=0., std_weight=0.)
