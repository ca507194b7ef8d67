"""Folders of images in, batches out: what is loaded, and which mistakes stop the run with one line."""
import argparse
import logging
import random
import tarfile
import traceback
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageDataset, create_dataset
from timm.loss import BinaryCrossEntropy, JsdCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from timm_distill.args import create_train_parser, create_validate_parser, parse_args
from timm_distill.data import (
    StrictImageDataset,
    create_datasets,
    create_eval_dataset,
    create_eval_loader,
    create_loaders,
    create_train_loss,
    set_loader_epoch,
    user_message,
)
from timm_distill.data.batch_scale import BatchScale
from timm_distill.errors import UsageError
from timm_distill.utils.random import get_rng_state, set_rng_state

CPU = torch.device('cpu')
DATA_CONFIG = {
    'input_size': (3, 32, 32),
    'mean': (0.5, 0.5, 0.5),
    'std': (0.5, 0.5, 0.5),
    'interpolation': 'bicubic',
    'crop_pct': 1.0,
    'crop_mode': 'center',
}


def write_images(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new('RGB', (40, 36), color=(40 * i % 256, 100, len(folder.name) * 30 % 256)).save(folder / f'{i}.png')


@pytest.fixture
def folder(tmp_path):
    """Three classes, 4 training and 2 validation images each."""
    for name in ('ant', 'bee', 'cat'):
        write_images(tmp_path / 'train' / name, 4)
        write_images(tmp_path / 'validation' / name, 2)
    return tmp_path


def train_args(folder: Path, *argv: str) -> argparse.Namespace:
    return parse_args(create_train_parser(), ['--data-dir', str(folder), '-b', '4', '-j', '0', *argv])


def loaders(folder: Path, *argv: str, num_classes: int = 3):
    return create_loaders(train_args(folder, *argv), DATA_CONFIG, num_classes, CPU)


def error_of(folder: Path, *argv: str, num_classes: int = 3) -> str:
    with pytest.raises(UsageError) as error:
        create_datasets(train_args(folder, *argv), DATA_CONFIG, num_classes)
    assert '\n' not in str(error.value)
    return str(error.value)


def reading_error(loader) -> str:
    """What a script prints for the error that reading all batches ends with."""
    try:
        list(loader)
    except UsageError as error:
        traceback.clear_frames(error.__traceback__)  # else its cycle keeps the workers, and collecting it takes 10 s
        return user_message(error)
    return ''


@pytest.mark.parametrize('flags', [[], ['--no-prefetcher'], ['-j', '2']])
def test_loaders_give_batches_of_the_model_input_size(folder, flags):
    data = loaders(folder, *flags)
    train, val, mixup_fn = data.train, data.eval, data.mixup_fn
    x, y = next(iter(train))
    assert (x.shape, x.dtype, y.shape, y.dtype) == ((4, 3, 32, 32), torch.float32, (4,), torch.int64)
    assert mixup_fn is None
    targets = torch.cat([y for _, y in val])
    assert targets.tolist() == [0, 0, 1, 1, 2, 2]
    assert len(train) == 3


def test_images_are_normalised_with_and_without_prefetcher_alike(folder):
    batches = [next(iter(loaders(folder, *flags).eval))[0] for flags in ([], ['--no-prefetcher'])]
    torch.testing.assert_close(batches[0], batches[1])
    assert batches[0].min() >= -1


def test_validation_batch_size_and_model_dtype_are_used(folder):
    args = train_args(folder, '-vb', '6')
    data = create_loaders(args, DATA_CONFIG, 3, CPU, model_dtype=torch.bfloat16)
    x, _ = next(iter(data.eval))
    assert (len(x), x.dtype) == (6, torch.bfloat16)


def test_mixup_with_prefetcher_happens_in_the_loader(folder):
    data = loaders(folder, '--mixup', '0.2')
    train = data.train
    _, y = next(iter(train))
    assert data.mixup_fn is None
    assert y.shape == (4, 3)
    torch.testing.assert_close(y.sum(1), torch.ones(4))
    train.mixup_enabled = False  # what --mixup-off-epoch does
    assert train.loader.collate_fn.mixup_enabled is False


def test_mixup_without_prefetcher_happens_in_the_loop(folder):
    data = loaders(folder, '--cutmix', '1.0', '--no-prefetcher')
    x, y = next(iter(data.train))
    assert y.shape == (4,)
    _, mixed = data.mixup_fn(x, y)
    assert mixed.shape == (4, 3)


@pytest.mark.parametrize('workers', ['0', '2'])
def test_mixup_ends_at_its_epoch_in_running_loader_processes_too(folder, workers):
    train = loaders(folder, '--mixup', '1', '--smoothing', '0', '-j', workers).train
    mixed = torch.cat([y for _, y in train])
    train.mixup_enabled = False
    plain = torch.cat([y for _, y in train])
    assert set(plain.unique().tolist()) == {0., 1.}
    assert mixed.max(1).values.min() < 1


def test_posterizing_to_no_bits_gives_a_black_image_where_pillow_raises(folder, monkeypatch):
    monkeypatch.setattr(timm.data.auto_augment, '_RAND_TRANSFORMS', ['Posterize'])
    monkeypatch.setattr(timm.data.auto_augment, '_RAND_INCREASING_TRANSFORMS', ['PosterizeIncreasing'])
    flags = ['--aa', 'rand-m10-n1-p1-inc1', '--hflip', '0', '--color-jitter', '0', '--scale', '1', '1']
    x, _ = next(iter(loaders(folder, *flags).train))
    assert torch.equal(x, torch.full_like(x, -1))  # 0 minus the mean over the deviation
    assert timm.data.auto_augment.NAME_TO_OP['Posterize'] is timm.data.auto_augment.posterize


def test_views_of_an_image_follow_one_another_in_the_batch(folder):
    x, y = next(iter(loaders(folder, '--aug-splits', '3').train))
    assert x.shape == (12, 3, 32, 32)
    assert y.tolist() == y[:4].tolist() * 3


def test_scheduled_sizes_give_batches_of_these_sizes_and_their_scale(folder):
    data = loaders(
        folder, '--train-img-sizes', '24', '32', '--train-batch-sizes', '6', '2',
        '--variable-batch-loss-scale', 'linear', '--train-batches-per-epoch', '6')
    shapes = {x.shape for x, _ in data.train}
    assert shapes <= {(6, 3, 24, 24), (2, 3, 32, 32)}
    assert data.batch_size == 4.
    assert data.batch_scale(6) == 1.5


def test_batch_scale_follows_its_mode():
    assert [BatchScale(mode, 4.)(16) for mode in ('none', 'sqrt', 'linear')] == [1., 2., 4.]


def test_patch_sequences_vary_in_length_and_batch_size(folder):
    args = train_args(folder, '--naflex-loader', '--naflex-train-seq-lens', '4', '8', '--naflex-max-seq-len', '9')
    data = create_loaders(args, DATA_CONFIG, 3, CPU, patch_size=(8, 8))
    for patches, target in data.train:
        size, length, _ = patches['patches'].shape
        assert (length, size == len(target)) in ((4, True), (8, True))
    patches, target = next(iter(data.eval))
    assert patches['patches'].shape == (4, 9, 192)
    assert data.batch_scale(8) == 2.


class LabelLists(torch.utils.data.Dataset):
    """Images with any number of labels, in place of a Hugging Face dataset."""
    transform = target_transform = None

    def __len__(self):
        return 8

    def __getitem__(self, index):
        image = self.transform(Image.new('RGB', (32, 32), color=(index * 20, 0, 0)))
        return image, self.target_transform([index % 3, 2] if index else [])


def test_multilabel_targets_are_vectors_with_and_without_mixup(folder, monkeypatch):
    monkeypatch.setattr('timm_distill.data.datasets.create_dataset', lambda *args, **kwargs: LabelLists())
    monkeypatch.setattr('importlib.util.find_spec', lambda name: True)
    flags = ['--task', 'multilabel', '--dataset', 'hfds/x', '--aa', 'original']
    data = loaders(folder, *flags)
    target = torch.cat([y for _, y in data.eval])
    assert target.tolist()[:3] == [[0, 0, 0], [0, 1, 1], [0, 0, 1]]
    _, mixed = next(iter(loaders(folder, *flags, '--mixup', '0.5').train))
    assert mixed.shape == (4, 3)


@pytest.mark.parametrize(('flags', 'words'), [
    (['--task', 'multilabel'], 'several labels per image'),
    (['--dataset', 'tfds/imagenet2012'], 'pip install tensorflow-datasets'),
    (['--dataset', 'torch/no_such_set'], 'Unknown torchvision dataset'),
])
def test_dataset_that_cannot_be_opened_is_a_usage_error_of_one_line(folder, monkeypatch, flags, words):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None if name == 'tensorflow_datasets' else True)
    assert words in error_of(folder, *flags)


