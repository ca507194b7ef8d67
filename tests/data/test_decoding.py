"""Promises about grey images of more than 8 bits, and about the other modes."""
from pathlib import Path
from typing import Any, Callable, Dict, List

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from reader_images import DEEP, READERS, write_folders
from timm.data import create_dataset

from timm_distill.args import create_train_parser, create_validate_parser
from timm_distill.data import create_datasets, create_eval_dataset
from timm_distill.data.decoding import ImageDecoder

GREY = np.rint(DEEP / 257).astype(np.uint8)  # the same picture in 8 bits
DATA_CONFIG = {'input_size': (3, 32, 32)}


def write_tiff(path: Path, values: np.ndarray, **tags: int) -> None:
    Image.fromarray(values).save(path, tiffinfo={int(tag[1:]): value for tag, value in tags.items()})


# What a scanner, a microscope or a converter writes for the one picture.
WRITERS: Dict[str, Callable[[Path], Any]] = {
    '16 bits.png': lambda path: Image.fromarray(DEEP).save(path),
    '16 bits.tif': lambda path: Image.fromarray(DEEP).save(path),
    '16 bits.jp2': lambda path: Image.fromarray(DEEP).save(path),
    '16 bits.pgm': lambda path: path.write_bytes(b'P5 40 48 65535\n' + DEEP.astype('>u2').tobytes()),
    '12 bits.pgm': lambda path: path.write_bytes(b'P5 40 48 4095\n' + (DEEP >> 4).astype('>u2').tobytes()),
    '32 bits of 16.tif': lambda path: Image.fromarray(DEEP.astype(np.int32)).save(path),
    '32 bits of 8.tif': lambda path: Image.fromarray(GREY.astype(np.int32)).save(path),
    'white is zero.tif': lambda path: write_tiff(path, 65535 - DEEP, t262=0),
    'float of 1.tif': lambda path: Image.fromarray((DEEP / 65535).astype(np.float32)).save(path),
    'float of 255.tif': lambda path: Image.fromarray((DEEP / 257).astype(np.float32)).save(path),
    'float of 65535.tif': lambda path: Image.fromarray(DEEP.astype(np.float32)).save(path),
    'overshoot.tif': lambda path: Image.fromarray((DEEP / 65535 * 1.1 - .05).astype(np.float32)).save(path),
    'float.pfm': lambda path: path.write_bytes(b'Pf 40 48 -1.0\n' + (DEEP[::-1] / 65535).astype('<f4').tobytes()),
}


@pytest.mark.parametrize('mode', ['L', 'RGB'])
@pytest.mark.parametrize('name', WRITERS)
def test_grey_of_more_than_8_bits_is_the_picture_that_it_is_in_8_bits(tmp_path: Path, name: str, mode: str) -> None:
    WRITERS[name](tmp_path / name)
    image = ImageDecoder(mode)(str(tmp_path / name))
    assert image.mode == mode
    expected = np.asarray(Image.fromarray(GREY).convert(mode)).astype(int)
    if name.startswith('overshoot'):
        expected = np.clip(np.rint(expected * 1.1 - .05 * 255), 0, 255)
    assert np.abs(np.asarray(image) - expected).max() <= 1


@pytest.mark.parametrize('values', [
    np.linspace(-1000, 3000, 64, dtype=np.int32),
    np.linspace(-1000, 3000, 64, dtype=np.float32),
    np.linspace(0, 2e9, 64, dtype=np.int32),
    np.linspace(0, 1e6, 64, dtype=np.float32),
    np.array([0, np.nan], dtype=np.float32),
    np.array([0, np.inf], dtype=np.float32),
])
def test_values_of_unknown_range_are_refused_not_guessed(tmp_path: Path, values: np.ndarray) -> None:
    Image.fromarray(values[None]).save(tmp_path / 'image.tif')
    with pytest.raises(ValueError, match='grey values'):
        ImageDecoder('RGB')(str(tmp_path / 'image.tif'))


