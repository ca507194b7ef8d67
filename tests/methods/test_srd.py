"""SRD against the official codes' numbers, and the range of its fourth powers."""
import math

import pytest
import torch
from feature_pairs import create_features, create_pair
from golden_data import GoldenCase, assert_golden, case_id, golden_cases

from timm_distill import UsageError, create_method
from timm_distill.features.spec import Features
from timm_distill.methods import DistillMethod
from timm_distill.methods.srd import FLOOR, log_power_sum

CASES = golden_cases('srd')


def create_golden(case: GoldenCase) -> tuple:
    """Return the method with a case's weights, the student's feature map, and the teacher's."""
    names = ('feat_s', 'feat_t') if 'feat_s' in case else ('z_s', 'z_t')
    maps = [case[name] if case[name].ndim == 4 else case[name][:, :, None, None] for name in names]
    features = create_features('student'), create_features('teacher')
    for side, feature in zip(features, maps):
        side.feature = feature
    hparams = case.hparams
    method = create_method(
        'srd', match='correlation' if 'log_eps' in hparams else 'difference', exponent=hparams['exponent'],
        rep_weight=hparams['rep_weight'], eps=hparams['bn_eps'], temperature=hparams.get('temperature', 1.))
    method.build(create_pair(*features))
    method.double().train().projector.load_state_dict(case.under('embed.'))
    for norm in (method.student_norm, method.teacher_norm):
        assert norm.momentum == hparams['bn_momentum']
    return method, maps[0].clone().requires_grad_(), maps[1]


@pytest.mark.parametrize('case', CASES, ids=case_id)
def test_terms_gradients_and_statistics_equal_the_official_codes(case: GoldenCase) -> None:
    method, student, teacher = create_golden(case)
    term = method.compare(student, teacher)
    loss = method.rep_weight * term
    if 'loss_rep' in case:
        assert_golden(term, case['loss_rep'])
        logits = case['logit_s'].clone().requires_grad_()
        features = Features(logits=logits, feature=student), Features(logits=case['logit_t'], feature=teacher)
        method, *_ = create_golden(case)  # statistics from the start
        terms = method(*features, torch.zeros(1))
        assert_golden(terms['srd_logit_loss'], case['loss_logit'])
        loss = sum(terms.values())
    assert_golden(loss, case['loss'])
    loss.backward()
    given = 'feat_s' if 'feat_s' in case else 'z_s'
    assert_golden(student.grad.reshape(case[given].shape), case[f'grad.{given}'])
    scale = case['grad.embed.weight'].abs().max().item()
    for name, parameter in method.projector.named_parameters():
        # the offset stands in front of a batch norm: its gradient is rounding alone
        torch.testing.assert_close(parameter.grad, case[f'grad.embed.{name}'], rtol=1e-9, atol=1e-9 * scale)
    if 'grad.logit_s' in case:
        assert_golden(logits.grad, case['grad.logit_s'])
    for side, norm in (('s', method.student_norm), ('t', method.teacher_norm)):
        for name, expected in case.under(f'after.bn_{side}.').items():
            assert_golden(norm.state_dict()[name], expected)


@pytest.mark.parametrize('size', [1e-12, 1e-3, 1., 1e10, 1e30])
def test_fourth_powers_of_any_size_have_a_finite_logarithm_and_gradient(size: float) -> None:
    difference = (size * torch.randn(4, 6)).requires_grad_()
    loss = log_power_sum(difference)
    loss.backward()
    expected = difference.detach().double().pow(4).sum() + 24 * FLOOR ** 4
    torch.testing.assert_close(loss.double(), expected.log(), rtol=1e-5, atol=1e-5)
    assert torch.isfinite(difference.grad).all()


def test_equal_features_have_no_endless_gradient() -> None:
    difference = torch.zeros(2, 3, requires_grad=True)
    loss = log_power_sum(difference)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(6 * FLOOR ** 4)) and not difference.grad.any()


def create_built(**options: object) -> DistillMethod:
    method = create_method('srd', **options)
    method.build(create_pair(create_features('student'), create_features('teacher')))
    return method


def test_a_weight_of_zero_leaves_a_term_and_what_it_trains_out() -> None:
    features = create_features('student'), create_features('teacher')
    assert list(create_built(logit_weight=0.)(*features, torch.zeros(4))) == ['srd_loss']
    logits_alone = create_built(rep_weight=0.)
    assert list(logits_alone(*features, torch.zeros(4))) == ['srd_logit_loss'] and not list(logits_alone.parameters())
    with pytest.raises(UsageError, match='srd.rep_weight and srd.logit_weight are both 0'):
        create_method('srd', rep_weight=0., logit_weight=0.)


def test_in_eval_mode_the_norms_take_their_running_statistics() -> None:
    method = create_built().eval()
    features = create_features('student'), create_features('teacher')
    before = {name: value.clone() for name, value in method.state_dict().items()}
    assert torch.isfinite(sum(method(*features, torch.zeros(4)).values()))
    assert all(torch.equal(method.state_dict()[name], value) for name, value in before.items())