def test_further_label_losses_follow_their_flags(folder):
    def loss(*flags):
        return create_train_loss(train_args(folder, *flags), num_classes=3)

    assert isinstance(loss('--jsd-loss', '--aug-splits', '3'), JsdCrossEntropy)
    assert type(loss('--task', 'multilabel', '--loss', 'asl')).__name__ == 'AsymmetricLossMultiLabel'
    assert loss('--loss', 'poly', '--poly-epsilon', '1').epsilon == 1
    stats = folder / 'stats.json'
    stats.write_text('{"pos_counts": [2, 2, 4], "num_samples": 8}')
    weighted = loss('--task', 'multilabel', '--class-stats', str(stats), '--loss-pos-weight', 'neg_pos')
    assert weighted.pos_weight.tolist() == [3., 3., 1.]
    for flags, words in (
            (['--task', 'multilabel', '--loss-class-weight', '1,2'], '2 entries, but the model has 3 classes'),
            (['--loss', 'zlpr'], 'multi-label'),
            (['--task', 'multilabel', '--loss-pos-weight', 'neg_pos'], 'class stats'),
            (['--task', 'multilabel', '--class-stats', 'none.json'], 'none.json'),
    ):
        with pytest.raises(UsageError, match=words):
            loss(*flags)


def test_label_loss_follows_mixup_smoothing_and_bce(folder):
    def loss(*flags):
        return create_train_loss(train_args(folder, *flags))

    assert isinstance(loss(), LabelSmoothingCrossEntropy)
    assert isinstance(loss('--smoothing', '0'), nn.CrossEntropyLoss)
    assert isinstance(loss('--mixup', '0.1'), SoftTargetCrossEntropy)
    assert isinstance(loss('--bce-loss', '--cutmix-minmax', '0.1', '0.5'), BinaryCrossEntropy)
    bce = loss('--bce-loss', '--bce-target-thresh', '0.2', '--bce-sum', '--bce-pos-weight', '2')
    assert (bce.target_threshold, bce.sum_classes, bce.smoothing, bce.pos_weight.item()) == (0.2, True, 0.1, 2.)


