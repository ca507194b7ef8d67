"""Several teachers on the command line and in config files."""
import argparse
from pathlib import Path
from typing import Any, List

import pytest
import yaml

from timm_distill.args import args_to_yaml, check_train_args, create_train_parser, parse_args
from timm_distill.args.per_teacher import kwargs_by_teacher, split_name, teacher_argument, teachers_of
from timm_distill.errors import UsageError

TWO = ['--teacher', 'dino=vit_small_patch16_dinov3', 'sup=resnet50']


def parse(*argv: str) -> argparse.Namespace:
    return parse_args(create_train_parser(), argv)


@pytest.mark.parametrize('argv,teacher', [
    (['--teacher', 'resnet50'], 'resnet50'),
    (['--teacher=resnet50'], 'resnet50'),
    (['--teacher', 'hf-hub:org/name=x'], 'hf-hub:org/name=x'),
    (['--teacher', 'local-dir:/runs/lr=0.1'], 'local-dir:/runs/lr=0.1'),
    (['--teacher', 'torchvision:resnet50'], 'torchvision:resnet50'),
])
def test_one_teacher_is_named_as_ever(argv: List[str], teacher: str) -> None:
    args = parse(*argv)
    assert args.teacher == teacher_argument(args.teacher) == teacher


@pytest.mark.parametrize('argv', [TWO, ['--teacher=dino=vit_small_patch16_dinov3', 'sup=resnet50']])
def test_several_teachers_have_names_and_an_order(argv: List[str]) -> None:
    args = parse(*argv, '--student', 'resnet18')
    assert list(teacher_argument(args.teacher).items()) == [  # type: ignore[union-attr]
        ('dino', 'vit_small_patch16_dinov3'), ('sup', 'resnet50')]
    assert list(teachers_of(parse('--teacher', 'b=resnet50', 'a=resnet18').teacher)) == ['b', 'a']
    assert teacher_argument('a=resnet18') == {'a': 'resnet18'}


