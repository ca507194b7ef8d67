"""Models that are not timm's: functions of files, torchvision's architectures, and their parts."""
import argparse
import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn as nn
import torchvision
from safetensors.torch import load_file

from timm_distill import UsageError, check_pair, create_distill_task, create_teacher, merge_student
from timm_distill.export.release import export_hub, load_release
from timm_distill.features.inspection import inspect
from timm_distill.features.parts import add_parts
from timm_distill.models.external import code_digest, create_external, is_external
from timm_distill.models.named import create_model
from timm_distill.run.unchanged import check_same_code

SIZE = (3, 32, 32)
CODE = '''
import torch
import torch.nn as nn
import beside


class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(inplace=True))
        self.drop = nn.Dropout(0.5)
        self.out = nn.Linear(16, num_classes)

    def forward(self, x):
        return self.out(self.drop(self.deep(self.stem(x)).mean((2, 3))))


class Untraceable(Net):
    def forward(self, x):
        return super().forward(x) if x.mean() < 1e9 else x


def small(num_classes=beside.CLASSES):
    return Net(num_classes), dict(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), size=32)


def fixed():
    return Net(4)


def untraceable():
    return Untraceable(4), {'size': 32}


def number():
    return 3


def odd():
    return Net(4), {'colour': 1}


def fails():
    raise RuntimeError('no luck')
'''


@pytest.fixture
def net(tmp_path: Path) -> str:
    (tmp_path / 'net.py').write_text(CODE)
    (tmp_path / 'beside.py').write_text('CLASSES = 4\n')
    return str(tmp_path / 'net.py')


def test_a_students_transform_from_a_file_is_merged_into_its_plain_state_dict(net: str) -> None:
    task = create_distill_task(
        f'{net}:small', f'{net}:small', kd='norm+at+kd', num_classes=4, input_size=SIZE, verbose=False,
        teacher_pretrained=False).train()
    task(torch.randn(4, *SIZE), torch.arange(4))['loss'].backward()
    assert task.module.tap is not None and task.module.tap.point == 'features'
    plain = create_external(f'{net}:small', 'student')
    plain.load_state_dict(merge_student(task).state_dict())
    images = torch.randn(2, *SIZE)
    torch.testing.assert_close(plain.eval()(images), task.eval().module(images))


def test_a_file_says_what_its_teacher_is_fed(net: str) -> None:
    teacher = create_teacher(f'{net}:small', (3, 48, 48), 4)
    assert teacher.preprocessing.mean == (0.1, 0.2, 0.3) and teacher.input_size == SIZE
    assert teacher.num_classes == 4 and [stage.shape for stage in teacher.spec.stages] == [(8, 16, 16), (16, 8, 8)]