@pytest.mark.parametrize('flags', [
    ['-j', '0'], ['-j', '2'], ['-j', '2', '--no-prefetcher', '--aa', 'rand-m9'],
    ['-j', '0', '--train-crop-mode', 'pad'], ['-j', '2', '--train-crop-mode', 'pad']])
def test_loaders_go_on_from_a_saved_state_as_if_they_had_never_stopped(folder, flags):
    def epoch(data):
        batches = torch.cat([x for x, _ in data.train]), torch.cat([x for x, _ in data.eval])
        return torch.cat(batches)

    whole = loaders(folder, *flags)
    torch.manual_seed(1)
    random.seed(1)
    epoch(whole)
    saved, rng_state = whole.state_dict(), get_rng_state()
    expected = [epoch(whole), epoch(whole)]
    resumed = loaders(folder, *flags)
    resumed.load_state_dict(saved)
    set_rng_state(rng_state)
    for e in expected:
        torch.testing.assert_close(epoch(resumed), e, rtol=0, atol=0)


def test_states_of_loader_processes_are_saved_without_pickles(folder, tmp_path):
    data = loaders(folder, '-j', '2')
    list(data.train)
    torch.save(data.state_dict(), tmp_path / 'state.pth')
    state = torch.load(tmp_path / 'state.pth', weights_only=True)
    assert sorted(state['train']['workers']) == [0, 1]
    assert (state['train']['started'], state['eval']['started']) == (True, False)