def test_a_function_of_a_file_with_a_sign_in_its_name_is_no_named_teacher(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert split_name('lr=1.py:build') == ('lr', '1.py:build')
    (tmp_path / 'lr=1.py').write_text('')
    assert split_name('lr=1.py:build') == ('', 'lr=1.py:build')
    assert parse('--teacher', 'lr=1.py:build').teacher == 'lr=1.py:build'
    assert split_name('a=lr=1.py:build') == ('a', 'lr=1.py:build')
    assert parse('--teacher-checkpoint', 'lr=1.py').teacher_checkpoint == 'lr=1.py'


@pytest.mark.parametrize('argv', [
    ['folder', *TWO], [*TWO, 'folder'], ['--teacher', 'resnet50', 'folder'], ['folder', '--teacher', 'resnet50'],
    ['--teacher-checkpoint', 'a.pth', 'folder', '--lr', '1'], ['--teacher-img-size', '32', 'folder']])
def test_the_data_folder_behind_a_teacher_stays_the_data_folder(argv: List[str]) -> None:
    assert parse(*argv).data == 'folder'


@pytest.mark.parametrize('argv,name,value', [
    (['--teacher-img-size', '32'], 'teacher_img_size', 32),
    (['--teacher-img-size', 'dino=32', 'sup=64'], 'teacher_img_size', {'dino': 32, 'sup': 64}),
    (['--teacher-mean', '0.5'], 'teacher_mean', [0.5]),
    (['--teacher-mean', '0.4', '0.5', '0.6'], 'teacher_mean', [0.4, 0.5, 0.6]),
    (['--teacher-std', 'dino=0.4,0.5,0.6', 'sup=0.5'], 'teacher_std', {'dino': [0.4, 0.5, 0.6], 'sup': [0.5]}),
    (['--teacher-weights', 'sup=ema'], 'teacher_weights', {'sup': 'ema'}),
    (['--teacher-checkpoint', 'sup=a=b.pth'], 'teacher_checkpoint', {'sup': 'a=b.pth'}),
    (['--teacher-dtype', 'bfloat16'], 'teacher_dtype', 'bfloat16'),
])
def test_a_flag_of_the_teacher_has_one_value_or_one_for_each(argv: List[str], name: str, value: Any) -> None:
    assert getattr(parse(*TWO, *argv), name) == value


def test_arguments_of_the_constructor_are_for_all_or_for_one() -> None:
    args = parse(*TWO, '--teacher-kwargs', 'img_size=64', 'dino.img_size=32', 'sup.drop=0.1')
    assert kwargs_by_teacher(args.teacher_kwargs, args.teacher) == {
        'dino': {'img_size': 32}, 'sup': {'img_size': 64, 'drop': 0.1}}
    assert kwargs_by_teacher({'img_size': 64}, 'resnet50') == {'img_size': 64}


@pytest.mark.parametrize('argv,words', [
    (['--teacher', 'a=resnet50', 'a=resnet18'], "two teachers are called 'a'"),
    (['--teacher', 'resnet50', 'b=resnet18'], "'resnet50' has no name"),
    (['--teacher', 'resnet50', 'resnet18', '--data-dir', '.'], "'resnet18' is no folder"),
    ([*TWO, '--teacher-img-size', 'x=32'], "--teacher-img-size x=32: there is no teacher 'x'; --teacher names dino"),
    ([*TWO, '--teacher-img-size', 'dino=32', '64', '--data-dir', '.'], "'64' is no folder"),
    ([*TWO, '--teacher-img-size', 'dino=32', 'dino=64'], 'once for each'),
    ([*TWO, '--teacher-img-size', 'dino=wide'], "invalid int value: 'wide'"),
    ([*TWO, '--teacher-img-size', 'dino=0'], '--teacher-img-size 0 must be'),
    ([*TWO, '--teacher-weights', 'dino=best'], "invalid choice: 'best'"),
    ([*TWO, '--teacher-mean', 'dino=0.5,0.5'], '--teacher-mean has 2 values'),
    ([*TWO, '--teacher-kwargs', 'x.img_size=2'], "there is no teacher 'x'"),
    (['--teacher', 'resnet50', '--teacher-kwargs', 'x.img_size=2'], 'the teacher has no name'),
    ([*TWO, '--teacher-cache', 'cache'], '--teacher-cache cache holds the targets of one teacher'),
    ([*TWO, '--teacher-drop', '1.5'], '--teacher-drop 1.5 must be'),
])
def test_bad_names_and_values_are_one_message(
        argv: List[str], words: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises((SystemExit, UsageError)) as error:
        check_train_args(parse('--kd', 'norm', *argv))
    said = capsys.readouterr().err if isinstance(error.value, SystemExit) else str(error.value)
    assert words in said and getattr(error.value, 'code', 2) == 2


def test_a_runs_flags_can_be_read_back_with_the_teachers_in_their_order(tmp_path: Path) -> None:
    flags = ['--teacher', 'sup=resnet50', 'dino=vit_small_patch16_dinov3', '--teacher-img-size', 'sup=32']
    args = parse(*flags, '--teacher-std', 'sup=0.4,0.5,0.6', '--kd', 'norm')
    (tmp_path / 'args.yaml').write_text(args_to_yaml(args))
    assert vars(parse('--config', str(tmp_path / 'args.yaml'))) == vars(args)
    mapping = {'teacher': {'sup': 'resnet50', 'dino': 'vit_small_patch16_dinov3'}, 'teacher_img_size': {'sup': 32}}
    (tmp_path / 'mapping.yaml').write_text(yaml.safe_dump(mapping, sort_keys=False))
    again = parse('--config', str(tmp_path / 'mapping.yaml'))
    assert (again.teacher, again.teacher_img_size) == (args.teacher, args.teacher_img_size)
