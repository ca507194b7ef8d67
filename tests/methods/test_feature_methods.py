"""What methods that compare features promise where common codes fail: tiny batches, dead features, low precision."""
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

import pytest
import timm
import torch
from feature_pairs import create_features, create_pair
from ranks import run_ranks

from timm_distill import DistillTask, UsageError, create_distill_task, create_method, list_methods
from timm_distill.features.spec import Features
from timm_distill.methods import METHODS, DistillMethod

_READABLE = {'logits', 'feature', 'pre_logits', 'stages'}


def reads_features(name: str) -> bool:
    """Whether a method reads features, and nothing that these tests do not make."""
    cls = METHODS.get(name).cls
    outputs = cls.student_outputs | cls.teacher_outputs
    known = outputs <= _READABLE and not (cls.needs_indices or cls.needs_class_means or cls.adapter)
    return known and bool(outputs - {'logits'})


NAMES = [name for name in list_methods() if reads_features(name)]
OWN = ('ab', 'at', 'cc', 'fitnet', 'fsp', 'ft', 'kdsvd', 'nst', 'pkt', 'rkd', 'sp', 'vid')
each_method = pytest.mark.parametrize('name', NAMES)


def create_built(name: str, **features: Any) -> Tuple[DistillMethod, Features, Features]:
    """Return a method built for random features, and these."""
    torch.manual_seed(0)
    student, teacher = create_features('student', **features), create_features('teacher', **features)
    method = create_method(name)
    method.build(create_pair(student, teacher))
    return method, student, teacher


def run_backward(method: DistillMethod, student: Features, teacher: Features) -> torch.Tensor:
    target = torch.zeros(student.logits.shape[0], dtype=torch.long)
    loss = torch.stack(list(method(student, teacher, target).values())).sum()
    loss.backward()
    return loss


def gradients(features: Features) -> list:
    tensors = [features.logits, features.pre_logits, *features.stages]
    return [x.grad for x in tensors if x.grad is not None]


def assert_finite(loss: torch.Tensor, method: DistillMethod, student: Features) -> None:
    own = [p.grad for p in method.parameters()]
    assert torch.isfinite(loss)
    assert all(g is not None and torch.isfinite(g).all() for g in own)
    assert gradients(student) and all(torch.isfinite(g).all() for g in gradients(student))


def test_all_methods_of_this_kind_are_here() -> None:
    assert set(OWN) <= set(NAMES)


@each_method
def test_student_gets_a_gradient_and_the_teacher_none(name: str) -> None:
    method, student, teacher = create_built(name)
    run_backward(method, student, teacher)
    assert any(g.any() for g in gradients(student)) and not gradients(teacher)


@each_method
def test_a_batch_of_one_is_finite(name: str) -> None:
    method, student, teacher = create_built(name, batch_size=1)
    assert_finite(run_backward(method, student, teacher), method, student)


@each_method
@pytest.mark.parametrize('scale', [0., 1e-30, 1e4])
def test_dead_and_huge_features_are_finite(name: str, scale: float) -> None:
    method, student, teacher = create_built(name, scale=scale)
    assert_finite(run_backward(method, student, teacher), method, student)


@each_method
def test_a_student_that_is_dead_beside_a_living_teacher_is_finite(name: str) -> None:
    method, _, teacher = create_built(name)
    student = create_features('student', scale=0.)
    assert_finite(run_backward(method, student, teacher), method, student)


@each_method
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_features_of_low_precision_give_losses_in_float32(name: str, dtype: torch.dtype) -> None:
    method, student, teacher = create_built(name, dtype=dtype)
    with torch.autocast('cpu', dtype=dtype):
        terms = method(student, teacher, torch.zeros(4, dtype=torch.long))
        assert {value.dtype for value in terms.values()} == {torch.float32}
    torch.stack(list(terms.values())).sum().backward()
    assert all(torch.isfinite(g).all() for g in gradients(student))