def test_empty_val_split_means_no_validation(folder):
    assert loaders(folder, '--val-split', '').eval is None


@pytest.mark.parametrize('name', ['val', 'valid', 'evaluation'])
def test_split_folder_may_have_the_other_names_that_timm_takes(folder, name):
    (folder / 'validation').rename(folder / name)
    assert len(create_datasets(train_args(folder), DATA_CONFIG, 3)[1]) == 6


def test_positional_folder_works_as_in_timm(folder):
    args = parse_args(create_train_parser(), [str(folder)])
    assert len(create_datasets(args, DATA_CONFIG, 3)[0]) == 12


def test_missing_data_dir_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match='--data-dir DIR'):
        create_datasets(parse_args(create_train_parser(), []), DATA_CONFIG, 3)
    assert 'does not exist' in error_of(tmp_path / 'nowhere')


def test_missing_train_folder_is_an_error_and_not_the_whole_data_folder(folder):
    (folder / 'train').rename(folder / 'elsewhere')
    message = error_of(folder)
    assert '--train-split' in message
    assert 'looked for train, training' in message
    assert len(create_datasets(train_args(folder, '--train-split', 'elsewhere'), DATA_CONFIG, 3)[0]) == 12


def test_missing_validation_folder_is_an_error_that_tells_how_to_do_without(folder):
    (folder / 'validation').rename(folder / 'elsewhere')
    message = error_of(folder)
    assert '--val-split' in message
    assert 'without validation' in message


def test_folder_without_images_is_a_usage_error(tmp_path):
    (tmp_path / 'train' / 'ant').mkdir(parents=True)
    assert 'Found 0 images' in error_of(tmp_path)


def test_single_class_folder_is_a_usage_error(tmp_path):
    write_images(tmp_path / 'train' / 'ant', 2)
    assert 'only one class folder with images (ant)' in error_of(tmp_path, num_classes=1)


def test_images_outside_of_class_folders_are_a_usage_error(folder):
    write_images(folder / 'train', 1)
    assert 'outside of class folders' in error_of(folder, num_classes=4)


def test_class_count_that_differs_from_the_folders_names_both_and_the_flag(folder):
    message = error_of(folder, num_classes=1000)
    assert '3 class folders' in message
    assert '1000 classes' in message
    assert str(folder / 'train') in message
    assert '--num-classes 3' in message


def test_splits_with_different_class_folders_are_a_usage_error(folder):
    (folder / 'validation' / 'bee').rename(folder / 'validation' / 'dog')
    message = error_of(folder)
    assert 'only in train: bee' in message
    assert 'only in validation: dog' in message


def test_class_map_replaces_the_folder_checks(folder):
    path = folder / 'map.txt'
    path.write_text('cat\nbee\nant\ndog\n')
    train, _ = create_datasets(train_args(folder, '--class-map', str(path)), DATA_CONFIG, 4)
    assert train[0][1] == 2
    assert '--num-classes 4' in error_of(folder, '--class-map', str(path))
    assert 'none.txt' in error_of(folder, '--class-map', 'none.txt', num_classes=4)


