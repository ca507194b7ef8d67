"""Promises of the frozen teacher."""
import argparse
import logging
import os
import pickle
from functools import cache
from pathlib import Path
from typing import Any, Callable, Dict

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.models import resnet18

from timm_distill import Teacher, UsageError, create_distill_task, create_teacher
from timm_distill.teacher.fold import settle_batch_norms
from timm_distill.teacher.preprocessing import InputRecord
from timm_distill.teacher.teacher import hash_weights, wrap_teacher
from timm_distill.utils.batch_norm import is_batch_norm

SIZE = (3, 32, 32)
UNREADABLE = 'Cannot read .* check checkpoint|is refused: .* Check checkpoint'
OUTPUTS = frozenset({'logits', 'feature', 'pre_logits'})
SWIN = dict(img_size=32, window_size=1, embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))
ARCHITECTURES = [
    ('test_resnet', {}), ('test_convnext', {}), ('test_efficientnet', {}), ('test_vit', dict(img_size=32)),
    ('swin_tiny_patch4_window7_224', SWIN),
]


class PlantsFile:
    """Creates a file when it is unpickled."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


class ViewsAsVectors(nn.Module):
    """Runs on maps in contiguous order alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(x.shape[0], -1).view(x.shape)


def create_model(name: str = 'test_resnet', seed: int = 0, **kwargs: Any) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(name, **{'num_classes': 5, **kwargs})


def own_normalisation(model: nn.Module) -> Dict[str, Any]:
    config = model.pretrained_cfg
    return dict(student_mean=config['mean'], student_std=config['std'])


def save_random_teacher(path: Path, name: str = 'test_resnet', **kwargs: Any) -> nn.Module:
    model = create_model(name, seed=1, **kwargs)
    save_file(model.state_dict(), str(path))
    return model


def assert_same_tensors(actual: nn.Module, expected: Dict[str, torch.Tensor]) -> None:
    state = actual.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


TRAIN_CALLS: Dict[str, Callable[[nn.Module, Teacher], Any]] = {
    'nothing': lambda parent, teacher: None,
    'parent.train()': lambda parent, teacher: parent.train(),
    'teacher.train()': lambda parent, teacher: teacher.train(),
    'teacher.train(True)': lambda parent, teacher: teacher.train(True),
    'teacher.model.train()': lambda parent, teacher: teacher.model.train(),
    'every child': lambda parent, teacher: [module.train() for module in parent.modules()],
}


@pytest.mark.parametrize('call', TRAIN_CALLS)
def test_teacher_runs_in_eval_whatever_train_is_called_on(call: str) -> None:
    teacher = Teacher(create_model('test_efficientnet', drop_rate=0.5, drop_path_rate=0.5), SIZE)
    parent = nn.ModuleDict({'teacher': teacher})
    x = torch.randn(4, *SIZE)
    expected = teacher(x).logits
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    TRAIN_CALLS[call](parent, teacher)
    assert torch.equal(teacher(x).logits, expected)
    assert_same_tensors(teacher, before)
    assert not any(module.training for module in teacher.modules())


def test_model_that_comes_in_training_mode_is_frozen() -> None:
    model = create_model().train()
    teacher = Teacher(model, SIZE)
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    features = teacher(torch.randn(2, *SIZE, requires_grad=True), OUTPUTS)
    assert not any(t.requires_grad for t in (features.logits, features.feature, features.pre_logits))


