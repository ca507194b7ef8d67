"""Token distillation: the distillation token learns, and the plain timm model evaluates with both heads."""
from typing import Any

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.task import TokenDistillationTask
from timm.utils import unwrap_model

from timm_distill import DistillTask, UsageError, create_distill_task, create_method, merge_student
from timm_distill.features.spec import Features
from timm_distill.losses import kl_divergence

SIZE, CLASSES = (3, 32, 32), 5


def create_student() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        'deit_tiny_distilled_patch16_224', img_size=32, embed_dim=32, depth=2, num_heads=2,
        num_classes=CLASSES)


def create_teacher_model() -> nn.Module:
    torch.manual_seed(1)
    return timm.create_model('test_resnet', num_classes=CLASSES)


def create_task(kd: str = 'token', **options: Any) -> DistillTask:
    return create_distill_task(
        create_student(), create_teacher_model(), kd=kd, input_size=SIZE, verbose=False, **options).train()


def create_batch() -> tuple:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, *SIZE, generator=generator), torch.arange(4)


@pytest.mark.parametrize('hard', [True, False])
def test_loss_reads_the_tokens_logits_alone(hard: bool) -> None:
    token, other, teacher = (torch.randn(4, CLASSES) for _ in range(3))
    method = create_method('token', hard=hard, temperature=3.)
    loss = method(Features(logits=other, token_logits=token), Features(logits=teacher), torch.zeros(4))['token_loss']
    expected = F.cross_entropy(token, teacher.argmax(1)) if hard else kl_divergence(token, teacher, 3.)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize('hard', [True, False])
def test_a_step_has_the_losses_of_timms_own_task(hard: bool) -> None:
    reference = TokenDistillationTask(
        create_student(), create_teacher_model(), nn.CrossEntropyLoss(), distill_type='hard' if hard else 'soft',
        temperature=2., task_loss_weight=0.5, verbose=False).train()
    task = create_task(
        kd_kwargs={'token.hard': hard, 'token.temperature': 2.}, task_loss_weight=0.5,
        distill_loss_weight=0.5)
    expected, actual = reference(*create_batch()), task(*create_batch())
    torch.testing.assert_close(actual['token_loss'], expected['distill_loss'])
    torch.testing.assert_close(actual['task_loss'], expected['task_loss'])
    torch.testing.assert_close(actual['loss'], expected['loss'])
    torch.testing.assert_close(actual['output'], expected['output'])


def test_label_loss_trains_the_class_tokens_head_and_distillation_the_other() -> None:
    for weight, trained, other in ((1., 'head', 'head_dist'), (0., 'head_dist', 'head')):
        task = create_task(task_loss_weight=weight, distill_loss_weight=1. - weight)
        task(*create_batch())['loss'].backward()
        student = task.module.student
        assert student.get_submodule(trained).weight.grad.any()
        gradient = student.get_submodule(other).weight.grad
        assert gradient is None or not gradient.any()


def test_saved_student_evaluates_like_timms_with_the_average_of_both_heads() -> None:
    task, images = create_task(), create_batch()[0]
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.1)
    task(*create_batch())['loss'].backward()
    optimizer.step()
    plain = create_student().eval()
    plain.load_state_dict(task.get_checkpoint_state()['state_dict'])
    with torch.no_grad():
        tokens = plain.forward_features(images)
        average = (plain.head(tokens[:, 0]) + plain.head_dist(tokens[:, 1])) / 2
        for model in (plain, merge_student(task), task.get_eval_model()):
            torch.testing.assert_close(model(images), average)


def test_merged_student_trains_on_as_a_plain_model() -> None:
    output = merge_student(create_task()).train()(create_batch()[0])
    assert isinstance(output, torch.Tensor) and output.shape == (4, CLASSES)


def test_ema_copy_gives_both_logits_too() -> None:
    task = create_task()
    task.setup_ema(decay=0.5)
    student = unwrap_model(task.get_trainable_module(ema=True)).train()
    features = student.forward_with_features(create_batch()[0], Features())
    assert not torch.equal(features.logits, features.token_logits)


def test_a_student_without_the_token_is_an_error_that_names_another_method() -> None:
    with pytest.raises(UsageError, match='kd kd'):
        create_distill_task(
            'test_resnet', 'test_resnet', kd='token', teacher_pretrained=False, input_size=SIZE,
            verbose=False)


def test_temperature_must_be_positive() -> None:
    with pytest.raises(UsageError, match='token.temperature'):
        create_method('token', temperature=0.)
