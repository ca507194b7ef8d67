"""What is stored for each method, and that a step on it is the step on what the teacher says now."""
import argparse
import copy
import re
from functools import cache
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

import pytest
import timm
import torch

from timm_distill import DistillTask, create_distill_task, list_methods
from timm_distill.cache.codecs import HalfCodec, feature_codec
from timm_distill.cache.targets import CachedTargets
from timm_distill.data.views import ViewGrid
from timm_distill.errors import UsageError
from timm_distill.methods import METHODS, Recipe
from timm_distill.methods._composition import create_composition
from timm_distill.run.cache_forms import choose_codecs
from timm_distill.teacher.teacher import Teacher

DOCS = Path(__file__).resolve().parents[2] / 'docs' / 'cache.md'
SIZE = (3, 64, 64)
CLASSES = 40
STUDENTS = {'token': ('deit_tiny_distilled_patch16_224', dict(img_size=64, embed_dim=32, depth=2, num_heads=2))}
SPELLED = {'sdd': 'sdd:kd'}
OPTIONS = {'sdd': {'sdd.scales': '1,2'}, 'crd': {'crd.negatives': 2}}


@cache
def create_teacher(name: str) -> torch.nn.Module:
    torch.manual_seed(1)
    return timm.create_model(name, num_classes=CLASSES, **({'img_size': 64} if name == 'test_vit' else {}))


def create_task(
        kd: str,
        teacher: str = 'test_vit',
        student: Any = ('test_efficientnet', {}),
        kd_kwargs: Optional[Dict[str, Any]] = None,
) -> Any:
    torch.manual_seed(0)
    options = {key: value for name in OPTIONS if name in kd for key, value in OPTIONS[name].items()}
    task = create_distill_task(
        timm.create_model(student[0], num_classes=CLASSES, **student[1]), create_teacher(teacher), kd,
        kd_kwargs={**options, **(kd_kwargs or {})}, input_size=SIZE, sample_labels=torch.arange(12) % CLASSES,
        verbose=False, teacher_standardize='none')
    if task.class_means_shape is not None:
        task.set_class_means(torch.randn(task.class_means_shape))
    return task


def create_method_task(method: str) -> Any:
    """Return a task with one method, for reading; the teacher's grid is larger where the method lets it."""
    teacher = 'test_resnet' if method == 'sdd' else 'test_vit'
    return create_task(SPELLED.get(method, method), teacher, STUDENTS.get(method, ('test_efficientnet', {})))


def flags(**values: Any) -> argparse.Namespace:
    return argparse.Namespace(
        **{'kd': '', 'cache_topk': None, 'cache_precision': None, 'train_img_sizes': None, **values})


def codecs_of(task: DistillTask, **values: Any) -> Dict[str, Any]:
    assert task.teacher is not None
    return choose_codecs(flags(**values), task, task.teacher.feature_spec)


def run_step(task: DistillTask, targets: Any, images: torch.Tensor) -> Dict[str, torch.Tensor]:
    task = copy.deepcopy(task)  # methods with a memory note every step in it
    task.targets = targets
    labels, keys = torch.arange(len(images)), torch.arange(len(images))
    target = torch.stack([labels, keys], 1) if targets is not None or task.needs_indices else labels
    torch.manual_seed(3)
    result = task(images, target)
    result['loss'].backward()
    gradients = [p.grad for p in task.module.student.parameters() if p.grad is not None]
    return {**result, 'gradient': torch.cat([g.flatten() for g in gradients])}


