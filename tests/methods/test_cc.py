"""CC against the official code's numbers."""
import pytest
import torch
from feature_pairs import create_pair
from golden_data import GoldenCase, assert_golden, case_id, golden_cases

from timm_distill import UsageError, create_method
from timm_distill.features.spec import Features
from timm_distill.methods.cc import correlation_loss


@pytest.mark.parametrize('case', golden_cases('cc'), ids=case_id)
def test_loss_and_gradients_equal_the_official_codes(case: GoldenCase) -> None:
    x, y = case['feat_s'].flatten(1).requires_grad_(), case['feat_t'].flatten(1)
    student = Features(logits=x, feature=x[..., None, None], pre_logits=x)
    teacher = Features(logits=y, feature=y[..., None, None], pre_logits=y)
    method = create_method('cc', width=case.hparams['feat_dim']).double()
    method.build(create_pair(student, teacher))
    method.double()
    method.student_embedding.load_state_dict(case.under('embed_s.linear.'))
    method.teacher_embedding.load_state_dict(case.under('embed_t.linear.'))
    loss = method(student, teacher, torch.zeros(1))['cc_loss']
    loss.backward()

    assert_golden(method.student_embedding(x), case['emb_s'])
    assert_golden(method.teacher_embedding(y), case['emb_t'])
    assert_golden(loss, case['loss'])
    assert x.grad is not None
    assert_golden(x.grad, case['grad.feat_s'].flatten(1))
    for side, embedding in (('s', method.student_embedding), ('t', method.teacher_embedding)):
        assert_golden(embedding.weight.grad, case[f'grad.embed_{side}.linear.weight'])
        assert_golden(embedding.bias.grad, case[f'grad.embed_{side}.linear.bias'])


def test_a_batch_of_one_has_no_neighbours_and_no_loss() -> None:
    student = torch.randn(1, 4, requires_grad=True)
    loss = correlation_loss(student, torch.randn(1, 4))
    loss.backward()
    assert loss == 0 and student.grad is not None and not student.grad.any()


def test_width_must_be_positive() -> None:
    with pytest.raises(UsageError, match='cc.width'):
        create_method('cc', width=0)
