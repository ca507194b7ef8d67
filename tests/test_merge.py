"""Merged students give the logits of the students as trained and are plain timm models."""
import copy
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any, Dict, Tuple

import pytest
import timm
import torch
import torch.nn as nn
from timm.layers import freeze_batch_norm_2d

from timm_distill import DistillTask, create_distill_task, merge_student
from timm_distill.merge import full_precision, merge_error, merged_copy, merged_state_dict, merged_tensors

SIZE = (3, 32, 32)
CLASSES = 5
STUDENTS: Dict[str, Tuple[str, Dict[str, Any]]] = {
    'nchw_features': ('test_resnet', {}),
    'tokens_features': ('test_vit', dict(img_size=32)),
    'pre_logits': ('test_convnext', {}),
    'conv_head_inside_features': ('test_efficientnet', {}),
    'nhwc_features': ('swin_tiny_patch4_window7_224', dict(
        img_size=32, window_size=1, embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))),
    'conv_after_pool': ('mobilenetv3_small_050', {}),
}
ADAPTERS = {'bn_residual': (True, True), 'bn': (True, False), 'plain_residual': (False, True), 'plain': (False, False)}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def create_student(kind: str, **kwargs: Any) -> nn.Module:
    name, own = STUDENTS[kind]
    return timm.create_model(name, num_classes=CLASSES, **own, **kwargs)


@cache
def trained_task(kind: str, adapter: str = 'bn_residual', dtype: torch.dtype = torch.float64) -> DistillTask:
    """Return a task after a few real training steps with EMA."""
    torch.manual_seed(0)
    batch_norm, residual = ADAPTERS[adapter]
    task = create_distill_task(
        create_student(kind), timm.create_model('test_resnet', num_classes=7), kd='norm', dtype=dtype,
        kd_kwargs={'norm': dict(segments=2, batch_norm=batch_norm, residual=residual)}, input_size=SIZE, verbose=False)
    task.setup_ema(decay=0.6)
    task.train()
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.02, momentum=0.9)
    for step in range(3):
        task(torch.randn(4, *SIZE, dtype=dtype), torch.randint(CLASSES, (4,)))['loss'].backward()
        optimizer.step()
        optimizer.zero_grad()
        task.update_ema(step=step)
    return task


def unmerged_logits(task: DistillTask, images: torch.Tensor, ema: bool) -> torch.Tensor:
    module = task.get_trainable_module(ema=ema).eval()
    with torch.no_grad():
        logits = module(images)
    module.train()
    return logits


@pytest.mark.parametrize('ema', [False, True], ids=['raw', 'ema'])
@pytest.mark.parametrize('dtype', TOLERANCE, ids=['float64', 'float32'])
@pytest.mark.parametrize('adapter', ADAPTERS)
@pytest.mark.parametrize('kind', STUDENTS)
def test_merged_logits_equal_unmerged(kind: str, adapter: str, dtype: torch.dtype, ema: bool) -> None:
    task = trained_task(kind, adapter, dtype)
    images = torch.randn(4, *SIZE, dtype=dtype)
    expected = unmerged_logits(task, images, ema)
    with torch.no_grad():
        actual = merge_student(task, ema=ema)(images)
    spread = (expected - expected.mean()).abs().max()
    assert ((actual - expected).abs().max() / spread).item() < TOLERANCE[dtype]


@pytest.mark.parametrize('kind', STUDENTS)
def test_adapter_is_not_the_identity_so_merging_changes_the_consumer(kind: str) -> None:
    task = trained_task(kind)
    images = torch.randn(4, *SIZE, dtype=torch.float64)
    with torch.no_grad():
        bare = task.module.student.eval()(images)
    assert not torch.allclose(bare, unmerged_logits(task, images, ema=False), rtol=1e-2)