def test_building_a_teacher_leaves_the_model_and_the_random_state_untouched() -> None:
    model = create_model().train()
    before, random_state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    modules = [type(module) for module in model.modules()]
    Teacher(model, SIZE, dtype=torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert_same_tensors(model, before)
    assert [type(module) for module in model.modules()] == modules
    assert all(module.training for module in model.modules()) and all(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize('name,kwargs', ARCHITECTURES, ids=[a[0] for a in ARCHITECTURES])
def test_one_forward_gives_logits_feature_and_pre_logits(name: str, kwargs: Dict[str, Any]) -> None:
    model = create_model(name, **kwargs).eval()
    teacher = Teacher(model, SIZE, **own_normalisation(model))
    model, calls = teacher.model, []
    model.forward_features = lambda *a, run=model.forward_features, **k: calls.append(1) or run(*a, **k)
    x = torch.randn(2, *SIZE)
    features = teacher(x, OUTPUTS)
    assert len(calls) == 1
    with torch.no_grad():
        torch.testing.assert_close(features.logits, model(x))
        torch.testing.assert_close(
            features.pre_logits, model.forward_head(model.forward_features(x), pre_logits=True))
    assert features.feature.shape[:2] == (2, teacher.tap_channels('features')) and features.feature.ndim == 4
    assert features.pre_logits.shape == (2, teacher.tap_channels('pre_logits'))


def test_only_what_is_asked_for_is_computed() -> None:
    teacher = Teacher(create_model(), SIZE)
    features = teacher(torch.randn(2, *SIZE), frozenset({'feature'}))
    assert features.logits is None and features.pre_logits is None and features.feature is not None
    assert teacher(torch.randn(2, *SIZE)).feature is None


def test_images_get_the_teachers_own_mean_and_std() -> None:
    model = create_model('test_resnet').double().eval()
    own = model.pretrained_cfg
    assert own['mean'] != IMAGENET_DEFAULT_MEAN
    raw = torch.rand(2, *SIZE, dtype=torch.float64)

    def normalise(mean: Any, std: Any) -> torch.Tensor:
        return (raw - torch.tensor(mean).double()[:, None, None]) / torch.tensor(std).double()[:, None, None]

    teacher = Teacher(model, SIZE, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    with torch.no_grad():
        expected = model(normalise(own['mean'], own['std']))
    actual = teacher(normalise(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)).logits
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(actual, model(normalise(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)), rtol=1e-3)


def test_images_are_not_touched_where_normalisation_and_size_agree() -> None:
    model = create_model()
    teacher = Teacher(model, SIZE, **own_normalisation(model))
    x = torch.randn(2, *SIZE)
    assert teacher.prepare(x) is x


def test_grey_images_get_the_averaged_normalisation() -> None:
    teacher = Teacher(create_model(in_chans=1), (1, 32, 32))
    assert teacher(torch.randn(2, 1, 32, 32)).logits.shape == (2, 5)


def test_fixed_input_size_gets_resized_images() -> None:
    model = create_model('test_vit', img_size=48, dynamic_img_size=False).eval()
    teacher = Teacher(model, SIZE, **own_normalisation(model))
    x = torch.randn(2, *SIZE)
    assert teacher.prepare.resize_to == (48, 48)
    resized = F.interpolate(x, (48, 48), mode='bicubic', antialias=True, align_corners=False)
    with torch.no_grad():
        torch.testing.assert_close(teacher(x).logits, model(resized))
    assert teacher(x, OUTPUTS).feature.shape == (2, 64, 3, 3)


@pytest.mark.parametrize('model', [
    lambda: create_model('test_vit', img_size=48, dynamic_img_size=True), lambda: create_model('test_resnet')])
def test_model_that_runs_at_any_size_gets_the_students(model: Callable[[], nn.Module]) -> None:
    assert Teacher(model(), SIZE).prepare.resize_to is None


@pytest.mark.parametrize('name', ['qwen3_vit_88m_enc', 'gemma4_vit_167m_enc'])
def test_encoder_without_a_classifier_is_a_usage_error(name: str) -> None:
    model = timm.create_model(name, depth=1, embed_dim=32, num_heads=2)
    with pytest.raises(UsageError, match='encoder without a classifier'):
        Teacher(model, (3, 96, 96))


def test_input_that_no_size_fits_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match='cannot run on the input'):
        Teacher(create_model(in_chans=3), (1, 32, 32))


def write_safetensors(model: nn.Module, path: Path) -> None:
    save_file(model.state_dict(), str(path))


def write_pth(model: nn.Module, path: Path) -> None:
    torch.save(model.state_dict(), path)


def write_training_checkpoint(model: nn.Module, path: Path) -> None:
    other = create_model(seed=9, num_classes=7)
    torch.save({
        'epoch': 3, 'arch': 'test_resnet', 'state_dict': other.state_dict(), 'state_dict_ema': model.state_dict(),
        'optimizer': torch.optim.AdamW(model.parameters()).state_dict(), 'args': argparse.Namespace(lr=0.1),
    }, path)


@pytest.mark.parametrize('write,suffix', [
    (write_safetensors, 'safetensors'), (write_pth, 'pth'), (write_training_checkpoint, 'pth.tar')])
def test_weights_come_from_every_kind_of_file_with_their_own_class_count(
        write: Callable[[nn.Module, Path], None], suffix: str, tmp_path: Path) -> None:
    model = create_model(seed=1, num_classes=7)
    path = tmp_path / f'teacher.{suffix}'
    write(model, path)
    teacher = create_teacher('test_resnet', SIZE, num_classes=5, checkpoint=str(path))
    assert teacher.num_classes == 7
    assert teacher.digest == hash_weights(model)


def test_training_checkpoint_without_ema_gives_its_weights(tmp_path: Path) -> None:
    model = create_model(seed=1)
    torch.save({'epoch': 3, 'state_dict': model.state_dict()}, tmp_path / 'last.pth.tar')
    teacher = create_teacher('test_resnet', SIZE, 5, checkpoint=str(tmp_path / 'last.pth.tar'))
    assert teacher.digest == hash_weights(model)


def test_weights_come_from_a_local_folder(tmp_path: Path) -> None:
    timm.models.save_for_hf(model := create_model(seed=1), tmp_path, safe_serialization=True)
    teacher = create_teacher(f'local-dir:{tmp_path}', SIZE, 5)
    assert teacher.digest == hash_weights(model)


def test_wrong_architecture_says_what_does_not_fit(tmp_path: Path) -> None:
    save_random_teacher(tmp_path / 'vit.safetensors', 'test_vit')
    with pytest.raises(UsageError) as error:
        create_teacher('test_resnet', SIZE, 5, checkpoint=str(tmp_path / 'vit.safetensors'))
    for part in ('checkpoint', 'vit.safetensors', "'test_resnet'", 'missing', 'unexpected', 'model_kwargs'):
        assert part in str(error.value)


def test_same_keys_of_another_width_say_which(tmp_path: Path) -> None:
    save_random_teacher(tmp_path / 'vit.safetensors', 'test_vit', mlp_ratio=2)
    with pytest.raises(UsageError, match='of another shape'):
        create_teacher('test_vit', (3, 160, 160), 5, checkpoint=str(tmp_path / 'vit.safetensors'))


@pytest.mark.parametrize('suffix', ['safetensors', 'pth'])
def test_truncated_file_is_a_usage_error(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f'teacher.{suffix}'
    (write_safetensors if suffix == 'safetensors' else write_pth)(create_model(), path)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(UsageError, match=UNREADABLE):
        create_teacher('test_resnet', SIZE, 5, checkpoint=str(path))


@pytest.mark.parametrize('content', [b'', b'not a checkpoint', b'\x80\x04'])
@pytest.mark.parametrize('suffix', ['safetensors', 'pth'])
def test_garbage_is_a_usage_error(content: bytes, suffix: str, tmp_path: Path) -> None:
    (tmp_path / f'teacher.{suffix}').write_bytes(content)
    with pytest.raises(UsageError, match=UNREADABLE):
        create_teacher('test_resnet', SIZE, 5, checkpoint=str(tmp_path / f'teacher.{suffix}'))


@pytest.mark.parametrize('content', [[1, 2], 'text', {'weights': 3}, {'state_dict': [1]}, torch.zeros(2)])
def test_file_that_holds_something_else_is_a_usage_error(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / 'teacher.pth')
    with pytest.raises(UsageError, match='checkpoint'):
        create_teacher('test_resnet', SIZE, 5, checkpoint=str(tmp_path / 'teacher.pth'))


@pytest.mark.parametrize('path', ['missing.pth', '.'])
def test_missing_file_is_a_usage_error(path: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match='there is no such file'):
        create_teacher('test_resnet', SIZE, 5, checkpoint=str(tmp_path / path))


@pytest.mark.parametrize('plain_pickle', [False, True])
def test_code_in_a_file_is_not_run(plain_pickle: bool, tmp_path: Path) -> None:
    planted, path = tmp_path / 'planted', tmp_path / 'teacher.pth'
    content = {'state_dict': create_model().state_dict(), 'extra': PlantsFile(str(planted))}
    if plain_pickle:
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with pytest.raises(UsageError, match=UNREADABLE):
        create_teacher('test_resnet', SIZE, 5, checkpoint=str(path))
    assert not planted.exists()


def test_unknown_name_lists_similar_ones() -> None:
    with pytest.raises(UsageError) as error:
        create_teacher('test_resnett', SIZE, 5)
    assert "'test_resnett'" in str(error.value) and 'did you mean test_resnet' in str(error.value)


def test_architecture_without_pretrained_weights_is_a_usage_error() -> None:
    name = next(name for name in timm.list_models() if not timm.is_model_pretrained(name))
    with pytest.raises(UsageError, match='checkpoint=FILE, or pretrained=False'):
        create_teacher(name, SIZE, 5)


def test_random_teacher_warns_and_has_the_students_classes(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        teacher = create_teacher('test_resnet', SIZE, 6, pretrained=False)
    assert 'random weights' in caplog.text and teacher.num_classes == 6


def test_teacher_with_weights_does_not_warn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_random_teacher(tmp_path / 'teacher.safetensors')
    with caplog.at_level(logging.WARNING):
        create_teacher(
            'test_resnet', SIZE, 5, checkpoint=str(tmp_path / 'teacher.safetensors'),
            **own_normalisation(create_model()))
    assert not caplog.records


def test_more_arguments_reach_the_model(tmp_path: Path) -> None:
    save_random_teacher(tmp_path / 'teacher.safetensors', 'test_vit', img_size=32, reg_tokens=2)
    teacher = create_teacher(
        'test_vit', SIZE, 5, checkpoint=str(tmp_path / 'teacher.safetensors'),
        model_kwargs=dict(img_size=32, reg_tokens=2))
    assert teacher.spec.layout.num_prefix_tokens == 3


def test_unknown_argument_of_the_model_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match='model_kwargs'):
        create_teacher('test_resnet', SIZE, 5, pretrained=False, model_kwargs=dict(no_such_option=1))


def test_dtype_holds_for_weights_and_normalisation() -> None:
    teacher = create_teacher('test_resnet', SIZE, 5, pretrained=False, dtype=torch.bfloat16)
    assert {t.dtype for t in teacher.parameters()} == {torch.bfloat16}
    assert torch.isfinite(teacher(torch.randn(2, *SIZE, dtype=torch.bfloat16)).logits).all()


# The teacher at its cheapest

def create_settled_model(name: str = 'test_resnet') -> nn.Module:
    """Return a model whose batch norms do something."""
    model = create_model(name).eval()
    with torch.no_grad():
        settle_batch_norms(model, torch.randn(4, *SIZE))
    return model


def first_convolution(teacher: Teacher) -> torch.Tensor:
    return next(p for p in teacher.parameters() if p.ndim == 4 and p.shape[2] == 3)


@pytest.mark.parametrize('name', ['test_resnet', 'test_efficientnet', 'test_byobnet'])
def test_folded_teacher_gives_what_the_model_gives(name: str) -> None:
    model, x = create_settled_model(name), torch.randn(2, *SIZE)
    folded, plain = Teacher(model, SIZE), Teacher(model, SIZE, fold=False)
    assert folded.folded.folded == folded.folded.norms == sum(map(is_batch_norm, plain.model.modules())) > 0
    assert not any(map(is_batch_norm, folded.model.modules()))
    outputs = OUTPUTS | {'stages'}
    for actual, expected in zip(folded(x, outputs).tensors(), plain(x, outputs).tensors(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_how_much_was_folded_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        Teacher(create_settled_model(), SIZE)
    assert [r.message for r in caplog.records if 'folded' in r.message][0].startswith('Teacher: 15 of 15 batch norms')


def test_digest_is_that_of_the_weights_as_they_came(tmp_path: Path) -> None:
    model = save_random_teacher(tmp_path / 'teacher.safetensors')
    teachers = [
        create_teacher('test_resnet', SIZE, 5, checkpoint=str(tmp_path / 'teacher.safetensors'), dtype=dtype)
        for dtype in (None, torch.bfloat16)]
    assert {teacher.digest for teacher in teachers} == {hash_weights(model)}
    assert hash_weights(teachers[0].model) != hash_weights(model) != hash_weights(create_model(seed=2))


def test_convolutions_are_channels_last_on_the_cpu_and_as_told() -> None:
    model, x = create_settled_model(), torch.randn(2, *SIZE)
    teachers = [Teacher(model, SIZE, channels_last=channels_last) for channels_last in (None, True, False)]
    orders = [first_convolution(teacher).is_contiguous(memory_format=torch.channels_last) for teacher in teachers]
    assert orders == [True, True, False]
    torch.testing.assert_close(teachers[0](x).logits, teachers[2](x).logits)


def test_model_that_needs_another_memory_order_keeps_it() -> None:
    model = create_settled_model()
    model.layer1 = nn.Sequential(model.layer1, ViewsAsVectors())
    teacher, x = Teacher(model, SIZE), torch.randn(2, *SIZE)
    assert not first_convolution(teacher).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(teacher(x).logits, Teacher(model, SIZE, fold=False)(x).logits)


def test_memory_format_of_the_task_reaches_the_teacher() -> None:
    task = create_distill_task(
        'test_resnet', Teacher(create_model(), SIZE, channels_last=False), kd='kd',
        num_classes=5, input_size=SIZE, verbose=False)
    weight = first_convolution(task.teacher)
    assert not weight.is_contiguous(memory_format=torch.channels_last)
    task.to(memory_format=torch.channels_last)
    assert weight.is_contiguous(memory_format=torch.channels_last)


@cache
def loss_of(kd: str, teacher_dtype: Any, dtype: Any, autocast: bool) -> torch.Tensor:
    """Return the loss of a step with finite gradients."""
    torch.manual_seed(0)
    task = create_distill_task(
        'test_efficientnet', create_settled_model(), kd=kd, num_classes=5, input_size=SIZE, dtype=dtype,
        teacher_dtype=teacher_dtype, verbose=False).train()
    images = torch.randn(4, *SIZE, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        result = task(images, torch.arange(4))
    result['loss'].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in task.get_trainable_module().parameters())
    return result['loss'].detach().float()


@pytest.mark.parametrize('kd', ['kd', 'norm', 'norm+kd'])
@pytest.mark.parametrize('teacher_dtype', [torch.bfloat16, torch.float32])
@pytest.mark.parametrize('run', ['float32', 'bfloat16', 'autocast'])
def test_teacher_of_another_precision_trains_a_student(kd: str, teacher_dtype: torch.dtype, run: str) -> None:
    actual = loss_of(kd, teacher_dtype, torch.bfloat16 if run == 'bfloat16' else torch.float32, run == 'autocast')
    torch.testing.assert_close(actual, loss_of(kd, None, torch.float32, False), rtol=0.05, atol=0.05)


def test_features_have_the_dtype_of_the_images_outside_autocast() -> None:
    x = torch.randn(2, *SIZE)
    teacher = wrap_teacher(create_settled_model(), SIZE, dtype=torch.bfloat16, autocast=False)
    assert {t.dtype for t in teacher(x, OUTPUTS | {'stages'}).tensors()} == {torch.float32}
    assert {t.dtype for t in teacher(x.bfloat16(), OUTPUTS).tensors()} == {torch.bfloat16}


def test_own_precision_is_not_cast_again_by_autocast() -> None:
    model, x = create_settled_model(), torch.randn(2, *SIZE)
    own, of_the_run = wrap_teacher(model, SIZE, dtype=torch.float32, autocast=False), Teacher(model, SIZE)
    expected = own(x).logits
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(own(x).logits, expected)
        assert of_the_run(x).logits.dtype == torch.bfloat16


def test_images_are_normalised_before_they_are_rounded() -> None:
    teacher = Teacher(create_model(), SIZE, dtype=torch.bfloat16)
    x = torch.randn(2, *SIZE)
    assert teacher.prepare.renormalize
    expected = (x * teacher.prepare.scale + teacher.prepare.shift).bfloat16()
    assert teacher.prepare.scale.dtype == torch.float32 and torch.equal(teacher.prepare(x), expected)


def test_nothing_is_kept_that_was_not_asked_for() -> None:
    teacher = Teacher(create_model(), SIZE)
    features = teacher(torch.randn(2, *SIZE), frozenset({'logits'}))
    assert len(features.tensors()) == 1 and features.tensors()[0] is features.logits
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in teacher.modules())


# The input that it is really fed

WIDE_SWIN = {**SWIN, 'img_size': 128}


def test_stages_are_matched_at_the_size_that_each_model_is_fed() -> None:
    teacher = create_model('swin_tiny_patch4_window7_224', **WIDE_SWIN)
    task = create_distill_task(
        create_model(), teacher, kd='sp', kd_kwargs={'sp.stages': 'all'}, input_size=SIZE,
        verbose=False)
    (pairs,) = [method.pairs for method in task.module.methods.values()]
    student_stages, stages = task.module.spec.features.stages, task.teacher.spec.stages
    reductions = [(32 // student_stages[i].shape[1], 128 // stages[j].shape[1]) for i, j in pairs]
    assert reductions == [(4, 4), (8, 8), (16, 16), (32, 32)]


def test_preprocessing_says_what_is_in_force_and_equals_where_the_numbers_do() -> None:
    fixed = Teacher(create_model('test_vit', img_size=48, dynamic_img_size=False), SIZE).preprocessing
    assert fixed.input_size == (3, 48, 48) and fixed.mean == (0.5, 0.5, 0.5)
    assert fixed.sources['input_size'] == 'the size that it was built for'
    said = InputRecord('the test', (0.5, 0.5, 0.5), (0.5,), (48, 48), 'bicubic')
    other = Teacher(create_model('test_resnet'), SIZE, records=[said]).preprocessing
    assert other == fixed and other.values() == fixed.values() and not other.assumed
    assert other != Teacher(create_model('test_resnet'), SIZE).preprocessing
    assert 'the test' in str(other) and '48x48' in str(other)


def test_first_record_that_names_a_value_counts() -> None:
    records = [InputRecord('flag', mean=(0.1,)), InputRecord('file', (0.2, 0.3, 0.4), (0.5, 0.6, 0.7), (48, 64))]
    preprocessing = Teacher(create_model(), SIZE, records=records).preprocessing
    assert preprocessing.mean == (0.1, 0.1, 0.1) and preprocessing.std == (0.5, 0.6, 0.7)
    assert preprocessing.input_size == (3, 48, 64)
    assert preprocessing.sources['mean'] == 'flag' and preprocessing.sources['std'] == 'file'
    assert preprocessing.sources['interpolation'] == 'its pretrained_cfg'


@pytest.mark.parametrize('mode', ['bicubic', 'bilinear', 'nearest'])
def test_recorded_interpolation_resizes(mode: str) -> None:
    teacher = Teacher(create_model(), SIZE, records=[InputRecord('a file', size=(48, 40), interpolation=mode)])
    x = torch.randn(2, *SIZE)
    antialias = {} if mode == 'nearest' else dict(antialias=True, align_corners=False)
    expected = F.interpolate(x * teacher.prepare.scale + teacher.prepare.shift, (48, 40), mode=mode, **antialias)
    torch.testing.assert_close(teacher.prepare(x), expected)


def test_filter_that_resizes_no_tensors_is_replaced_and_said() -> None:
    record = InputRecord('a file', interpolation='lanczos')
    preprocessing = Teacher(create_model(), SIZE, records=[record]).preprocessing
    assert preprocessing.interpolation == 'bicubic' and 'lanczos' in preprocessing.sources['interpolation']


@pytest.mark.parametrize('values', [(0.5, float('nan'), 0.5), (), ('a', 'b', 'c'), 'abc', (0., 1., 1.), 3, (-1.,)])
def test_std_that_is_none_is_a_usage_error(values: Any) -> None:
    with pytest.raises(UsageError, match=r"std .* \(a file\).*--teacher-std"):
        Teacher(create_model(), SIZE, records=[InputRecord('a file', std=values)])


def test_recorded_size_that_the_model_cannot_run_at_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r'cannot run at 32x32 \(a file\).*--teacher-img-size'):
        Teacher(
            create_model('test_vit', img_size=48, dynamic_img_size=False), SIZE,
            records=[InputRecord('a file', size=(32, 32))])


# Class counts are those of the logits

class OwnNetwork(nn.Module):
    """One's own module, which says nothing of itself, or something wrong."""

    def __init__(self, said: Any = None):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(8, 5)
        if said is not None:
            self.num_classes = said

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.body(x))


@pytest.mark.parametrize('create', [OwnNetwork, lambda: OwnNetwork(1000), lambda: resnet18(num_classes=5)])
def test_class_counts_are_measured_on_both_sides(create: Callable[[], nn.Module]) -> None:
    assert Teacher(create(), SIZE).num_classes == 5
    for pair in ((create(), create_model()), (create_model(), create()), (create(), create())):
        task = create_distill_task(*pair, kd='kd+nd', input_size=SIZE, verbose=False)
        assert task.class_means_shape[0] == 5
        task.set_class_means(torch.randn(task.class_means_shape))
        assert task(torch.randn(4, *SIZE), torch.arange(4))['loss'].isfinite()


def test_unequal_classes_are_named_as_measured() -> None:
    with pytest.raises(UsageError, match='the teacher has 5 classes and the student 7 classes'):
        create_distill_task(create_model(num_classes=7), OwnNetwork(), kd='kd', input_size=SIZE, verbose=False)


@pytest.mark.parametrize('name', [a[0] for a in ARCHITECTURES])
def test_model_without_a_classifier_has_no_classes(name: str) -> None:
    teacher = Teacher(create_model(name, num_classes=0, **dict(ARCHITECTURES)[name]), SIZE)
    assert teacher.num_classes == 0
    with pytest.raises(UsageError, match='the teacher has no classifier and the student 5 classes'):
        create_distill_task(create_model(), teacher, kd='kd', input_size=SIZE, verbose=False)


def test_srrl_refuses_a_teacher_without_classes_and_fm_takes_it() -> None:
    teacher = Teacher(create_model(num_classes=0), SIZE)
    with pytest.raises(UsageError, match='kd fm'):
        create_distill_task(create_model(), teacher, kd='srrl', input_size=SIZE, verbose=False)
    task = create_distill_task(create_model(), teacher, kd='fm', input_size=SIZE, verbose=False)
    assert task(torch.randn(4, *SIZE), torch.arange(4))['fm_loss'] > 0