def test_scaling_is_logged_once_and_a_second_guess_warns(tmp_path: Path, caplog: Any) -> None:
    caplog.set_level('INFO')
    decode = ImageDecoder('RGB')
    for name in ('16 bits.png', '16 bits.tif', 'float of 255.tif', 'float of 255.tif', 'float of 1.tif'):
        WRITERS[name](tmp_path / name)
        decode(str(tmp_path / name), name)
    lines = [(record.levelname, record.getMessage().rpartition('first in ')[2]) for record in caplog.records]
    assert [line[0] for line in lines] == ['INFO', 'INFO', 'WARNING']
    assert lines[0][1] == '16 bits.png.' and '65535 becomes 255' in caplog.messages[0]
    assert 'float of 1.tif' in lines[2][1] and 'another range' in caplog.messages[2]


def create_modes() -> Dict[str, Image.Image]:
    """An image of every mode that PIL converts to RGB by itself."""
    colour = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    rgb = Image.fromarray(colour)
    modes = {mode: rgb.convert(mode) for mode in ('1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'HSV')}
    modes['RGBA'].putalpha(Image.fromarray(colour[..., 0]))
    modes['P with transparency'] = rgb.quantize(16)
    modes['P with transparency'].info['transparency'] = 3
    return modes


@pytest.mark.parametrize('name', create_modes())
def test_palette_alpha_and_ink_are_converted_as_timm_converts_them(name: str) -> None:
    image = create_modes()[name]
    for mode in ('RGB', 'L'):
        assert np.array_equal(np.asarray(ImageDecoder(mode)(image)), np.asarray(image.convert(mode)))


@pytest.mark.parametrize('reader', READERS)
def test_every_reader_scales_in_training_and_validation(tmp_path: Path, reader: str) -> None:
    write, flags = READERS[reader]
    write(tmp_path)
    args = create_train_parser().parse_args([str(flag) for flag in ['--batch-size', 2, *flags(tmp_path)]])
    datasets: List[Any] = [dataset for dataset in create_datasets(args, DATA_CONFIG, 2) if dataset is not None]
    if reader != 'tar':
        validate = [str(flag) for flag in flags(tmp_path) if not str(flag).startswith('--val-num')][:4]
        args = create_validate_parser().parse_args([*validate, '--num-samples', '2', '--split', 'validation'])
        datasets.append(create_eval_dataset(args, DATA_CONFIG, 2))
    expected = np.asarray(Image.fromarray(GREY).convert('RGB'))
    for dataset in datasets:
        image, _ = next(iter(dataset))
        assert image.mode == 'RGB' and np.array_equal(np.asarray(image), expected)


def test_loader_processes_say_it_once_together(tmp_path: Path, capfd: Any) -> None:
    folder = tmp_path / 'train' / 'a'
    folder.mkdir(parents=True)
    for i in range(8):
        Image.fromarray(DEEP).save(folder / f'{i}.png')
    (tmp_path / 'train' / 'b').mkdir()
    Image.fromarray(DEEP).save(tmp_path / 'train' / 'b' / '0.png')
    args = create_train_parser().parse_args(['--data-dir', str(tmp_path), '--val-split', ''])
    dataset, _ = create_datasets(args, DATA_CONFIG, 2)
    dataset.transform = timm.data.create_transform(32)  # type: ignore[attr-defined]
    loader = torch.utils.data.DataLoader(dataset, 1, num_workers=2)
    assert sum(float(images.mean()) < 1 for images, _ in loader) == 9
    assert dataset.decode._seen[:].count(1) == 1  # type: ignore[attr-defined]


def test_mode_that_the_user_asks_for_keeps_its_bits(tmp_path: Path) -> None:
    write_folders(tmp_path)
    image = ImageDecoder('I;16')(str(tmp_path / 'train' / 'a' / 'a.png'))
    assert image.mode == 'I;16' and np.asarray(image).max() == 65535
    plain = create_dataset('', str(tmp_path), input_img_mode='I;16')
    assert np.array_equal(np.asarray(plain[0][0]), np.asarray(image))
