"""VID against the official code's numbers."""
import pytest
import torch
from golden_data import GoldenCase, assert_golden, case_id, golden_cases

from timm_distill import UsageError, create_method
from timm_distill.losses import match_grids
from timm_distill.methods.vid import VariationalRegressor, gaussian_nll


def create_regressor(case: GoldenCase) -> VariationalRegressor:
    hparams = case.hparams
    return VariationalRegressor(
        case['feat_s'].shape[1], case['feat_t'].shape[1], hparams['num_mid_channel'],
        hparams['init_pred_var'], hparams['eps']).double()


@pytest.mark.parametrize('case', golden_cases('vid'), ids=case_id)
def test_loss_and_gradients_equal_the_official_codes(case: GoldenCase) -> None:
    regressor = create_regressor(case)
    torch.testing.assert_close(regressor.log_scale.detach(), case['log_scale_init'], rtol=1e-6, atol=0.)  # float32
    regressor.load_state_dict({
        'log_scale': case['log_scale'],
        **{f'regressor.{name}': value for name, value in case.under('regressor.').items()},
    })
    feature = case['feat_s'].clone().requires_grad_()
    student, teacher = match_grids(feature, case['feat_t'])
    mean = regressor(student)
    loss = gaussian_nll([mean], [regressor.log_scale], [teacher], case.hparams['eps'])
    loss.backward()
    assert_golden(mean, case['pred_mean'])
    assert_golden(loss, case['loss'])
    assert_golden(feature.grad, case['grad.feat_s'])
    for name, parameter in regressor.named_parameters():
        assert_golden(parameter.grad, case[f'grad.{name}'])


def test_best_variance_of_a_channel_is_its_mean_squared_error() -> None:
    teacher, mean = torch.randn(2, 64, 3, 2, 2, dtype=torch.float64)
    error = (mean - teacher).square().mean((0, 2, 3))
    best = (error.expm1()).log()  # inverse of softplus
    losses = [gaussian_nll([mean], [best + shift], [teacher], eps=0.) for shift in (-0.1, 0., 0.1)]
    assert losses[1] < losses[0] and losses[1] < losses[2]


@pytest.mark.parametrize('options', [dict(width=-1), dict(initial_variance=0.), dict(initial_variance=1e9)])
def test_impossible_options_are_refused(options: dict) -> None:
    with pytest.raises(UsageError, match=f'vid.{next(iter(options))}'):
        create_method('vid', **options)
