"""PKT against the official code's numbers."""
import pytest
import torch
from golden_data import GoldenCase, case_id, golden_cases

from timm_distill.methods.pkt import neighbour_probabilities, probabilistic_transfer_loss


@pytest.mark.parametrize('case', golden_cases('pkt'), ids=case_id)
def test_loss_and_gradient_equal_the_official_codes(case: GoldenCase) -> None:
    student = case['feat_s'].clone().requires_grad_()
    loss = probabilistic_transfer_loss(student, case['feat_t'], case.hparams['eps'])
    gradient, = torch.autograd.grad(loss, student)
    # of one sample both vanish up to rounding
    torch.testing.assert_close(loss.detach(), case['loss'], rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(gradient, case['grad.feat_s'], rtol=1e-9, atol=1e-14)


def test_probabilities_of_a_sample_sum_to_one_and_ignore_scale() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 7, dtype=torch.float64)
    torch.testing.assert_close(neighbour_probabilities(x).sum(1), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(neighbour_probabilities(9 * x), neighbour_probabilities(x), rtol=1e-6, atol=0.)