@pytest.mark.parametrize('ema', [False, True], ids=['raw', 'ema'])
@pytest.mark.parametrize('kind', STUDENTS)
def test_merged_state_is_exactly_a_stock_timm_models(kind: str, ema: bool) -> None:
    stock = create_student(kind).double()
    state = trained_task(kind).get_checkpoint_state(ema=ema)['state_dict_ema' if ema else 'state_dict']
    expected = {name: (tensor.shape, tensor.dtype) for name, tensor in stock.state_dict().items()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()} == expected
    assert list(state) == list(stock.state_dict())
    stock.load_state_dict(state, strict=True)
    merged = merge_student(trained_task(kind), ema=ema)
    assert type(merged) is type(stock)
    assert sum(p.numel() for p in merged.parameters()) == sum(p.numel() for p in stock.parameters())
    images = torch.randn(2, *SIZE, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(stock.eval()(images), merged(images))


@pytest.mark.parametrize('form', ['direct', 'moments'])
@pytest.mark.parametrize('kind', ['nchw_features', 'tokens_features', 'conv_after_pool'])
def test_task_whose_batch_norms_are_frozen_on_the_way_trains_on_and_merges_exactly(kind: str, form: str) -> None:
    task = copy.deepcopy(trained_task(kind))
    images, target = torch.randn(4, *SIZE, dtype=torch.float64), torch.randint(CLASSES, (4,))
    with torch.no_grad():
        for _ in range(50):  # running statistics are the batch's then
            task(images, target)
    module = freeze_batch_norm_2d(task.module)
    module.adapters[0].form = form
    frozen = {name: tensor.clone() for name, tensor in module.named_buffers() if 'running' in name}
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    task(images, target)['loss'].backward()
    optimizer.step()
    assert any('adapters' in name for name in frozen)
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in module.named_buffers() if name in frozen)
    plain = create_student(kind).double()
    plain.load_state_dict(task.get_checkpoint_state()['state_dict'], strict=True)
    expected = unmerged_logits(task, images, ema=False)
    torch.testing.assert_close(plain.eval()(images), expected, rtol=1e-10, atol=1e-10)


def test_half_precision_student_merges_in_its_own_dtype() -> None:
    task = trained_task('nchw_features', dtype=torch.float32)
    module = copy.deepcopy(task.module)
    student = merged_copy(module.student.bfloat16(), module.adapters, module.tap)
    assert {t.dtype for t in student.parameters()} == {torch.bfloat16}


def test_merging_leaves_the_trained_student_alone() -> None:
    task = trained_task('pre_logits')
    module = task.module.train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    modes = [m.training for m in module.modules()]
    merged = merge_student(task)
    task.get_checkpoint_state()
    task.get_eval_model()
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert [m.training for m in module.modules()] == modes
    assert not merged.training
    shared = {p.data_ptr() for p in merged.parameters()} & {p.data_ptr() for p in module.parameters()}
    assert not shared


def test_only_the_consumers_tensors_change() -> None:
    module = trained_task('nchw_features').module
    assert set(merged_tensors(module.student, module.adapters, module.tap)) == {'fc.weight', 'fc.bias'}


def test_student_without_adapter_is_its_own_merge() -> None:
    student = create_student('nchw_features')
    assert merged_tensors(student, (), None) == {}
    state = merged_state_dict(student, (), None)
    assert all(torch.equal(state[name], tensor) for name, tensor in student.state_dict().items())


def test_merge_error_sees_a_wrong_merge_and_nan() -> None:
    module = trained_task('nchw_features').module
    merged = merged_tensors(module.student, module.adapters, module.tap)
    images = torch.randn(4, *SIZE, dtype=torch.float64)
    assert merge_error(module, module.student, merged, images) < 1e-10
    wrong = {**merged, 'fc.bias': merged['fc.bias'] + 1.}
    assert merge_error(module, module.student, wrong, images) > 1e-3
    broken = merge_error(module, module.student, {**merged, 'fc.bias': merged['fc.bias'] * float('nan')}, images)
    assert broken != broken


def test_merge_is_measured_outside_autocast() -> None:
    module = trained_task('nchw_features', dtype=torch.float32).module
    images = torch.randn(4, *SIZE)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        error = module.merge_error(images)
        with full_precision(torch.device('cpu')):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    assert error < TOLERANCE[torch.float32]


def test_ema_student_is_asked_for_only_where_there_is_one() -> None:
    task = create_distill_task(create_student('nchw_features'), kd='none', input_size=SIZE, verbose=False)
    with pytest.raises(ValueError, match='setup_ema'):
        merge_student(task, ema=True)


def test_timm_alone_loads_the_checkpoint_and_gives_the_same_logits(tmp_path: Path) -> None:
    task = trained_task('nchw_features', dtype=torch.float32)
    images = torch.randn(2, *SIZE)
    torch.save(task.get_checkpoint_state(), tmp_path / 'last.pth.tar')
    torch.save(images, tmp_path / 'images.pt')
    code = (
        'import sys, timm, torch\n'
        "path = sys.argv[1] + '/last.pth.tar'\n"
        f"model = timm.create_model('test_resnet', num_classes={CLASSES}, checkpoint_path=path)\n"
        "assert not any(name.startswith('timm_distill') for name in sys.modules)\n"
        "torch.save(model.eval()(torch.load(sys.argv[1] + '/images.pt')).detach(), sys.argv[1] + '/logits.pt')\n")
    subprocess.run([sys.executable, '-c', code, str(tmp_path)], check=True, cwd=tmp_path)
    actual, expected = torch.load(tmp_path / 'logits.pt'), unmerged_logits(task, images, ema=False)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
