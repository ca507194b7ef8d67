"""Every kind of tap goes through what training scripts do to a model, and still merges exactly."""
import copy
from functools import cache
from typing import Any, Callable, Dict, Optional, Tuple

import pytest
import timm
import torch
import torch.nn as nn
from timm.layers import convert_sync_batchnorm
from tiny_models import CLASSES, Plain, TwoScales

from timm_distill import DistillTask, Teacher, create_distill_task, merge_student

SIZE = (3, 32, 32)
FIXED_SIZE = (3, 64, 64)


def timm_student(name: str, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=CLASSES, **kwargs)


FASTERNET = timm_student('fasternet_t0', embed_dim=8, depths=(1, 1, 1, 1), feature_dim=24)
SWIN = timm_student(
    'swin_tiny_patch4_window7_224', img_size=32, window_size=1, embed_dim=16, depths=(1, 1), num_heads=(1, 2),
    drop_path_rate=0.)
VIT = timm_student('test_vit', img_size=32, depth=2)
CONVNEXT = timm_student('test_convnext', depths=(1, 1, 1, 1))
TAPS: Dict[str, Tuple[Callable[[], nn.Module], str]] = {
    'nchw': (timm_student('test_resnet'), 'auto'),
    'nhwc': (SWIN, 'auto'),
    'tokens': (VIT, 'auto'),
    'pre_logits': (CONVNEXT, 'auto'),
    'several_sites': (TwoScales, 'auto'),
    'no_offset': (FASTERNET, 'auto'),
    'side': (CONVNEXT, 'side'),
    'inside': (Plain, 'auto'),
}
each_tap = pytest.mark.parametrize('kind', TAPS)


@cache
def create_teacher(dtype: torch.dtype) -> Teacher:
    """Return the frozen teacher of all students."""
    torch.manual_seed(0)
    return Teacher(timm.create_model('test_resnet', num_classes=CLASSES), SIZE, dtype=dtype)


def create_task(
        kind: str, dtype: torch.dtype = torch.float32, teacher: Optional[nn.Module] = None) -> DistillTask:
    teacher, (factory, kd_tap) = teacher or create_teacher(dtype), TAPS[kind]
    torch.manual_seed(0)
    return create_distill_task(
        factory(), teacher, kd='norm', kd_tap=kd_tap, dtype=dtype,
        kd_kwargs={'norm.segments': 2, 'norm.init': 'official'}, input_size=SIZE, verbose=False).train()


def create_batch(dtype: torch.dtype = torch.float32, size: Tuple[int, ...] = SIZE) -> Tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, *size, generator=generator).to(dtype), torch.arange(4)


def train(task: DistillTask, steps: int = 2) -> None:
    """Train for a few steps on one batch."""
    parameter = next(task.get_trainable_module().parameters())
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.01)
    for step in range(steps):
        result = task(*create_batch(parameter.dtype, task.input_size))
        optimizer.zero_grad()
        result['loss'].backward()
        optimizer.step()
        task.update_ema(step=step)


def gradients(task: DistillTask) -> Dict[str, torch.Tensor]:
    return {name: p.grad for name, p in task.module.named_parameters() if p.grad is not None}


def assert_same_step(actual: DistillTask, expected: DistillTask, rtol: float = 1e-6) -> None:
    """Compare losses and gradients of one step of two tasks that start alike."""
    results = [task(*create_batch(torch.float64)) for task in (actual, expected)]
    for name, value in results[1].items():
        torch.testing.assert_close(results[0][name], value, rtol=rtol, atol=rtol)
    for result in results:
        result['loss'].backward()
    computed, wanted = gradients(actual), gradients(expected)
    assert computed.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(computed[name], gradient, rtol=rtol, atol=rtol)


def resize(images: torch.Tensor, size: Tuple[int, int]) -> torch.Tensor:
    return nn.functional.interpolate(images, size, mode='bicubic', antialias=True, align_corners=False)


@torch.no_grad()
def assert_merged_equals_unmerged(task: DistillTask, tolerance: float, ema: bool = False) -> None:
    module = task.get_trainable_module(ema=True).module if ema else task.module
    dtype = next(module.parameters()).dtype
    images = create_batch(dtype, task.input_size)[0]
    was_training = module.training
    expected = module.eval()(images)
    module.train(was_training)
    if module.resize_to is not None:
        images = resize(images, module.resize_to)
    actual = merge_student(task, ema=ema)(images)
    spread = (expected - expected.mean()).abs().max()
    assert ((actual - expected).abs().max() / spread).item() < tolerance


