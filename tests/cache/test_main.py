"""The command line of caches."""
import shutil
from pathlib import Path
from typing import Any

import pytest

import train_distill
from timm_distill import UsageError
from timm_distill.cache.__main__ import main

FLAGS = [
    '--student', 'test_resnet', '--num-classes', '10', '--img-size', '32', '-b', '40', '-j', '0', '--device', 'cpu',
    '--val-split', '', '--kd', 'kd']
TEACHER = ['--teacher', 'test_convnext', '--no-teacher-pretrained', '--cache-views', '2']


def fill(data_dir: Path, cache: Path, *flags: str) -> int:
    return main(['fill', '--data-dir', str(data_dir), *FLAGS, *TEACHER, '--teacher-cache', str(cache), *flags])


def test_filled_cache_is_described_verified_and_enough_for_a_run(
        few_digits_dir: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture,
) -> None:
    cache, count = tmp_path / 'cache', len(list((few_digits_dir / 'train').glob('*/*')))
    assert fill(few_digits_dir, cache) == 0
    assert f'{2 * count} views added' in capsys.readouterr().out
    assert fill(few_digits_dir, cache) == 0
    assert '0 views added' in capsys.readouterr().out
    assert main(['info', str(cache)]) == 0
    text = capsys.readouterr().out
    assert f'logits-float16-10: {2 * count} views, 20 bytes each, 1 shards' in text and 'test_convnext' in text
    assert main(['verify', str(cache)]) == 0
    train_distill.main([
        '--data-dir', str(few_digits_dir), *FLAGS, '--teacher-cache', str(cache), '--epochs', '1',
        '--warmup-epochs', '0', '--no-report', '--output', str(tmp_path), '--experiment', 'run'])
    shard = cache / 'logits-float16-10' / '000001.rows'
    data = bytearray(shard.read_bytes())
    data[1000] ^= 1
    shard.write_bytes(data)
    assert main(['verify', str(cache)]) == 1
    assert main(['verify', '--drop', str(cache)]) == 1
    assert main(['verify', str(cache)]) == 0
    assert fill(few_digits_dir, cache) == 0
    assert f'{2 * count} views added' in capsys.readouterr().out


def test_caches_of_two_machines_are_merged(few_digits_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    fill(few_digits_dir, tmp_path / 'a')
    shutil.copytree(tmp_path / 'a', tmp_path / 'b')
    shutil.rmtree(tmp_path / 'b' / 'logits-float16-10')
    capsys.readouterr()
    assert main(['merge', str(tmp_path / 'b'), str(tmp_path / 'a')]) == 0
    assert 'views added' in capsys.readouterr().out
    assert main(['merge', str(tmp_path / 'new'), str(tmp_path / 'a'), str(tmp_path / 'b')]) == 0
    main(['info', str(tmp_path / 'new')])
    whole = capsys.readouterr().out.splitlines()[-6:]
    main(['info', str(tmp_path / 'a')])
    assert whole[2:] == capsys.readouterr().out.splitlines()[-4:]
    fill(few_digits_dir, tmp_path / 'c', '--hflip', '0')
    with pytest.raises(UsageError, match='--hflip 0.5 in the cache, 0.0 here|--hflip 0.0 in the cache, 0.5 here'):
        main(['merge', str(tmp_path / 'a'), str(tmp_path / 'c')])


@pytest.mark.parametrize('argv, words', [
    (['info', 'nowhere'], 'holds no cache'),
    (['fill', '--kd', 'kd', '--teacher', 'test_vit'], 'fill needs --teacher-cache'),
])
def test_what_is_missing_is_named(argv: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=words):
        main(argv)


def test_dry_run_prints_the_bytes_of_every_method_before_anything_is_written(
        tmp_path: Path,
        capsys: pytest.CaptureFixture,
) -> None:
    train_distill.main([
        '--teacher', 'test_resnet', '--student', 'test_resnet', '--kd', 'norm+kd', '--num-classes', '1000', '--dry-run',
        '--device', 'cpu', '--img-size', '64', '--teacher-cache', str(tmp_path / 'cache')])
    text = capsys.readouterr().out
    assert 'cache for kd: 896.8 MB (logits-top10-1000 50 bytes a view)' in text
    assert 'cache for norm: ' in text and 'cache of 10 views of 1281167 images: ' in text
    assert not (tmp_path / 'cache').exists()
