"""Promises of the frozen teacher."""
import argparse
import logging
import os
import pickle
from pathlib import Path
from typing import Any, Callable, Dict

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from timm_distill import Teacher, UsageError, create_teacher

SIZE = (3, 32, 32)
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


def test_building_a_teacher_leaves_random_state_and_tensors_untouched() -> None:
    model = create_model()
    before, random_state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    Teacher(model, SIZE)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert_same_tensors(model, before)


@pytest.mark.parametrize('name,kwargs', ARCHITECTURES, ids=[a[0] for a in ARCHITECTURES])
def test_one_forward_gives_logits_feature_and_pre_logits(name: str, kwargs: Dict[str, Any]) -> None:
    model = create_model(name, **kwargs).eval()
    teacher = Teacher(model, SIZE, **own_normalisation(model))
    calls = []
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
    assert teacher.resize_to == (48, 48)
    resized = F.interpolate(x, (48, 48), mode='bicubic', antialias=True, align_corners=False)
    with torch.no_grad():
        torch.testing.assert_close(teacher(x).logits, model(resized))
    assert teacher(x, OUTPUTS).feature.shape == (2, 64, 3, 3)


@pytest.mark.parametrize('model', [
    lambda: create_model('test_vit', img_size=48, dynamic_img_size=True), lambda: create_model('test_resnet')])
def test_model_that_runs_at_any_size_gets_the_students(model: Callable[[], nn.Module]) -> None:
    assert Teacher(model(), SIZE).resize_to is None


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
    assert_same_tensors(teacher.model, model.state_dict())


def test_training_checkpoint_without_ema_gives_its_weights(tmp_path: Path) -> None:
    model = create_model(seed=1)
    torch.save({'epoch': 3, 'state_dict': model.state_dict()}, tmp_path / 'last.pth.tar')
    teacher = create_teacher('test_resnet', SIZE, 5, checkpoint=str(tmp_path / 'last.pth.tar'))
    assert_same_tensors(teacher.model, model.state_dict())


def test_weights_come_from_a_local_folder(tmp_path: Path) -> None:
    timm.models.save_for_hf(model := create_model(seed=1), tmp_path, safe_serialization=True)
    teacher = create_teacher(f'local-dir:{tmp_path}', SIZE, 5)
    assert_same_tensors(teacher.model, model.state_dict())


def test_wrong_architecture_says_what_does_not_fit(tmp_path: Path) -> None:
    save_random_teacher(tmp_path / 'vit.safetensors', 'test_vit')
    with pytest.raises(UsageError) as error:
        create_teacher('test_resnet', SIZE, 5, checkpoint=str(tmp_path / 'vit.safetensors'))
    for part in ('--teacher-checkpoint', 'vit.safetensors', "'test_resnet'", 'missing', 'unexpected', '--teacher'):
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
    with pytest.raises(UsageError, match='is not a readable checkpoint'):
        create_teacher('test_resnet', SIZE, 5, checkpoint=str(path))


@pytest.mark.parametrize('content', [b'', b'not a checkpoint', b'\x80\x04'])
@pytest.mark.parametrize('suffix', ['safetensors', 'pth'])
def test_garbage_is_a_usage_error(content: bytes, suffix: str, tmp_path: Path) -> None:
    (tmp_path / f'teacher.{suffix}').write_bytes(content)
    with pytest.raises(UsageError, match='is not a readable checkpoint'):
        create_teacher('test_resnet', SIZE, 5, checkpoint=str(tmp_path / f'teacher.{suffix}'))


@pytest.mark.parametrize('content', [[1, 2], 'text', {'weights': 3}, {'state_dict': [1]}, torch.zeros(2)])
def test_file_that_holds_something_else_is_a_usage_error(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / 'teacher.pth')
    with pytest.raises(UsageError, match='--teacher-checkpoint'):
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
    with pytest.raises(UsageError, match='is not a readable checkpoint'):
        create_teacher('test_resnet', SIZE, 5, checkpoint=str(path))
    assert not planted.exists()


def test_unknown_name_lists_similar_ones() -> None:
    with pytest.raises(UsageError) as error:
        create_teacher('test_resnett', SIZE, 5)
    assert "'test_resnett'" in str(error.value) and 'did you mean test_resnet' in str(error.value)


def test_architecture_without_pretrained_weights_is_a_usage_error() -> None:
    name = next(name for name in timm.list_models() if not timm.is_model_pretrained(name))
    with pytest.raises(UsageError, match='--teacher-checkpoint FILE, or --no-teacher-pretrained'):
        create_teacher(name, SIZE, 5)


def test_random_teacher_warns_and_has_the_students_classes(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        teacher = create_teacher('test_resnet', SIZE, 6, pretrained=False)
    assert 'random weights' in caplog.text and teacher.num_classes == 6


def test_teacher_with_weights_does_not_warn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_random_teacher(tmp_path / 'teacher.safetensors')
    with caplog.at_level(logging.WARNING):
        create_teacher('test_resnet', SIZE, 5, checkpoint=str(tmp_path / 'teacher.safetensors'))
    assert not caplog.records


def test_more_arguments_reach_the_model(tmp_path: Path) -> None:
    save_random_teacher(tmp_path / 'teacher.safetensors', 'test_vit', img_size=32, reg_tokens=2)
    teacher = create_teacher('test_vit', SIZE, 5, checkpoint=str(tmp_path / 'teacher.safetensors'),
                             model_kwargs=dict(img_size=32, reg_tokens=2))
    assert teacher.layout.num_prefix_tokens == 3


def test_unknown_argument_of_the_model_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match='--teacher-kwargs'):
        create_teacher('test_resnet', SIZE, 5, pretrained=False, model_kwargs=dict(no_such_option=1))


def test_dtype_holds_for_weights_and_normalisation() -> None:
    teacher = create_teacher('test_resnet', SIZE, 5, pretrained=False, dtype=torch.bfloat16)
    assert {t.dtype for t in [*teacher.parameters(), teacher.input_scale]} == {torch.bfloat16}
    assert torch.isfinite(teacher(torch.randn(2, *SIZE, dtype=torch.bfloat16)).logits).all()