@each_tap
def test_kind_of_tap_is_the_one_named(kind: str) -> None:
    tap = create_task(kind).module.tap
    expected = {
        'nchw': ('features', 'NCHW', 1), 'nhwc': ('features', 'NHWC', 1), 'tokens': ('features', 'NLC', 1),
        'pre_logits': ('pre_logits', 'NC', 1), 'several_sites': ('features', 'NCHW', 2),
        'no_offset': ('features', 'NCHW', 1), 'side': ('side', 'NCHW', 1), 'inside': ('pre_logits', 'NC', 1),
    }[kind]
    assert (tap.point, tap.layout.fmt, len(tap.sites)) == expected
    assert bool(tap.inside) == (kind == 'inside')
    assert all(site.offset for site in tap.sites) == (kind != 'no_offset')


@each_tap
def test_trained_student_merges_exactly_into_its_plain_names(kind: str) -> None:
    task = create_task(kind, torch.float64)
    train(task)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in task.module.adapters.parameters())
    state = task.get_checkpoint_state()['state_dict']
    assert_merged_equals_unmerged(task, 1e-10)
    stock = TAPS[kind][0]().double()
    assert list(state) == list(stock.state_dict())
    stock.load_state_dict(state, strict=True)


@each_tap
def test_deep_copy_has_adapters_of_its_own_and_merges_on_its_own(kind: str) -> None:
    task = create_task(kind)
    train(task)
    images = create_batch()[0]
    clone = copy.deepcopy(task)
    with torch.no_grad():
        expected = clone.module.eval()(images)
        for parameter in task.module.parameters():
            parameter.zero_()
        assert torch.equal(clone.module(images), expected)
    train(clone.train())
    assert_merged_equals_unmerged(clone, 1e-5)


@each_tap
def test_ema_student_runs_its_own_adapters_and_merges(kind: str) -> None:
    task = create_task(kind, torch.float64)
    task.setup_ema(decay=0.6)
    task.train()
    train(task, steps=3)
    assert_merged_equals_unmerged(task, 1e-10, ema=True)
    before = merge_student(task, ema=True).state_dict()
    with torch.no_grad():
        for parameter in task.module.parameters():
            parameter.zero_()
    after = merge_student(task, ema=True).state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert task.get_checkpoint_state(ema=True)


@each_tap
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(kind: str) -> None:
    task, plain = create_task(kind, torch.float64), create_task(kind, torch.float64)
    task.module.student.set_grad_checkpointing(True)
    assert_same_step(task, plain)
    train(task)
    assert_merged_equals_unmerged(task, 1e-10)


@each_tap
def test_channels_last_changes_neither_loss_nor_gradients(kind: str) -> None:
    task, plain = create_task(kind, torch.float64), create_task(kind, torch.float64)
    task.to(memory_format=torch.channels_last)
    images, target = create_batch(torch.float64)
    actual = task(images.contiguous(memory_format=torch.channels_last), target)
    expected = plain(images, target)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value)
    train(task)
    assert_merged_equals_unmerged(task, 1e-10)


@each_tap
def test_bfloat16_autocast_is_finite_and_merges_in_float32(kind: str) -> None:
    task = create_task(kind)
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.01)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        result = task(*create_batch())
    result['loss'].backward()
    optimizer.step()
    assert all(torch.isfinite(value).all() for value in result.values())
    assert result['norm_loss'].dtype == torch.float32
    assert all(torch.isfinite(gradient).all() for gradient in gradients(task).values())
    assert_merged_equals_unmerged(task, 1e-5)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert task.get_checkpoint_state()


@pytest.mark.slow
@pytest.mark.parametrize('kind', [kind for kind in TAPS if kind != 'nchw'])  # read as the one without an offset
def test_compiled_task_has_the_loss_gradients_and_checkpoint_of_the_eager_one(kind: str) -> None:
    torch.manual_seed(0)
    teacher = Plain()  # it is compiled, too
    task, plain = (create_task(kind, torch.float64, copy.deepcopy(teacher)) for _ in range(2))
    task.compile(backend='aot_eager')
    assert_same_step(task, plain)
    train(task)
    assert_merged_equals_unmerged(task, 1e-10)
    assert list(task.get_checkpoint_state()['state_dict']) == list(plain.get_checkpoint_state()['state_dict'])
    with torch.no_grad():
        images = create_batch(torch.float64)[0]
        torch.testing.assert_close(task.get_eval_model()(images), merge_student(task)(images))