@each_method
def test_a_teacher_of_low_precision_beside_a_student_in_float32_works_without_autocast(name: str) -> None:
    method, student, _ = create_built(name)
    teacher = create_features('teacher', dtype=torch.bfloat16)
    assert_finite(run_backward(method, student, teacher), method, student)


@pytest.mark.parametrize('name', [name for name in NAMES if not list(create_built(name)[0].parameters())])
def test_a_loss_without_trained_layers_does_not_depend_on_autocast(name: str) -> None:
    method, student, teacher = create_built(name)
    target = torch.zeros(4, dtype=torch.long)
    expected = method(student, teacher, target)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        actual = method(student, teacher, target)
    torch.testing.assert_close(actual, expected, rtol=0., atol=0.)


@each_method
def test_targets_may_be_soft_and_images_mixed(name: str) -> None:
    method, student, teacher = create_built(name)
    method.eval()  # batch norms do not move between the calls
    hard = method(student, teacher, torch.zeros(4, dtype=torch.long))
    soft = method(student, teacher, torch.rand(4, 5).softmax(1))
    assert set(hard) == set(soft) and all(torch.isfinite(x) for x in soft.values())
    assert METHODS.get(name).cls.mixed_images


@each_method
def test_student_and_teacher_may_have_other_grids(name: str) -> None:
    torch.manual_seed(0)
    student = create_features('student', grids=(7, 5, 2))
    teacher = create_features('teacher', grids=(9, 4, 3))
    method = create_method(name)
    method.build(create_pair(student, teacher))
    assert_finite(run_backward(method, student, teacher), method, student)


@each_method
def test_larger_images_than_the_method_was_built_for_work(name: str) -> None:
    method, _, _ = create_built(name)
    student, teacher = create_features('student', grids=(12, 6, 2)), create_features('teacher', grids=(12, 6, 2))
    assert_finite(run_backward(method, student, teacher), method, student)


@each_method
def test_compiled_it_gives_the_same_terms(name: str) -> None:
    method, student, teacher = create_built(name)
    method.eval()
    target = torch.zeros(4, dtype=torch.long)
    expected = method(student, teacher, target)
    torch._dynamo.reset()
    actual = torch.compile(method, backend='eager')(student, teacher, target)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    torch.stack(list(actual.values())).sum().backward()
    assert gradients(student)


@pytest.mark.parametrize('name', [name for name in OWN if 'stages' in METHODS.get(name).defaults])
def test_a_stage_that_the_pair_does_not_have_is_refused_with_those_it_has(name: str) -> None:
    with pytest.raises(UsageError, match=f'{name}.stages=9.*0 to'):
        create_method(name, stages=9).build(create_pair(create_features('student'), create_features('teacher')))


def _create_task_of_all_that_train() -> DistillTask:
    torch.manual_seed(0)
    student, teacher = (timm.create_model(name, num_classes=5) for name in ('test_efficientnet', 'test_resnet'))
    return create_distill_task(
        student, teacher, kd='ab+cc+fitnet+fsp+ft+kdsvd+vid', input_size=(3, 32, 32),
        verbose=False).train()


def _run_rank(rank: int, world_size: int) -> Dict[str, Optional[torch.Tensor]]:
    task = _create_task_of_all_that_train()
    task.prepare_distributed(device_ids=[torch.device('cpu')])
    torch.manual_seed(rank)
    for _ in range(2):  # a parameter that the first step left out would stop the second
        task(torch.randn(4, 3, 32, 32), torch.arange(4))['loss'].backward()
    return {name: p.grad for name, p in task.module.named_parameters()}


@pytest.mark.dist
def test_two_processes_share_the_gradients_of_all_that_the_methods_train(tmp_path: Path) -> None:
    first, second = run_ranks(_run_rank, tmp_path)
    assert first.keys() == second.keys() and any(name.startswith('methods.') for name in first)
    for name, gradient in first.items():
        assert gradient is not None and torch.isfinite(gradient).all(), name
        assert torch.equal(gradient, second[name]), name
