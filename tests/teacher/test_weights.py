"""Promises of the teacher's weights, and of what is known of the input that they were trained on."""
import argparse
import json
import logging
from pathlib import Path
from typing import Any, Dict, Optional

import pytest
import timm
import torch
import torch.nn as nn
from families import list_families
from safetensors.torch import save_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import save_for_hf

from timm_distill import Teacher, UsageError, create_distill_task, create_teacher
from timm_distill.teacher.teacher import hash_weights
from timm_distill.teacher.weights import find_class_tensors, fit_weights

SIZE = (3, 32, 32)
MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
STUDENT = dict(student_mean=IMAGENET_DEFAULT_MEAN, student_std=IMAGENET_DEFAULT_STD)
TIMM_FLAGS: Dict[str, Any] = dict(mean=None, std=None, img_size=None, input_size=None, interpolation='')


def create_model(name: str = 'test_resnet', seed: int = 1, **kwargs: Any) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(name, **{'num_classes': 5, **kwargs})


def save_run(path: Path, model: Optional[nn.Module] = None, **entries: Any) -> str:
    """Write what a training script writes."""
    torch.save({'state_dict': (model or create_model()).state_dict(), **entries}, path / 'last.pth.tar')
    return str(path / 'last.pth.tar')


def flags(**given: Any) -> argparse.Namespace:
    return argparse.Namespace(**{**TIMM_FLAGS, **given})


# What a file says of the input

