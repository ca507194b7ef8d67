"""Replayed views: what an image is augmented to depends on its index and the number of the view alone."""
import random
from pathlib import Path
from typing import Any, Dict, Tuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from timm.data.random_erasing import RandomErasing

from timm_distill.args import create_train_parser, parse_args
from timm_distill.data import create_loaders, set_loader_epoch
from timm_distill.data.view_mixing import Pairing
from timm_distill.data.views import ReplayedErasing, View, ViewGrid, join_key, split_keys
from timm_distill.errors import UsageError

CPU = torch.device('cpu')
DATA_CONFIG = {
    'input_size': (3, 32, 32), 'mean': (0.5,) * 3, 'std': (0.5,) * 3, 'interpolation': 'bicubic', 'crop_pct': 1.0,
    'crop_mode': 'center',
}
AUGMENT = [
    '--aa', 'rand-m9-mstd0.5-inc1', '--color-jitter-prob', '0.8', '--grayscale-prob', '0.2', '--gaussian-blur-prob',
    '0.5', '--reprob', '0.7', '--recount', '2', '--vflip', '0.3']
MIX = ['--mixup', '0.8', '--cutmix', '1', '--mixup-mode', 'elem']
Views = Dict[Tuple[int, ...], Tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of four images of noise."""
    root = tmp_path_factory.mktemp('images')
    generator = np.random.default_rng(0)
    for name in ('ant', 'bee', 'cat'):
        (root / 'train' / name).mkdir(parents=True)
        for i in range(4):
            coarse = Image.fromarray(generator.integers(0, 256, (6, 7, 3), dtype=np.uint8))
            coarse.resize((48, 40), Image.Resampling.BICUBIC).save(root / 'train' / name / f'{i}.png')
    return root


def create(folder: Path, *flags: str, views: int = 2, **kwargs: Any) -> Any:
    argv = ['--data-dir', str(folder), '--val-split', '', '-b', '4', '-j', '0', *flags]
    args = parse_args(create_train_parser(), argv)
    return create_loaders(args, DATA_CONFIG, 3, CPU, num_views=views, **kwargs)


def read(folder: Path, *flags: str, epochs: int = 2, **kwargs: Any) -> Views:
    """Return image and target of every view that some epochs show."""
    loaders = create(folder, *flags, **kwargs)
    views: Views = {}
    for epoch in range(epochs):
        set_loader_epoch(loaders.train, epoch)
        for images, target in loaders.train:
            target, keys = split_keys(target)
            for image, label, key in zip(images, target, loaders.grid.batch_keys(keys)):
                view = loaders.grid.view(key)
                if view in views:
                    assert torch.equal(views[view][0], image)
                views[view] = image.clone(), label
    return views


def assert_same(one: Views, other: Views, least: int) -> None:
    shared = one.keys() & other.keys()
    assert len(shared) >= least
    for view in shared:
        for a, b in zip(one[view], other[view]):
            assert torch.equal(a, b), view


@pytest.mark.parametrize('flags', [
    AUGMENT,
    [*AUGMENT, '--no-prefetcher'],
    [*AUGMENT, '--train-crop-mode', 'pad'],
    [*AUGMENT, *MIX],
    [*AUGMENT, *MIX, '--no-prefetcher'],
    [*AUGMENT[2:], *MIX[:-1], 'pair', '--aa', 'augmix-m5-w2'],
    [*AUGMENT, '--aug-splits', '2', '--resplit'],
    [*AUGMENT, '--train-img-sizes', '32', '48', '--train-batch-sizes', '4', '2'],
    ['--no-aug'],
], ids=lambda flags: ' '.join(flags[-4:]))
def test_a_view_is_the_same_in_every_order_batch_and_process(folder: Path, flags: Any) -> None:
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    one = read(folder, *flags)
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    batch = [] if '--train-batch-sizes' in flags else ['-b', '2']
    other = read(folder, *flags, *batch, '--seed', '7', '-j', '2')
    sized = '--train-img-sizes' in flags
    assert_same(one, other, least=4 if sized else 24)
    assert len(one) >= (20 if sized else 24)
    random.setstate(before[0])
    torch.set_rng_state(before[2])
    np.random.set_state(('MT19937', before[1], 624))


@pytest.mark.parametrize('flags', [AUGMENT, [*AUGMENT, *MIX]])
def test_views_of_an_image_differ_and_come_round_again(folder: Path, flags: Any) -> None:
    two, five = read(folder, *flags), read(folder, *flags, epochs=5)  # `read` compares those that come again
    assert two.keys() == five.keys() and len(two) == 24
    for index in range(12):
        assert not torch.equal(two[View(index, 0)][0], two[View(index, 1)][0])


@pytest.mark.parametrize('repeats', ['3', '1.5'])
def test_repeated_augmentation_shows_every_repeat_as_another_view(
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        repeats: str,
) -> None:
    monkeypatch.setattr(dist, 'get_world_size', lambda: 2)
    seen: Views = {}
    for rank in range(2):
        monkeypatch.setattr(dist, 'get_rank', lambda rank=rank: rank)
        rank_views = read(
            folder, *AUGMENT, '--aug-repeats', repeats, '-b', '3', views=6, epochs=1, distributed=True)
        assert not rank_views.keys() & seen.keys()
        seen.update(rank_views)
    assert len(seen) == 12
    for index in {view.sample for view in seen}:
        numbers = sorted(view.number for view in seen if view.sample == index)
        assert numbers == list(range(len(numbers)))
    monkeypatch.setattr(dist, 'get_world_size', lambda: 1)
    plain = read(folder, *AUGMENT, views=6, epochs=6)
    assert_same(seen, plain, least=12)


def test_ranks_see_the_views_of_a_single_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = read(folder, *AUGMENT, *MIX)
    monkeypatch.setattr(dist, 'get_world_size', lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(dist, 'get_rank', lambda rank=rank: rank)
        assert_same(read(folder, *AUGMENT, *MIX, distributed=True), plain, least=4)


@pytest.mark.parametrize('flags', [[], ['--no-prefetcher']])
def test_mixed_view_and_target_are_those_of_image_and_partner(folder: Path, flags: Any) -> None:
    plain = read(folder, *flags, '--smoothing', '0')
    mixed = read(folder, *flags, '--smoothing', '0', '--mixup', '1', '--mixup-mode', 'pair')
    assert len(mixed) == 24
    for view, (image, target) in mixed.items():
        partner = next(
            other for other in plain if other.number == view.number and other.sample != view.sample
            and _weight(image, plain[view][0], plain[other][0]) is not None)
        weight = _weight(image, plain[view][0], plain[partner][0])
        expected = torch.zeros(3)
        expected[plain[view][1]] += weight
        expected[plain[partner][1]] += 1 - weight
        torch.testing.assert_close(target, expected, rtol=0, atol=0.02)


def _weight(mixed: torch.Tensor, image: torch.Tensor, other: torch.Tensor) -> Any:
    """Return with which weight an image is in a mixture with another, None where it is another mixture."""
    difference = (image - other).flatten()
    weight = float((mixed - other).flatten() @ difference / (difference @ difference))
    fits = (weight * image + (1 - weight) * other - mixed).abs().max() < 0.02
    return weight if fits and -0.02 <= weight <= 1.02 else None


def test_cutmix_pastes_the_partner_at_its_own_view_and_counts_the_area(folder: Path) -> None:
    plain = read(folder, '--smoothing', '0')
    mixed = read(folder, '--smoothing', '0', '--cutmix', '1', '--mixup-mode', 'elem')
    for view, (image, target) in mixed.items():
        kept = (image == plain[view][0]).all(0)
        others = [other for other in plain if other.number == view.number]
        assert any((plain[other][0] == image).all(0)[~kept].all() for other in others)
        label = int(plain[view][1])
        assert float(target[label]) >= 1 - float((~kept).float().mean()) - 0.05


@pytest.mark.parametrize('count', [1, 2, 3, 64, 65, 1000])
def test_pairing_is_a_symmetric_permutation_that_the_key_changes(count: int) -> None:
    pairs = [[Pairing(count, key).partner(i) for i in range(count)] for key in range(3)]
    for partners in pairs:
        assert [partners[i] for i in partners] == list(range(count))
        assert sum(i == partner for i, partner in enumerate(partners)) == count % 2
    assert count < 64 or len({tuple(partners) for partners in pairs}) == 3


def test_erasing_with_the_prefetcher_is_timms() -> None:
    """Boxes and noise have the distribution of timm's: share of erased images and of erased pixels."""
    count = 2000
    erasing = RandomErasing(0.5, mode='pixel', device='cpu')
    replayed = ReplayedErasing(erasing, ViewGrid(count, 1))
    images = torch.full((count, 3, 16, 16), 9.)
    replayed.note((images, torch.stack([torch.zeros(count, dtype=torch.int64), torch.arange(count)], 1)))
    one, other = replayed(images.clone()), erasing(images.clone())
    for dims in ((1, 2, 3), (3,)):
        shares = [float((x != 9).flatten(-len(dims)).any(-1).float().mean()) for x in (one, other)]
        assert shares[0] == pytest.approx(shares[1], abs=0.06)
    noise = one[one != 9]
    assert abs(float(noise.mean())) < 0.03 and float(noise.std()) == pytest.approx(1, abs=0.03)
    replayed.note((images, torch.stack([torch.zeros(3, dtype=torch.int64), torch.tensor([7, 399, 0])], 1)))
    again = replayed(images[:3].clone())
    assert torch.equal(again, one[[7, 399, 0]])


@pytest.mark.parametrize('key', [0, 5, (1 << 20) - 1, (1 << 20) + 3, (1 << 43) + 12345])
@pytest.mark.parametrize('target', [3, np.array([0.25, 0.75], dtype=np.float32), torch.tensor([0.5, 0.5])])
def test_keys_travel_with_targets_of_any_form(target: Any, key: int) -> None:
    label, keys = split_keys(torch.as_tensor(join_key(target, key))[None])
    assert keys.tolist() == [key]
    torch.testing.assert_close(label[0], torch.as_tensor(target))


def test_keys_number_all_views_once() -> None:
    grid = ViewGrid(3, 4, num_sizes=2, num_splits=3)
    keys = [
        grid.key(View(i, v, size, split))
        for i in range(3) for v in range(4) for size in range(2) for split in range(3)]
    assert keys == list(range(len(grid)))
    assert [grid.key(grid.view(key)) for key in keys] == keys
    assert grid.indices(torch.tensor(keys)).tolist() == [key // 24 for key in keys]


@pytest.mark.parametrize('flags, word', [
    (['--mixup', '0.2'], '--mixup-mode elem'),
    (['--cutmix-minmax', '0.2', '0.8', '--mixup-mode', 'pair', '--mixup-off-epoch', '3'], '--mixup-off-epoch 3'),
    (['--reprob', '0.2', '--resplit'], '--resplit'),
    (['-j', '1', '--use-multi-epochs-loader'], '--use-multi-epochs-loader'),
])
def test_what_cannot_be_replayed_is_refused_by_name(folder: Path, flags: Any, word: str) -> None:
    with pytest.raises(UsageError, match=word) as error:
        create(folder, *flags)
    assert '--teacher-cache' in str(error.value)