@pytest.mark.parametrize('method', list_methods())
def test_step_of_every_method_on_stored_outputs_is_that_on_live_ones(
        method: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = create_method_task(method)
    images = torch.randn(4, *SIZE, generator=torch.Generator().manual_seed(2))
    targets = CachedTargets(str(tmp_path), ViewGrid(12, 1), codecs_of(task, cache_topk=0))
    live, filled = run_step(task, None, images), run_step(task, targets, images)
    monkeypatch.setattr(Teacher, 'forward', lambda *_: pytest.fail('the teacher ran'))
    read = run_step(task, targets, images)
    targets.close()
    assert all(torch.equal(filled[name], read[name]) for name in filled)
    terms = [name for name in live if name.endswith('_loss')]
    assert len(terms) > 1
    for name in terms:
        torch.testing.assert_close(filled[name], live[name], rtol=0.02, atol=1e-4)
    assert torch.cosine_similarity(filled['gradient'], live['gradient'], 0) > 0.999


def describe_row(method: str) -> Tuple[str, str]:
    """Return what the table of docs/cache.md says of a method: what is stored, what a run needs beside the cache."""
    cls: Any = METHODS.get(method).cls
    (instance,) = create_composition(Recipe(SPELLED.get(method, method))).methods.values()
    words = []
    if 'logits' in cls.teacher_outputs:
        words.append('top-k logits' if cls.reads_softmax else 'logits')
    if 'pre_logits' in cls.teacher_outputs:
        words.append('pre-logits')
    if cls.teacher_outputs & {'feature', 'tap'}:
        pooling = instance.teacher_pooling()
        grid = None if pooling is None else pooling.grid
        words.append(
            'last map' if pooling is None else "last map on the student's grid" if grid is None
            else 'mean of the last map' if grid == (1, 1) else f'last map on a {grid[0]}x{grid[1]} grid')
    if 'stages' in cls.teacher_outputs:
        words.append('the stages that it compares')
    if 'blocks' in cls.teacher_outputs:
        words.append('first blocks')
    if 'tail' in cls.teacher_outputs:
        words.append('class and register tokens')
    needs = {
        "the teacher's head": 'head' in cls.teacher_outputs, "the teacher's last stage": 'tail' in cls.teacher_outputs,
        "the teacher's classifier": cls.needs_classifier, 'class means': cls.needs_class_means}
    return ', '.join(words), ', '.join(name for name, given in needs.items() if given)


def test_the_table_of_the_documentation_says_of_every_method_what_is_stored() -> None:
    rows = re.findall(r'^\| (`[a-z_0-9`, ]+`) \| ([^|]+) \|([^|]*)\|$', DOCS.read_text(), re.M)
    said = {
        name.strip('` '): (stored.strip(), needs.strip()) for names, stored, needs in rows for name in names.split(',')}
    assert said == {method: describe_row(method) for method in list_methods()}


@pytest.mark.parametrize('kd, teacher, name', [
    ('norm', 'test_vit', 'feature-avg2x2-float16-64x2x2'),
    ('norm', 'test_resnet', 'feature-float16-96x2x2'),  # the grids are equal
    ('srd+vkd', 'test_vit', 'feature-avg1x1-float16-64x1x1'),
    ('norm+vkd', 'test_vit', 'feature-float16-64x4x4'),  # which both can be made of
    ('norm+wkd_f', 'test_vit', 'feature-float16-64x4x4'),
])
def test_the_last_map_is_stored_pooled_where_all_readers_begin_with_it(kd: str, teacher: str, name: str) -> None:
    assert codecs_of(create_task(kd, teacher))['feature'].name == name


def test_standardised_maps_are_stored_whole_as_their_statistics_are_those_of_all_positions() -> None:
    task = create_distill_task(
        timm.create_model('test_efficientnet', num_classes=CLASSES), create_teacher('test_vit'), 'norm',
        input_size=SIZE, verbose=False, teacher_standardize='channel')
    assert codecs_of(task)['feature'].name == 'feature-float16-64x4x4'


def test_norm_with_max_pooling_stores_maxima() -> None:
    task = create_task('norm', kd_kwargs={'norm.pool': 'max'})
    assert codecs_of(task)['feature'].name == 'feature-max2x2-float16-64x2x2'


def test_a_cache_with_whole_maps_is_read_as_it_is(tmp_path: Path) -> None:
    task = create_task('norm')
    (tmp_path / 'feature-float16-64x4x4').mkdir()
    assert choose_codecs(flags(), task, task.teacher.feature_spec, None, str(tmp_path))['feature'].pool is None
    (tmp_path / 'feature-avg2x2-float16-64x2x2').mkdir()
    assert choose_codecs(flags(), task, task.teacher.feature_spec, None, str(tmp_path))['feature'].pool is not None


def test_stage_methods_store_the_stages_that_they_compare_and_no_other() -> None:
    assert list(codecs_of(create_task('fitnet', 'test_resnet'))) == ['stage2']
    assert list(codecs_of(create_task('at', 'test_resnet'))) == [f'stage{i}' for i in range(5)]


def test_sizes_of_training_images_are_refused_for_maps_alone() -> None:
    assert list(codecs_of(create_task('vkd'), train_img_sizes=[64, 32])) == ['feature']
    for kd in ('norm', 'fitnet', 'vitkd'):
        with pytest.raises(UsageError, match='maps of one size'):
            codecs_of(create_task(kd), train_img_sizes=[64, 32])


def test_maps_of_a_position_or_two_are_not_larger_in_8_bits() -> None:
    for shape in ((64, 1, 1), (64, 2, 1)):
        assert isinstance(feature_codec('feature', shape, 'int8'), HalfCodec)
    sizes = {precision: feature_codec('feature', (64, 2, 2), precision).row_bytes for precision in ('int8', 'float16')}
    assert sizes['int8'] < sizes['float16']