@pytest.mark.parametrize('entries', [
    dict(args=flags(mean=list(MEAN), std=list(STD), img_size=48, interpolation='bilinear')),
    dict(args=flags(mean=list(MEAN), std=list(STD), input_size=[3, 48, 48], interpolation='bilinear')),
    dict(args=dict(mean=MEAN, std=STD, input_size=48, interpolation='bilinear')),
    dict(
        data_config=dict(mean=MEAN, std=STD, input_size=(3, 48, 48), interpolation='bilinear'),
        args=flags(mean=[0.9], std=[0.9], img_size=64)),
    dict(pretrained_cfg=dict(mean=MEAN, std=STD, input_size=[3, 48, 48], interpolation='bilinear')),
])
def test_checkpoint_says_with_what_its_model_was_trained(entries: Dict[str, Any], tmp_path: Path) -> None:
    teacher = create_teacher('test_resnet', SIZE, 5, save_run(tmp_path, **entries), **STUDENT)
    preprocessing = teacher.preprocessing
    assert (preprocessing.mean, preprocessing.std) == (MEAN, STD)
    assert preprocessing.input_size == (3, 48, 48) and preprocessing.interpolation == 'bilinear'
    assert all('last.pth.tar' in source for source in preprocessing.sources.values())
    x = torch.rand(2, *SIZE)
    raw = x * torch.tensor(IMAGENET_DEFAULT_STD)[:, None, None] + torch.tensor(IMAGENET_DEFAULT_MEAN)[:, None, None]
    own = (raw - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    expected = nn.functional.interpolate(own, (48, 48), mode='bilinear', antialias=True)
    torch.testing.assert_close(teacher.prepare(x), expected, rtol=1e-4, atol=1e-5)


def test_run_with_timms_scripts_that_named_nothing_was_trained_on_the_architectures_default(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    teacher = create_teacher('test_resnet', SIZE, 5, save_run(tmp_path, args=flags()), **STUDENT)
    config = teacher.model.pretrained_cfg
    assert teacher.preprocessing.mean == config['mean'] and teacher.preprocessing.input_size == config['input_size']
    assert 'the args in last.pth.tar' in teacher.preprocessing.sources['mean']
    assert 'Nothing says' not in caplog.text


@pytest.mark.parametrize('entries', [{}, dict(args=argparse.Namespace(lr=0.1)), dict(args='text', data_config=[1])])
def test_file_that_says_nothing_warns_where_the_students_normalisation_is_another(
        entries: Dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = save_run(tmp_path, **entries)
    own = create_model().pretrained_cfg
    create_teacher('test_resnet', SIZE, 5, path, student_mean=own['mean'], student_std=own['std'])
    create_teacher('test_resnet', SIZE, 5, path, **STUDENT, mean=MEAN, std=STD)
    assert 'Nothing says' not in caplog.text
    create_teacher('test_resnet', SIZE, 5, path, **STUDENT)
    assert 'Nothing says with which mean' in caplog.text and '--teacher-mean' in caplog.text


def test_flags_count_more_than_the_file_and_a_contradiction_is_said(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = save_run(tmp_path, args=flags(mean=[0.5], std=list(STD), img_size=48))
    teacher = create_teacher('test_resnet', SIZE, 5, path, mean=(0.5, 0.5, 0.5), std=STD, img_size=64)
    assert 'leave the flag out' not in caplog.text
    assert teacher.preprocessing.input_size == (3, 64, 64)
    teacher = create_teacher('test_resnet', SIZE, 5, path, mean=MEAN)
    assert teacher.preprocessing.mean == MEAN and teacher.preprocessing.std == STD
    assert '--teacher-mean 0.1 0.2 0.3 is used, though the args in last.pth.tar says [0.5]' in caplog.text


@pytest.mark.parametrize('mean', ['abc', ['x', 'y', 'z'], [float('nan')], [], {'a': 1}])
def test_normalisation_that_is_none_is_a_usage_error_unless_a_flag_replaces_it(mean: Any, tmp_path: Path) -> None:
    path = save_run(tmp_path, args=flags(mean=mean))
    with pytest.raises(UsageError, match=r'mean .*the args in last.pth.tar.*give mean'):
        create_teacher('test_resnet', SIZE, 5, path)
    assert create_teacher('test_resnet', SIZE, 5, path, mean=MEAN).preprocessing.mean == MEAN


@pytest.mark.parametrize('as_folder', [True, False])
def test_folder_and_the_weights_in_it_say_the_same(as_folder: bool, tmp_path: Path) -> None:
    config = dict(mean=MEAN, std=STD, input_size=(3, 48, 48), interpolation='bilinear')
    save_for_hf(create_model(), tmp_path, safe_serialization=True, data_config=config)
    if as_folder:
        teacher = create_teacher(f'local-dir:{tmp_path}', SIZE, 0)
    else:
        teacher = create_teacher('test_resnet', SIZE, 0, str(tmp_path / 'model.safetensors'))
    assert teacher.preprocessing.values() == config
    assert teacher.num_classes == 5


def test_unreadable_config_beside_weights_is_as_none(tmp_path: Path) -> None:
    save_file(create_model().state_dict(), str(tmp_path / 'model.safetensors'))
    for text in ('{', '[]', json.dumps({'pretrained_cfg': 3})):
        (tmp_path / 'config.json').write_text(text)
        assert create_teacher('test_resnet', SIZE, 5, str(tmp_path / 'model.safetensors')).preprocessing.assumed


# What the file holds

@pytest.mark.parametrize('weights, expected', [(None, 'ema'), ('ema', 'ema'), ('raw', 'raw')])
def test_raw_or_averaged_weights_are_taken_as_told(weights: Optional[str], expected: str, tmp_path: Path) -> None:
    models = {'raw': create_model(), 'ema': create_model(seed=2)}
    path = save_run(tmp_path, models['raw'], state_dict_ema=models['ema'].state_dict())
    teacher = create_teacher('test_resnet', SIZE, 5, path, weights=weights)
    assert teacher.digest == hash_weights(models[expected])


def test_averaged_weights_that_are_not_there_are_a_usage_error(tmp_path: Path) -> None:
    path = save_run(tmp_path)
    with pytest.raises(UsageError, match='no averaged weights: give weights raw'):
        create_teacher('test_resnet', SIZE, 5, path, weights='ema')
    assert create_teacher('test_resnet', SIZE, 5, path, weights='raw').num_classes == 5


@pytest.mark.parametrize('value', ['text', 1.5, None, [1., 2.], b'bytes'])
def test_entry_that_is_no_tensor_is_named(value: Any, tmp_path: Path) -> None:
    state_dict = {**create_model().state_dict(), 'fc.weight': value}
    for content in (state_dict, {'state_dict': state_dict}):
        torch.save(content, tmp_path / 'teacher.pth')
        with pytest.raises(UsageError, match=rf"'fc.weight' is a {type(value).__name__}, not a tensor \(1 of"):
            create_teacher('test_resnet', SIZE, 5, str(tmp_path / 'teacher.pth'))


@pytest.mark.parametrize('config', [None, '{', '{"architecture": "no_such_model"}'])
@pytest.mark.parametrize('checkpoint, img_size', [(True, None), (True, 48), (False, 48), (False, None)])
def test_folder_that_describes_no_model_is_a_usage_error(
        config: Optional[str], checkpoint: bool, img_size: Optional[int], tmp_path: Path) -> None:
    path = save_run(tmp_path) if checkpoint else None
    if config is not None:
        (tmp_path / 'config.json').write_text(config)
    with pytest.raises(UsageError, match='teacher .local-dir'):
        create_teacher(f'local-dir:{tmp_path}', SIZE, 5, path, img_size=img_size)


def test_student_that_could_not_be_merged_is_no_teacher(tmp_path: Path) -> None:
    torch.save({'unmerged_state_dict': create_model().state_dict()}, tmp_path / 'a.pth.tar')
    torch.save({'state_dict': create_model().state_dict(), 'task_state': {}}, tmp_path / 'unmerged-3.pth.tar')
    for name in ('a.pth.tar', 'unmerged-3.pth.tar'):
        with pytest.raises(UsageError, match='could not be merged'):
            create_teacher('test_resnet', SIZE, 5, str(tmp_path / name))


def test_weights_that_are_not_finite_are_no_teacher(tmp_path: Path) -> None:
    model = create_model()
    model.layer1[0].conv1.weight.data[0] = float('nan')
    with pytest.raises(UsageError, match=r'1 of its tensors are not finite \(layer1.0.conv1.weight\)'):
        create_teacher('test_resnet', SIZE, 5, save_run(tmp_path, model))


def test_positions_are_those_of_the_size_that_the_file_names(tmp_path: Path) -> None:
    model = create_model('test_vit', img_size=64)
    path = save_run(tmp_path, model, args=flags(img_size=64))
    teacher = create_teacher('test_vit', SIZE, 5, path)
    assert teacher.digest == hash_weights(model) and teacher.input_size == (3, 64, 64)


@pytest.mark.parametrize('img_size', [None, 96])
def test_positions_of_another_size_are_resampled_by_timms_filter_and_said(
        img_size: Optional[int], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = create_model('test_vit', img_size=64)
    save_file(model.state_dict(), str(tmp_path / 'vit.safetensors'))
    teacher = create_teacher('test_vit', (3, 64, 64), 5, str(tmp_path / 'vit.safetensors'), img_size=img_size)
    assert 'resampled: pos_embed [1, 17, 64] -> ' in caplog.text
    side = img_size or teacher.model.pretrained_cfg['input_size'][1]
    reference = create_model('test_vit', img_size=side)

    expected = timm.layers.resample_abs_pos_embed(
        model.pos_embed, (side // 16, side // 16), num_prefix_tokens=1)
    torch.testing.assert_close(teacher.model.pos_embed.data, expected)
    assert teacher.model.pos_embed.shape == reference.pos_embed.shape


def test_two_sizes_that_contradict_are_a_usage_error() -> None:
    with pytest.raises(UsageError, match='name two sizes'):
        create_teacher('test_vit', SIZE, 5, pretrained=False, model_kwargs=dict(img_size=48), img_size=64)


def test_file_without_a_classifier_teaches_features(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = save_run(tmp_path, create_model(num_classes=0), args=flags(img_size=32))
    with caplog.at_level(logging.INFO):
        teacher = create_teacher('test_resnet', SIZE, 5, path)
    assert teacher.num_classes == 0 and 'holds no classifier' in caplog.text
    task = create_distill_task(create_model(), teacher, kd='norm', input_size=SIZE, verbose=False)
    assert task(torch.randn(4, *SIZE), torch.arange(4))['loss'].isfinite()
    with pytest.raises(UsageError, match='the teacher has no classifier'):
        create_distill_task(create_model(), teacher, kd='kd', input_size=SIZE, verbose=False)


def test_classifier_is_dropped_where_that_is_asked_for_and_never_made_up(tmp_path: Path) -> None:
    path = save_run(tmp_path)
    assert create_teacher('test_resnet', SIZE, 5, path, model_kwargs=dict(num_classes=0)).num_classes == 0
    with pytest.raises(UsageError, match='num_classes=7 would re-initialise the head'):
        create_teacher('test_resnet', SIZE, 5, path, model_kwargs=dict(num_classes=7))


# Class counts

@pytest.mark.parametrize('name', [
    'levit_128s', 'repvit_m1', 'caformer_s18', 'crossvit_tiny_240', 'efficientformer_l1', 'sequencer2d_s',
    'deit_tiny_distilled_patch16_224', 'efficientvim_m1', 'swiftformer_xs', 'volo_d1_224'])
def test_class_count_is_read_from_every_head(name: str) -> None:
    shapes, class_dims = find_class_tensors(name, {})
    state_dict = {
        key: torch.empty([10 if i == class_dims.get(key) else n for i, n in enumerate(shape)], device='meta')
        for key, shape in shapes.items()
    }
    fitted, num_classes = fit_weights(name, state_dict, {}, 'teacher.pth')
    assert num_classes == 10 and fitted is state_dict
    if len(class_dims) > 2:
        key = next(iter(class_dims))
        wrong = [7 if i == class_dims[key] else n for i, n in enumerate(state_dict[key].shape)]
        with pytest.raises(UsageError, match='its heads have different class counts'):
            fit_weights(name, {**state_dict, key: torch.empty(wrong)}, {}, 'teacher.pth')


@pytest.mark.slow
@pytest.mark.parametrize('family', list_families(), ids=lambda family: family.name)
def test_every_head_family_says_its_class_count(family: Any) -> None:
    shapes, class_dims = find_class_tensors(family.name, family.small)
    assert class_dims and all(shapes[key][dim] == 7 for key, dim in class_dims.items())


def test_ten_class_teacher_with_two_heads_is_taken(tmp_path: Path) -> None:
    model = create_model(
        'deit_tiny_distilled_patch16_224', num_classes=10, depth=1, embed_dim=24, num_heads=2,
        img_size=32)
    save_file(model.state_dict(), str(tmp_path / 'deit.safetensors'))
    teacher = create_teacher(
        'deit_tiny_distilled_patch16_224', SIZE, 5, str(tmp_path / 'deit.safetensors'),
        model_kwargs=dict(depth=1, embed_dim=24, num_heads=2, img_size=32))
    assert teacher.num_classes == 10 and teacher.digest == hash_weights(model)


# What is said of the size

def test_teacher_of_larger_images_is_said_with_its_share_and_the_flag(caplog: pytest.LogCaptureFixture) -> None:
    teacher = create_model('test_vit', img_size=160, dynamic_img_size=False)
    with caplog.at_level(logging.INFO):
        create_distill_task(create_model(), teacher, kd='kd', input_size=SIZE)
    (line,) = [r.message for r in caplog.records if "of a step's operations" in r.message]
    assert 'is fed 160x160, the student 32x32' in line and '--teacher-img-size' in line
    share = int(line.split(' % of')[0].split()[-1])
    assert 50 < share < 100
    assert any(r.message.startswith('Teacher input: 160x160 (the size that it was built for)') for r in caplog.records)


def test_model_far_from_the_size_of_its_weights_is_said(
        monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def create(name: str, pretrained: bool = False, create: Any = timm.create_model, **kwargs: Any) -> nn.Module:
        return create(name, **kwargs)  # there is no network

    monkeypatch.setattr(timm, 'create_model', create)
    teacher = create_teacher('resnet18', SIZE, 5)
    assert isinstance(teacher, Teacher) and teacher.trained_size == (224, 224)
    create_distill_task(create_model(), teacher, kd='norm', input_size=SIZE)
    assert 'trained on 224x224 images and is fed 32x32' in caplog.text and '--teacher-img-size 224' in caplog.text
    caplog.clear()
    create_distill_task(create_model(), create_teacher('resnet18', SIZE, 5, img_size=32), kd='norm', input_size=SIZE)
    assert 'is fed' not in caplog.text


def run_flags(**given: Any) -> argparse.Namespace:
    return flags(**{'model': 'test_efficientnet', 'gp': None, 'bn_eps': None, 'model_kwargs': {}, **given})


@pytest.mark.parametrize(('given', 'kwargs'), [
    (dict(gp='max'), dict(global_pool='max')),
    (dict(bn_eps=0.1), dict(bn_eps=0.1)),
    (dict(model_kwargs=dict(output_stride=16)), dict(output_stride=16)),
])
def test_teacher_computes_as_the_run_did_that_trained_it(
        given: Dict[str, Any],
        kwargs: Dict[str, Any],
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    model = create_model('test_efficientnet', **kwargs).eval()
    path = save_run(tmp_path, model, args=run_flags(mean=MEAN, std=STD, img_size=64, **given))
    teacher = create_teacher('test_efficientnet', (3, 64, 64), 5, path, student_mean=MEAN, student_std=STD)
    x = torch.rand(2, 3, 64, 64)
    plain = create_model('test_efficientnet').eval()
    with torch.no_grad():
        torch.testing.assert_close(teacher(x).logits, model(x), atol=1e-4, rtol=1e-4)
        assert (plain(x) - model(x)).abs().max() > 1e-3  # without the arguments it is another teacher
    name, value = next(iter(kwargs.items()))
    assert f'{name}={value}' in caplog.text


def test_teacher_kwargs_win_over_those_of_the_file(tmp_path: Path) -> None:
    args = run_flags(model='test_resnet', mean=MEAN, std=STD, img_size=32, gp='max')
    path = save_run(tmp_path, create_model(global_pool='max'), args=args)
    teacher = create_teacher(
        'test_resnet', SIZE, 5, path, model_kwargs={'global_pool': 'avg'}, student_mean=MEAN, student_std=STD)
    assert type(teacher.model.global_pool.pool) is nn.AdaptiveAvgPool2d


def test_arguments_of_another_architecture_are_left_alone(tmp_path: Path) -> None:
    path = save_run(tmp_path, args=run_flags(model='test_vit', gp='token'))
    create_teacher('test_resnet', SIZE, 5, path, **STUDENT)
