"""The recipes: files that the script takes as they are, with the paper's number and what differs."""
import re
from pathlib import Path
from typing import Any, Dict, List

import pytest
import timm
import yaml

import train_distill
from timm_distill.args import create_train_parser, parse_args
from timm_distill.args.per_teacher import teachers_of
from timm_distill.methods._composition import Recipe, create_composition, expand_kd

OF_TEACHERS = sorted((Path(__file__).resolve().parent.parent / 'recipes/teachers').glob('*.yaml'))
RECIPES = sorted((Path(__file__).resolve().parent.parent / 'recipes').glob('*.yaml'))
each_recipe = pytest.mark.parametrize('path', RECIPES, ids=lambda path: path.stem)


def read(path: Path) -> Dict[str, Any]:
    return yaml.safe_load(path.read_text())


def methods_of(path: Path) -> List[str]:
    return list(expand_kd(read(path)['kd'])[0])


def small_student(path: Path) -> List[str]:
    """Return a small student for a recipe, with the flags that it needs."""
    methods = methods_of(path)
    if 'token' in methods:
        sizes = ['img_size=32', 'embed_dim=32', 'depth=2', 'num_heads=2']
        return ['deit_tiny_distilled_patch16_224', '--model-kwargs', *sizes]
    if any(name.startswith('sdd:') for name in methods):  # regions of a map of 4 x 4
        return ['test_efficientnet', '--model-kwargs', 'output_stride=8', '--teacher-kwargs', 'output_stride=8']
    return ['test_efficientnet']


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 10


@each_recipe
def test_a_recipe_says_the_papers_number_and_what_differs(path: Path) -> None:
    text = path.read_text()
    assert re.search(r'^# Paper: (.*\d\d\.\d\d?|none has this pair)', text, re.M)
    assert re.search(r'^# What differs:\n#   - ', text, re.M)
    assert re.search(r'^# .*https://', text, re.M)


@each_recipe
def test_a_recipe_names_flags_models_methods_and_options_that_exist(path: Path) -> None:
    args = parse_args(create_train_parser(), ['--config', str(path), '--data-dir', 'DIR'])
    assert timm.is_model(args.teacher) and timm.is_model(args.model)
    composition = create_composition(Recipe(
        args.kd, args.kd_weight, args.kd_kwargs, num_epochs=args.epochs, task_loss_weight=args.task_loss_weight,
        distill_loss_weight=args.distill_loss_weight))
    assert set(composition.weights) == set(methods_of(path))
    assert composition.weights == {name: float(weight) for name, weight in args.kd_weight.items()}


@each_recipe
def test_a_recipe_runs_on_small_models(path: Path, few_digits_dir: Path, tmp_path: Path) -> None:
    has_labels = not read(path).get('no_labels')
    result = train_distill.main([
        '--config', str(path), '--data-dir', str(few_digits_dir), '--dataset', '', '--output', str(tmp_path),
        '--teacher', 'test_resnet', '--student', *small_student(path), '--no-teacher-pretrained',
        '--num-classes', '10' if has_labels else '0',
        '--input-size', '3', '32', '32', '-b', '50', '--epochs', '1', '-j', '0', '--device', 'cpu', '--no-report',
        '--lr', '1e-3'])
    assert result.checkpoint
    (entry,) = result.history
    terms = {name for name in entry['train'] if name.endswith('_loss')}
    assert ('task_loss' in terms) == has_labels
    assert all(any(t.startswith(f'{name}_') for t in terms) for name in methods_of(path))


@pytest.mark.parametrize('path', OF_TEACHERS, ids=lambda path: path.stem)
def test_a_recipe_of_several_teachers_names_what_exists_and_runs_on_small_models(
        path: Path, digits_dir: Path, tmp_path: Path) -> None:
    args = parse_args(create_train_parser(), ['--config', str(path)])
    teachers = teachers_of(args.teacher)
    assert len(teachers) > 1 and all(timm.is_model(name) for name in [args.model, *teachers.values()])
    composition = create_composition(Recipe(
        args.kd, args.kd_weight, args.kd_kwargs, num_epochs=args.epochs), list(teachers))
    assert composition.weights == {name: float(weight) for name, weight in args.kd_weight.items()}
    result = train_distill.main([
        '--config', str(path), '--data-dir', str(digits_dir), '--output', str(tmp_path), '--teacher',
        *(f'{name}=test_resnet' for name in teachers), '--student', 'test_efficientnet', '--no-teacher-pretrained',
        '--num-classes', '10', '--input-size', '3', '32', '32', '-b', '100', '--epochs', '1', '--warmup-epochs', '0',
        '-j', '0', '--device', 'cpu', '--no-report', '--lr', '1e-3'])
    assert {f'{name}_loss' for name in args.kd_weight} <= set(result.history[0]['train'])
