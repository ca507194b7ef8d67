"""The demonstration: its images, its commands, its report. The training is a stub."""
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, List

import pytest
from PIL import Image

from timm_distill.args import check_train_args, create_train_parser, parse_args
from timm_distill.errors import UsageError
from timm_distill.run import demo
from timm_distill.run.demo import DemoRow, format_report, format_table, run_demo, write_digits


class StubTraining:
    """Stands for the training script's entry point: notes the arguments, returns one result after the other."""

    def __init__(self) -> None:
        self.calls: List[List[str]] = []

    def __call__(self, argv: List[str]) -> Any:
        self.calls.append(argv)
        number = len(self.calls)
        return SimpleNamespace(
            best_metric=90. + number, best_epoch=number, checkpoint=f'out put/{number}/model_best.pth.tar',
            param_count=1000 * number, seconds=10. * number, stopped_by=0)


@pytest.fixture
def small_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, 'write_digits', lambda root: write_digits(root, 2, 1))


def count_images(root: Path, split: str) -> int:
    return len(list((root / split).glob('[0-9]/*.png')))


def test_all_1797_digits_are_written(tmp_path: Path) -> None:
    pytest.importorskip('sklearn')
    root = tmp_path / 'deep' / 'digits'
    write_digits(root)
    assert (count_images(root, 'train'), count_images(root, 'validation')) == (1297, 500)
    assert [path.name for path in root.parent.iterdir()] == ['digits']
    train, validation = ({path.name for path in (root / split).rglob('*.png')} for split in ('train', 'validation'))
    assert not train & validation


def test_images_are_real_digits(digits_dir: Path) -> None:
    image = Image.open(next((digits_dir / 'train' / '0').glob('*.png')))
    assert image.size == (demo.IMAGE_SIZE, demo.IMAGE_SIZE)
    shades = set(image.convert('L').tobytes())
    assert min(shades) == 0 and max(shades) > 200


def test_second_write_changes_nothing(tmp_path: Path) -> None:
    pytest.importorskip('sklearn')
    root = tmp_path / 'digits'
    write_digits(root, 2, 1)
    before = {path: path.stat().st_mtime_ns for path in root.rglob('*')}
    write_digits(root, 2, 1)
    assert {path: path.stat().st_mtime_ns for path in root.rglob('*')} == before


def test_two_writes_are_bit_identical(tmp_path: Path) -> None:
    pytest.importorskip('sklearn')
    contents = []
    for name in ('a', 'b'):
        write_digits(tmp_path / name, 2, 1)
        contents.append({p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name).rglob('*.png')})
    assert contents[0] == contents[1]


def test_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip('sklearn')

    def full_disk(self: Image.Image, path: Path) -> None:
        raise OSError('No space left on device')

    monkeypatch.setattr(Image.Image, 'save', full_disk)
    with pytest.raises(OSError, match='No space left'):
        write_digits(tmp_path / 'digits', 2, 1)
    assert not list(tmp_path.iterdir())


def test_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    pytest.importorskip('sklearn')
    (tmp_path / 'mine.txt').write_text('keep')
    with pytest.raises(UsageError, match='--demo-dir'):
        write_digits(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ['mine.txt']


def test_missing_scikit_learn_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)
    with pytest.raises(UsageError, match=r'pip install "timm_distill\[demo\]"'):
        write_digits(tmp_path / 'digits')


@pytest.mark.usefixtures('small_digits')
def test_demo_trains_teacher_then_student_alone_then_with_norm(tmp_path: Path) -> None:
    train = StubTraining()
    rows = run_demo(train, tmp_path)
    teacher, alone, norm = train.calls
    assert [row.title for row in rows] == ['teacher', 'student alone', 'student with NORM']
    assert [argv[argv.index('--kd') + 1] for argv in train.calls] == ['none', 'none', 'norm']
    assert norm[norm.index('--teacher-checkpoint') + 1] == rows[0].checkpoint
    assert norm[norm.index('--teacher') + 1] == teacher[teacher.index('--model') + 1]


@pytest.mark.usefixtures('small_digits')
def test_both_students_train_the_same_way(tmp_path: Path) -> None:
    train = StubTraining()
    run_demo(train, tmp_path)
    alone, norm = (list(argv) for argv in train.calls[1:])
    for flag in ('--experiment', '--kd'):
        for argv in (alone, norm):
            del argv[argv.index(flag):argv.index(flag) + 2]
    for flag in ('--teacher', '--teacher-checkpoint'):
        del norm[norm.index(flag):norm.index(flag) + 2]
    assert alone == norm


@pytest.mark.usefixtures('small_digits')
def test_printed_commands_are_the_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = StubTraining()
    run_demo(train, tmp_path / 'a folder')
    commands = [line[2:] for line in capsys.readouterr().out.splitlines() if line.startswith('$ ')]
    runs = [shlex.split(command) for command in commands]
    assert [run[0] for run in runs] == ['OMP_NUM_THREADS=1'] * 3
    assert [run[1:] for run in runs] == [['train_distill.py', *argv] for argv in train.calls]


@pytest.mark.usefixtures('small_digits')
def test_training_script_takes_every_flag(tmp_path: Path) -> None:
    train = StubTraining()
    run_demo(train, tmp_path)
    for argv in train.calls:
        args = parse_args(create_train_parser(), argv)
        check_train_args(args)
        assert args.data_dir == str(tmp_path / 'digits')


def test_table_columns_are_aligned() -> None:
    rows = [DemoRow('teacher', 'test_resnet', 98.76, 373658, 12.3, 'a'), DemoRow('b', 'c', 9., 7, 100., 'd')]
    assert format_table(rows).splitlines() == [
        '         model        top-1 (%)  parameters  seconds',
        'teacher  test_resnet       98.8     373,658       12',
        'b        c                  9.0           7      100',
    ]


@pytest.mark.usefixtures('small_digits')
def test_report_ends_with_the_lines_that_load_the_checkpoint(
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
) -> None:
    rows = run_demo(StubTraining(), tmp_path)
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith(format_report(rows).rstrip())
    code = [line.strip() for line in printed.splitlines()[-4:] if line.startswith('    ')]
    assert code == [
        'import timm',
        f'model = timm.create_model({demo.STUDENT!r}, num_classes=10, checkpoint_path={rows[-1].checkpoint!r})',
    ]