@pytest.mark.parametrize(('flags', 'words'), [
    (['--dataset', 'hdfs/cifar10'], 'unknown reader'),
    (['--train-split', 'train[:10%]'], 'cannot be sliced'),
    (['--target-key', 'label'], '--target-key'),
])
def test_settings_that_class_folders_cannot_follow_are_usage_errors(folder, flags, words):
    assert words in error_of(folder, *flags)


def test_other_readers_pass_through_without_folder_checks(folder):
    args = train_args(folder, '--dataset', 'torch/image_folder', '--val-split', '')
    dataset, _ = create_datasets(args, DATA_CONFIG, 1000)
    assert len(dataset) == 12


def test_tar_file_is_not_used_for_both_splits(folder):
    path = folder / 'train.tar'
    with tarfile.open(path, 'w') as tar:
        tar.add(folder / 'train', arcname='.')
    assert "--val-split ''" in error_of(path)
    train, _ = create_datasets(train_args(path, '--val-split', ''), DATA_CONFIG, 3)
    assert isinstance(train, StrictImageDataset)
    assert len(train) == 12


def test_batch_larger_than_the_training_set_is_a_usage_error(folder):
    with pytest.raises(UsageError, match='--batch-size 16 .* \\(12\\)'):
        loaders(folder, '-b', '16')


def test_repeated_augmentation_needs_distributed_training(folder):
    with pytest.raises(UsageError, match='--aug-repeats 3'):
        loaders(folder, '--aug-repeats', '3')


@pytest.mark.parametrize('damage', [lambda data: b'not an image', lambda data: data[:len(data) // 2], lambda data: b''])
@pytest.mark.parametrize('workers', ['0', '2'])
def test_corrupt_image_stops_with_one_line_that_names_the_file(folder, workers, damage):
    path = folder / 'validation' / 'bee' / '1.png'
    path.write_bytes(damage(path.read_bytes()))
    message = reading_error(loaders(folder, '-j', workers).eval)
    assert message.startswith(f'cannot read image {path}: ')
    assert '\n' not in message


def test_strict_dataset_gives_what_timm_gives_for_readable_images(folder):
    dataset = create_dataset('', root=str(folder), split='train')
    strict = StrictImageDataset(dataset)
    assert type(dataset) is ImageDataset
    assert len(strict) == len(dataset)
    for index in range(len(dataset)):
        (image, target), (expected, expected_target) = strict[index], dataset[index]
        assert image.tobytes() == expected.tobytes()
        assert target == expected_target


def test_validation_script_reads_its_split_with_the_same_loader(folder):
    args = parse_args(create_validate_parser(), ['--data-dir', str(folder), '-b', '6', '-j', '0', '--split', 'val'])
    loader = create_eval_loader(args, DATA_CONFIG, create_eval_dataset(args, DATA_CONFIG, 3), CPU)
    x, y = next(iter(loader))
    expected, _ = next(iter(loaders(folder, '-vb', '6').eval))
    torch.testing.assert_close(x, expected, rtol=0, atol=0)
    with pytest.raises(UsageError, match='--num-classes 3'):
        create_eval_dataset(args, DATA_CONFIG, 10)


def test_epoch_is_passed_to_the_sampler_that_shuffles_by_it(folder):
    class Sampler:
        epoch = None

        def set_epoch(self, epoch):
            self.epoch = epoch

    loader = argparse.Namespace(dataset=None, batch_sampler=None, sampler=Sampler())
    set_loader_epoch(loader, 3)
    assert loader.sampler.epoch == 3
    set_loader_epoch(loaders(folder).train, 3)


def test_reading_does_not_change_the_arguments(folder):
    args = train_args(folder, '--mixup', '0.2')
    before = vars(args).copy()
    create_loaders(args, DATA_CONFIG, 3, CPU)
    assert vars(args) == before


def test_no_image_is_skipped_silently(folder, caplog):
    with caplog.at_level(logging.WARNING):
        list(loaders(folder).eval)
    assert 'Skipped' not in caplog.text
