"""Checks of cached targets by a live teacher: what rounding explains passes, and nothing else."""
import copy
from functools import cache, partial
from pathlib import Path
from typing import Any, Tuple

import pytest
import timm
import torch

from timm_distill.cache.codecs import ByteCodec, HalfCodec, TopKCodec
from timm_distill.cache.targets import CachedTargets, CacheMismatchError
from timm_distill.data.views import ViewGrid
from timm_distill.errors import UsageError
from timm_distill.features.spec import Features
from timm_distill.teacher.class_map import ClassMatch
from timm_distill.teacher.rounding import run_rounded
from timm_distill.teacher.teacher import Teacher, wrap_teacher

OUTPUTS = frozenset({'logits', 'feature', 'pre_logits'})
PRECISIONS = {
    'float32': (None, None), 'bfloat16': (torch.bfloat16, None), 'float16': (torch.float16, None),
    'autocast': (None, torch.bfloat16)}
KEYS = torch.arange(6)


@cache
def create_model(name: str) -> torch.nn.Module:
    torch.manual_seed(1)
    model = timm.create_model(name, num_classes=40, **({'img_size': 32} if name == 'test_vit' else {}))
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(photographs())  # statistics for its batch norms, without which random layers magnify nothing
    return model.eval()


@cache
def photographs() -> torch.Tensor:
    """Return smooth images, as photographs are."""
    noise = torch.randn(6, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(noise, 32, mode='bicubic')


def run(teacher: Teacher, autocast: Any, images: torch.Tensor) -> Features:
    with torch.autocast('cpu', autocast or torch.bfloat16, enabled=autocast is not None):
        return teacher(images, OUTPUTS)


def rounded(teacher: Teacher, autocast: Any, images: torch.Tensor) -> Tuple[Features, float]:
    with torch.autocast('cpu', autocast or torch.bfloat16, enabled=autocast is not None):
        return run_rounded(teacher, images, OUTPUTS)


def create_targets(folder: Path, teacher: Teacher) -> CachedTargets:
    spec = teacher.feature_spec
    return CachedTargets(str(folder), ViewGrid(6, 1), {
        'logits': TopKCodec(40, 10), 'feature': ByteCodec('feature', spec.feature),
        'pre_logits': HalfCodec('pre_logits', (spec.pre_logits,))})


def check(folder: Path, filler: Any, teacher: Teacher, autocast: Any) -> None:
    """Fill a cache with what one function says of the images, and have a teacher check it."""
    targets = create_targets(folder, teacher)
    targets.read(KEYS, photographs(), filler)
    targets.num_checks = 6
    targets.read(KEYS, photographs(), partial(run, teacher, autocast), partial(rounded, teacher, autocast))
    assert targets.num_checks == 0
    targets.close()


@pytest.mark.parametrize('name', ['test_vit', 'test_efficientnet'])
@pytest.mark.parametrize('precision', PRECISIONS)
def test_check_passes_on_what_other_kernels_of_the_same_precision_gave(
        precision: str,
        name: str,
        tmp_path: Path,
) -> None:
    dtype, autocast = PRECISIONS[precision]
    teacher = wrap_teacher(create_model(name), (3, 32, 32), dtype=dtype, autocast=dtype is None)

    def of_other_batches(images: torch.Tensor) -> Features:
        parts = [run(teacher, autocast, images[i:i + 1]) for i in range(len(images))]
        names = ('logits', 'feature', 'pre_logits')
        return Features(*(torch.cat([getattr(part, name) for part in parts]) for name in names))

    def without_rounding(images: torch.Tensor) -> Features:
        features, share = rounded(teacher, autocast, images)
        if share == 1:  # the precise ones: as far from the truth as two kernels are from each other
            return features
        return run(teacher, autocast, images)

    check(tmp_path / 'batches', of_other_batches, teacher, autocast)
    check(tmp_path / 'kernels', without_rounding, teacher, autocast)


@pytest.mark.parametrize('precision', PRECISIONS)
def test_check_stops_on_other_views_and_slightly_other_weights(precision: str, tmp_path: Path) -> None:
    dtype, autocast = PRECISIONS[precision]
    model = create_model('test_efficientnet')
    other = copy.deepcopy(model)
    with torch.no_grad():
        torch.manual_seed(0)
        for parameter in other.parameters():
            parameter += 0.04 * parameter.std(correction=0) * torch.randn_like(parameter)
    teacher, another = (
        wrap_teacher(m, (3, 32, 32), dtype=dtype, autocast=dtype is None) for m in (model, other))
    with pytest.raises(CacheMismatchError, match='rounding explains'):
        check(tmp_path / 'weights', partial(run, another, autocast), teacher, autocast)
    with pytest.raises(CacheMismatchError, match='rounding explains'):
        check(tmp_path / 'views', lambda x: run(teacher, autocast, x.roll(1, 3)), teacher, autocast)
    with pytest.raises(CacheMismatchError, match='rounding explains'):
        check(tmp_path / 'order', lambda x: run(teacher, autocast, x.flip(0)), teacher, autocast)


def test_logits_of_mapped_classes_come_back_as_the_teacher_gives_them(tmp_path: Path) -> None:
    match = ClassMatch([''] * 36, {i: [i, i + 36] if i < 4 else [i] for i in range(36) if i != 7})
    teacher = Teacher(create_model('test_efficientnet'), (3, 32, 32), classes=match)
    assert teacher.class_map is not None and teacher.num_classes == 36
    targets = CachedTargets(
        str(tmp_path), ViewGrid(6, 1), {'logits': TopKCodec(35, 34)}, True, 36, teacher.class_map.known)
    live = teacher(photographs())
    for read in (targets.read(KEYS, photographs(), teacher), targets.read(KEYS, photographs(), None)):
        assert read.logits is not None and live.logits is not None
        assert (read.logits[:, 7] == -torch.inf).all() and torch.equal(read.classes, live.classes)
        torch.testing.assert_close(read.logits.softmax(1), live.logits.softmax(1), rtol=0.01, atol=1e-4)
    targets.num_checks = 6
    targets.read(KEYS, photographs(), teacher, partial(rounded, teacher, None))
    targets.close()


def test_channel_sizes_that_are_lost_or_damaged_are_an_error_and_not_other_values(tmp_path: Path) -> None:
    def filler(images: torch.Tensor) -> Features:
        return Features(pre_logits=100 * torch.ones(6, 40))

    def create(writable: bool = True) -> CachedTargets:
        return CachedTargets(str(tmp_path), ViewGrid(6, 1), {'pre_logits': ByteCodec('pre_logits', (40,))}, writable)

    targets = create()
    targets.read(KEYS, photographs(), filler)
    targets.close()
    (path,) = tmp_path.glob('*/spread.npy')
    data = path.read_bytes()
    for damaged in (data[:-1], data[:-20] + b'x' + data[-19:], b''):
        path.write_bytes(damaged)
        with pytest.raises(UsageError, match=r'spread.npy .* is damaged'):
            create()
    path.unlink()
    for writable in (True, False):
        with pytest.raises(UsageError, match=r'spread.npy .* is missing'):
            create(writable)
    path.write_bytes(data)
    create().close()
