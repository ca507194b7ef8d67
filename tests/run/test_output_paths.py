"""Where nothing can be written, a script says so before it computes anything, and leaves nothing behind."""
import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest

import timm_distill.checkpoint.file
import train_distill
import validate
from timm_distill import UsageError
from timm_distill.checkpoint.file import check_file, check_folder, written_at_once
from timm_distill.export import __main__ as export
from timm_distill.run import train_script, validate_script


def fail(*args: Any, **kwargs: Any) -> None:
    raise AssertionError('computed something')


@pytest.fixture()
def file(tmp_path: Path) -> Path:
    path = tmp_path / 'file'
    path.write_text('mine')
    return path


def bad_folders(file: Path) -> list:
    return [
        str(file), str(file / 'below'), str(file.parent / ('x' * 300)), str(file.parent / 'a\0b'),
        '/proc/nothing/here']


@pytest.mark.parametrize('index', range(5), ids=['file', 'below_a_file', 'long_name', 'nul', 'read_only'])
def test_a_folder_that_cannot_be_made_is_named_with_its_flag(file: Path, index: int) -> None:
    path = bad_folders(file)[index]
    with pytest.raises(UsageError, match='--output .* cannot be written') as error:
        check_folder(path, '--output')
    assert '\n' not in str(error.value)
    assert os.listdir(file.parent) == ['file'] and file.read_text() == 'mine'


@pytest.mark.skipif(os.name != 'posix' or os.geteuid() == 0, reason='permissions do not bind this user')
def test_a_folder_without_permission_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(UsageError, match='--output'):
        check_folder(str(tmp_path / 'run'), '--output')


def test_a_check_leaves_nothing_behind(tmp_path: Path) -> None:
    check_folder(str(tmp_path / 'a' / 'b'), '--output')
    check_folder(str(tmp_path), '--output')
    check_file(str(tmp_path / 'w.pth'), '--weights')
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    'argv', [['--output', 'FILE'], ['--output', 'FILE/run'], ['--output', '.', '--experiment', 'file']])
def test_training_finds_out_before_it_builds_anything(
        argv: list,
        file: Path,
        monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(file.parent)
    monkeypatch.setattr(train_script, 'build_run', fail)
    with pytest.raises(UsageError, match='--output'):
        train_distill.main(['--data-dir', 'data', *[arg.replace('FILE', str(file)) for arg in argv]])
    assert os.listdir(file.parent) == ['file']


def test_validation_finds_out_before_it_evaluates(
        file: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(validate_script, 'evaluate_model', fail)
    for path in (str(file.parent), str(file / 'results.csv'), 'no/such/folder/results.csv'):
        assert validate.main(['--data-dir', 'data', '--results-file', path]) == 2
        assert '--results-file' in capsys.readouterr().err


@pytest.mark.parametrize('flag', ['--output', '--weights', '--onnx'])
def test_export_finds_out_before_it_reads_the_checkpoint(
        flag: str,
        file: Path,
        monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(export, 'load_release', fail)
    with pytest.raises(UsageError, match=flag):
        export.main(['last.pth.tar', flag, str(file / 'below')])


@pytest.mark.parametrize('name', ['a\0b', 'x' * 300, 'x' * 253])
@pytest.mark.parametrize('flag', ['--weights', '--onnx'])
def test_export_names_a_file_that_no_system_takes(
        name: str,
        flag: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(export, 'load_release', fail)
    with pytest.raises(UsageError, match=f'{flag} .* cannot be written') as error:
        export.main(['last.pth.tar', flag, str(tmp_path / name), '--output', str(tmp_path / 'hub')])
    assert '\n' not in str(error.value) and not os.listdir(tmp_path)


def test_export_names_a_checkpoint_that_no_system_takes(tmp_path: Path) -> None:
    for name in ('a\0b', 'x' * 300):
        with pytest.raises(UsageError, match='CHECKPOINT|--output'):
            export.main([str(tmp_path / name / 'last.pth.tar')])
        with pytest.raises(UsageError, match='CHECKPOINT|--output'):
            export.main([name])
    assert not os.listdir(tmp_path)


def test_file_written_at_once_is_the_former_one_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / 'results.csv'
    path.write_text('former')
    with pytest.raises(OSError), written_at_once(str(path)) as name:
        Path(name).write_text('half')
        raise OSError('full')
    assert path.read_text() == 'former' and os.listdir(tmp_path) == ['results.csv']
    with written_at_once(str(path)) as name:
        Path(name).write_text('new')
    assert path.read_text() == 'new' and os.listdir(tmp_path) == ['results.csv']


def test_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / 'target').write_text('former')
    (tmp_path / 'link').symlink_to('target')
    with written_at_once(str(tmp_path / 'link')) as name:
        Path(name).write_text('new')
    assert (tmp_path / 'link').is_symlink() and (tmp_path / 'target').read_text() == 'new'


def test_results_that_find_no_room_are_printed_and_the_former_file_stays(
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture,
) -> None:
    path = tmp_path / 'results.csv'
    path.write_text('former')
    monkeypatch.setattr(validate_script, 'evaluate_model', lambda args: {'model': 'x', 'top1': 7.25})
    monkeypatch.setattr(validate_script, 'describe_results', str)

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(timm_distill.checkpoint.file, 'flush', full)
    assert validate_script.main(['--data-dir', 'data', '--model', 'test_resnet', '--results-file', str(path)]) == 2
    printed = capsys.readouterr()
    assert '7.25' in printed.out and '--results-file' in printed.err and 'No space left' in printed.err
    assert path.read_text() == 'former' and os.listdir(tmp_path) == ['results.csv']