@each_tap
def test_synchronised_batch_norms_leave_the_adapter_exactly_mergeable(kind: str) -> None:
    task = create_task(kind, torch.float64)
    train(task)
    task.trainable_module = convert_sync_batchnorm(task.trainable_module)
    assert_merged_equals_unmerged(task, 1e-10)
    assert task.get_checkpoint_state()


@pytest.mark.parametrize('teacher', [Plain, TwoScales])
def test_custom_models_teach_every_kind_of_tap(teacher: Callable[[], nn.Module]) -> None:
    for factory, kd_tap in TAPS.values():
        task = create_distill_task(
            factory(), teacher(), kd='norm+kd', kd_tap=kd_tap, kd_kwargs={'norm.segments': 2}, input_size=SIZE,
            verbose=False).train()
        train(task)
        assert_merged_equals_unmerged(task, 1e-5)


# Models of one input size

FIXED: Dict[str, str] = {'tokens': 'test_vit3', 'pre_logits': 'test_vit_relpos', 'nchw': 'test_coatnet'}
each_fixed = pytest.mark.parametrize('name', FIXED.values(), ids=list(FIXED))


def create_pair(student: str, teacher: str, kd: str = 'norm+kd', size: Tuple[int, ...] = FIXED_SIZE) -> DistillTask:
    torch.manual_seed(0)
    return create_distill_task(
        timm.create_model(student, num_classes=CLASSES), timm.create_model(teacher, num_classes=CLASSES), kd=kd,
        kd_kwargs={'norm.segments': 2}, input_size=size, verbose=False).train()


@each_fixed
def test_student_of_one_size_trains_and_merges_at_another(name: str) -> None:
    task = create_pair(name, 'test_resnet')
    assert task.module.resize_to == (160, 160)
    train(task)
    assert_merged_equals_unmerged(task, 1e-5)
    assert task.get_checkpoint_state()


@each_fixed
def test_student_of_one_size_sees_what_resizing_beforehand_gives(name: str) -> None:
    task, images = create_pair(name, 'test_resnet').eval(), create_batch(size=FIXED_SIZE)[0]
    resized = resize(images, (160, 160))
    with torch.no_grad():
        torch.testing.assert_close(task.module(images), task.module(resized))


@each_fixed
def test_evaluated_student_of_one_size_is_a_plain_model_of_that_size(name: str) -> None:
    task = create_pair(name, 'test_resnet')
    train(task)
    images = create_batch(size=FIXED_SIZE)[0]
    with torch.no_grad():
        expected = task.module.eval()(images)
        actual = task.get_eval_model()(resize(images, task.module.resize_to))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@each_fixed
def test_teacher_of_one_size_gets_resized_input(name: str) -> None:
    task, images = create_pair('test_resnet', name), create_batch(size=FIXED_SIZE)[0]
    resized = resize(images, (160, 160))
    with torch.no_grad():
        expected = task.teacher.model(task.teacher.prepare(resized))
    torch.testing.assert_close(task.teacher(images).logits, expected)
    train(task)
    assert_merged_equals_unmerged(task, 1e-5)


def test_student_and_teacher_of_one_size_each_train_on_a_third() -> None:
    task = create_pair('test_vit3', 'test_coatnet', size=(3, 96, 64))
    train(task)
    assert task.module.resize_to == task.teacher.prepare.resize_to == (160, 160)
    assert_merged_equals_unmerged(task, 1e-5)


@pytest.mark.parametrize('size', [(3, 96, 64), (3, 64, 96)])
@pytest.mark.parametrize('student', ['test_resnet', 'test_convnext', 'test_efficientnet'])
def test_inputs_need_not_be_square(student: str, size: Tuple[int, int, int]) -> None:
    task = create_pair(student, 'test_vit', size=size)
    train(task)
    assert_merged_equals_unmerged(task, 1e-5)