def test_a_teacher_from_a_file_takes_a_checkpoint_and_its_class_count(net: str, tmp_path: Path) -> None:
    model = create_external(f'{net}:small', 'teacher', num_classes=7)
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    teacher = create_teacher(f'{net}:small', SIZE, 4, checkpoint=str(tmp_path / 'weights.pth'))
    assert teacher.num_classes == 7
    images = torch.randn(2, *SIZE)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    own = (images * std + mean - torch.tensor((.1, .2, .3))[:, None, None]) / torch.tensor((.4, .5, .6))[:, None, None]
    torch.testing.assert_close(teacher(images).logits, model.eval()(own), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', ['resnet18', 'mobilenet_v3_small', 'swin_t'])
def test_parts_of_torchvisions_models_give_what_the_models_give(name: str) -> None:
    model = torchvision.models.get_model(name, weights=None, num_classes=5)
    keys = list(model.state_dict())
    images = torch.randn(2, 3, 64, 64)
    expected = model.eval()(images)
    model = add_parts(model, (3, 64, 64))
    assert isinstance(model, getattr(torchvision.models, type(model).__name__)) and list(model.state_dict()) == keys
    spec = inspect(model, (3, 64, 64))
    assert spec.split and spec.features is not None and spec.features.feature[1:] == (2, 2)
    assert len({stage.shape[1:] for stage in spec.stages}) >= 4 and spec.stages[-1].shape == spec.features.feature
    actual = model.forward_head(model.forward_features(images))  # type: ignore[operator]
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(model(images), expected)


def test_a_model_that_cannot_be_traced_is_read_at_its_classifiers_input(net: str, caplog: Any) -> None:
    caplog.set_level('INFO')
    teacher = create_teacher(f'{net}:untraceable', SIZE, 4)
    assert not teacher.spec.split and teacher.feature_spec.feature == (16, 1, 1)
    assert 'read at the input of its classifier alone' in caplog.text


def test_parts_belong_to_the_module_that_they_are_called_on() -> None:
    model = add_parts(torchvision.models.resnet18(num_classes=3), SIZE)
    other = copy.deepcopy(model)
    nn.init.zeros_(other.get_classifier().weight)  # type: ignore[operator]
    images = torch.randn(2, *SIZE)
    head: Any = other.eval()
    assert torch.equal(head.forward_head(head.forward_features(images)), other(images))
    assert not torch.equal(model.eval()(images), other(images))


BAD = {
    'missing.py:small': 'there is no file', 'net.py:nothing': 'no such function, it has Net, Untraceable, small',
    'net.py:number': 'returns a int', 'net.py:odd': 'says colour of its model', 'net.py:fails': 'RuntimeError: no luck',
    'net.py:fixed': 'has 4 classes, --num-classes asks for 5', 'torchvision:resnet81': 'similar ones: resnet18',
    'torchvision:resnet18.BEST': 'the weights of resnet18 are IMAGENET1K_V1', 'broken.py:small': 'cannot be imported',
}


@pytest.mark.parametrize('name', BAD)
def test_what_is_no_model_is_one_message(name: str, net: str, tmp_path: Path) -> None:
    (tmp_path / 'broken.py').write_text('import nothing_of_this_name\n')
    full = name if name.startswith('torchvision') else str(tmp_path / name)
    assert is_external(full)
    with pytest.raises(UsageError) as error:
        create_distill_task(full, kd='none', num_classes=5, input_size=SIZE, verbose=False)
    assert BAD[name].replace('--num-classes', 'num_classes') in str(error.value)


def test_arguments_that_a_function_does_not_take_are_named(net: str) -> None:
    with pytest.raises(UsageError, match='takes no drop_rate'):
        create_model(f'{net}:fixed', 'student', '', drop_rate=0.1, drop_path_rate=None, num_classes=4)


def test_no_checkpoint_has_a_file_run_unless_it_is_named(net: str, tmp_path: Path) -> None:
    model = create_external(f'{net}:fixed', 'student')
    path = str(tmp_path / 'last.pth.tar')
    config = dict(input_size=SIZE, mean=(.5, .5, .5), std=(.5, .5, .5), interpolation='bilinear', crop_pct=1.)
    torch.save({
        'state_dict': model.state_dict(), 'data_config': config,
        'args': argparse.Namespace(model=f'{net}:fixed', num_classes=4, eval_metric='top1')}, path)
    with pytest.raises(UsageError, match='give --model FILE.py:FUNCTION'):
        load_release(path)
    folder = Path(export_hub(load_release(path, model_name=f'{net}:fixed'), str(tmp_path / 'hub')))
    card = (folder / 'README.md').read_text()
    assert 'from net import fixed' in card and 'timm.create_model' not in card
    model.load_state_dict(load_file(folder / 'model.safetensors'))


def test_a_changed_file_is_told_at_a_resume(net: str, caplog: Any) -> None:
    run: Any = SimpleNamespace(args=SimpleNamespace(model=f'{net}:small', teacher=None, resume='last.pth.tar'))
    checkpoint = {'model_code': {'student': code_digest(f'{net}:small'), 'teacher': ''}}
    check_same_code(run, checkpoint)
    assert not caplog.text
    Path(net).write_text(CODE + '\n')
    check_same_code(run, checkpoint)
    assert "has changed since 'last.pth.tar' was written" in caplog.text


def test_the_digest_is_that_of_the_file(net: str) -> None:
    before = code_digest(f'{net}:small')
    Path(net).write_text(CODE + '\n')
    assert before and code_digest(f'{net}:small') != before and code_digest('torchvision:resnet18') == ''


def test_a_dry_run_gives_torchvisions_teachers_the_classes_of_their_weights(net: str) -> None:
    report = check_pair('torchvision:resnet18', f'{net}:small', kd='kd', num_classes=4, input_size=SIZE)
    assert not report.ok and 'the teacher has 1000 classes and the student 4' in report.reason
