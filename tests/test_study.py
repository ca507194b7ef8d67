"""The study: plans are checked before anything runs, runs resume and are not repeated, differences are paired."""
import csv
import os
import re
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List

import pytest
import yaml
from kill_runs import ScriptProcess, start_program

BENCHMARKS = Path(__file__).resolve().parent.parent / 'benchmarks'
sys.path.append(str(BENCHMARKS))

import study_data  # noqa: E402
import study_plan  # noqa: E402
import study_rows  # noqa: E402
import study_table  # noqa: E402

from timm_distill import UsageError  # noqa: E402

TINY: Dict[str, Any] = {
    'about': 'Digits.',
    'data': {'dir': 'digits', 'classes': 10, 'train': 300, 'validation': 100},
    'seeds': [0, 1],
    'students': ['test_efficientnet'],
    'baselines': ['alone'],
    'flags': {
        'img-size': 32, 'epochs': 1, 'batch-size': 32, 'opt': 'adamw', 'lr': 2e-3, 'warmup-epochs': 0, 'workers': 0,
        'device': 'cpu'},
    'teachers': {'small': {'model': 'test_resnet', 'flags': {'seed': 0}}},
    'settings': {'alone': {}, 'norm': {'teacher': 'small', 'flags': {'kd': 'norm'}, 'seeds': [0]}},
}


def write_plan(folder: Path, **changes: Any) -> Path:
    path = folder / 'tiny.yaml'
    path.write_text(yaml.safe_dump({**TINY, **changes}, sort_keys=False))
    return path


def results_of(plan: Path) -> Path:
    """Return the committed rows of a plan of the repository."""
    return BENCHMARKS / 'results' / f'{plan.stem}.csv'


def study_flags(plan: Path, digits_dir: Path) -> List[str]:
    folder = plan.parent
    return [
        str(plan), '--data-root', str(digits_dir.parent), '--output', str(folder / 'out'),
        '--results', str(folder / 'rows.csv'), '--docs', str(folder)]


def test_plan_becomes_runs_of_every_setting_student_and_seed(tmp_path: Path) -> None:
    plan = study_plan.read_plan(str(write_plan(tmp_path)))
    assert [run.name for run in plan.runs()] == [
        'test_efficientnet-alone-0', 'test_efficientnet-norm-0', 'test_efficientnet-alone-1']
    command = plan.runs()[1].command('out')
    assert command[command.index('--teacher') + 1] == 'test_resnet'
    assert command[command.index('--seed') + 1] == '0'


def test_setting_that_starts_from_another_takes_its_student_of_the_same_seed(tmp_path: Path) -> None:
    settings = {
        **TINY['settings'],
        'fine': {'start': 'norm', 'labels': 0.1, 'flags': {'lr': 1e-3}},
        'finer': {'start': 'fine'},
    }
    plan = study_plan.read_plan(str(write_plan(tmp_path, settings=settings)))
    assert [run.name for run in plan.runs() if run.start] == ['test_efficientnet-fine-0', 'test_efficientnet-finer-0']
    command = plan.run('test_efficientnet', 'fine', 0).command('out')
    assert command[command.index('--pretrained-path') + 1] == 'out/test_efficientnet-norm-0/hub/model.safetensors'
    assert command[command.index('--data-dir') + 1] == 'out/labels-0.1-0' and '--pretrained' in command
    assert [plan.depth(name) for name in settings] == [0, 0, 1, 2]


def test_part_of_the_labels_is_drawn_class_by_class_and_the_same_every_time(digits_dir: Path, tmp_path: Path) -> None:
    for name, seed in (('a', 0), ('b', 0), ('c', 1)):
        study_data.link_part(str(digits_dir), 0.1, seed, str(tmp_path / name))
    drawn = {
        name: sorted(path.relative_to(tmp_path / name) for path in (tmp_path / name / 'train').rglob('*.png'))
        for name in 'abc'}
    assert drawn['a'] == drawn['b'] != drawn['c']
    for folder in (digits_dir / 'train').iterdir():
        count = sum(path.parent.name == folder.name for path in drawn['a'])
        assert count == max(1, round(0.1 * len(list(folder.iterdir()))))
    assert len(list((tmp_path / 'a' / 'validation').iterdir())) == 10


def test_students_and_teachers_bring_flags_of_their_own(tmp_path: Path) -> None:
    students = {'narrow': {'model': 'test_resnet', 'flags': {'model-kwargs': 'stem_width=8'}}, 'test_vit': {}}
    teachers = {'small': {**TINY['teachers']['small'], 'run_flags': {'no-teacher-eval': True}}}
    plan = study_plan.read_plan(str(write_plan(tmp_path, students=students, teachers=teachers)))
    commands = {run.name: run.command('out') for run in plan.runs()}
    assert list(commands)[:4] == ['narrow-alone-0', 'narrow-norm-0', 'test_vit-alone-0', 'test_vit-norm-0']
    command = commands['narrow-norm-0']
    assert command[command.index('--student') + 1] == 'test_resnet' and 'stem_width=8' in command
    assert '--no-teacher-eval' in command and '--no-teacher-eval' not in commands['narrow-alone-0']
    assert 'stem_width=8' not in commands['test_vit-norm-0']


CACHED: Dict[str, Any] = {
    'students': ['test_efficientnet', 'test_vit'],
    'caches': {'views': {'about': 'Two views.', 'flags': {'cache-views': 2}}},
    'settings': {
        'alone': {}, 'live': {'teacher': 'small', 'flags': {'kd': 'kd'}},
        'kd': {'teacher': 'small', 'cache': 'views', 'flags': {'kd': 'kd'}},
        'norm': {'teacher': 'small', 'cache': 'views', 'flags': {'kd': 'norm', 'lr': 1e-3}}}}


def test_settings_students_and_seeds_share_the_cache_that_the_plan_names(tmp_path: Path) -> None:
    plan = study_plan.read_plan(str(write_plan(tmp_path, **CACHED)), output='out')
    folders = {}
    for run in plan.runs():
        command = run.command('out/tiny')
        folders[run.setting] = '--teacher-cache' in command and command[command.index('--teacher-cache') + 1]
        if folders[run.setting]:
            assert command[command.index('--cache-views') + 1] == '2' and '--teacher-checkpoint' in command
        assert '--teacher-cache' not in run.command('out/tiny', pretend_teacher=True, cached=False)
    folder = os.path.join('out', 'tiny', 'cache-views')
    assert folders == {'alone': False, 'live': False, 'kd': folder, 'norm': folder}


def test_row_of_a_live_run_is_not_taken_for_that_of_a_cached_one(tmp_path: Path) -> None:
    plan = study_plan.read_plan(str(write_plan(tmp_path, **CACHED)), output='out')
    runs = {(run.setting, run.student, run.seed): run for run in plan.runs()}
    live, cached = (runs[setting, 'test_vit', 0] for setting in ('live', 'kd'))
    results = study_rows.Results(str(tmp_path / 'rows.csv'))
    row = dict.fromkeys(study_rows.COLUMNS, '0') | {'student': 'test_vit', 'setting': 'kd', 'seed': 0}
    results.add({**row, 'command': cached.spelled('out/tiny')})
    moved = study_plan.read_plan(str(tmp_path / 'tiny.yaml'), output='elsewhere')
    results.check(moved.runs(), 'elsewhere/tiny')
    results.rows[0]['command'] = live.spelled('out/tiny')
    with pytest.raises(UsageError, match='--cache-views --teacher-cache'):
        results.check(moved.runs(), 'elsewhere/tiny')


@pytest.mark.parametrize('changes, message', [
    ({'cache': 'other'}, "unknown cache 'other'; there are: views"),
    ({'cache': 'views'}, "has the cache 'views' and no teacher"),
    ({'cache': 'views', 'teacher': 'small', 'labels': 0.5}, 'every seed has other images'),
    ({'cache': 'views', 'teacher': 'big', 'flags': {'kd': 'kd'}}, r'shared with kd with test_efficientnet.* teacher'),
    ({'cache': 'views', 'teacher': 'small', 'flags': {'kd': 'kd', 'hflip': 0}}, r'another hflip \(0.5, here 0.0\)'),
    ({'cache': 'views', 'teacher': 'small', 'flags': {'kd': 'kd', 'img-size': 64}}, r'img-size \(32, here 64\)'),
])
def test_settings_that_cannot_share_a_cache_are_refused_with_the_difference(
        tmp_path: Path,
        changes: Dict[str, Any],
        message: str,
) -> None:
    teachers = {**TINY['teachers'], 'big': {'model': 'test_vit', 'flags': {}}}
    settings = {**CACHED['settings'], 'new': changes}
    path = str(write_plan(tmp_path, **{**CACHED, 'settings': settings, 'teachers': teachers}))
    with pytest.raises(UsageError, match=message):
        study_plan.read_plan(path)


def test_a_cache_that_no_setting_names_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match='no setting names the cache idle'):
        study_plan.read_plan(str(write_plan(tmp_path, caches={'idle': {}})))


@pytest.mark.parametrize('changes, message', [
    ({'seeds': [0, 0]}, 'stands twice'),
    ({'seeds': ['a']}, 'list of numbers'),
    ({'students': ['no_such_model']}, "unknown student 'no_such_model'"),
    ({'students': {'narrow': {'model': 'no_such_model'}}}, "unknown student 'no_such_model'"),
    ({'students': {'narrow': {'modle': 'test_resnet'}}}, "unknown key 'modle' of a student"),
    ({'students': ['test_vit', 'test_vit']}, 'a student is named twice'),
    ({'sedes': [0]}, "unknown key 'sedes'"),
    ({'settings': {'x': {'flags': {'kd': 'nrom'}, 'teacher': 'small'}}, 'baselines': ['x']}, "did you mean 'norm'"),
    ({'settings': {'alone': {}, 'x': {'teacher': 'big'}}}, "unknown teacher 'big'"),
    ({'settings': {'alone': {'flags': {'no-such-flag': 1}}}}, 'no-such-flag'),
    ({'settings': {'alone': {'flags': {'lr': 'much'}}}}, 'invalid'),
    ({'baselines': ['kd']}, "baseline 'kd' is no setting"),
    ({'teachers': {'small': {'model': 'no_such_model', 'flags': {}}}}, 'unknown model'),
    ({'teachers': {'small': {'model': 'test_resnet'}}}, 'either a checkpoint or the flags'),
    ({'flags': {'epochs': 1}}, 'flags need batch-size'),
    ({'settings': {'x': {'start': 'alone'}, 'alone': {}}}, "starts from 'alone', which must be a setting above it"),
    ({'settings': {'alone': {}, 'x': {'labels': 0}}}, 'labels: 0: a share above 0'),
])
def test_bad_plan_gets_one_message(tmp_path: Path, changes: Dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        study_plan.read_plan(str(write_plan(tmp_path, **changes)))


@pytest.mark.parametrize('data, message', [
    ({'dir': 'nowhere', 'classes': 10, 'train': 300, 'validation': 100}, 'not in'),
    ({'dir': 'digits', 'classes': 9, 'train': 300, 'validation': 100}, 'has 10 class folders, the plan says 9'),
    ({'dir': 'digits', 'classes': 10, 'train': 301, 'validation': 100}, 'has 300 files, the plan says 301'),
])
def test_other_data_than_the_plans_is_refused(
        tmp_path: Path, digits_dir: Path, data: Dict[str, Any], message: str) -> None:
    plan = study_plan.read_plan(str(write_plan(tmp_path, data=data)), str(digits_dir.parent))
    with pytest.raises(UsageError, match=message):
        study_data.check_data(plan)


def test_missing_weights_are_named_before_anything_runs(tmp_path: Path, digits_dir: Path) -> None:
    teachers = {'small': {'model': 'test_resnet', 'checkpoint': 'weights.safetensors'}}
    plan = study_plan.read_plan(str(write_plan(tmp_path, teachers=teachers)), str(digits_dir.parent))
    with pytest.raises(UsageError, match='weights.safetensors'):
        study_data.check_data(plan)


def test_row_of_other_flags_than_the_plans_is_refused(tmp_path: Path) -> None:
    plan = study_plan.read_plan(str(write_plan(tmp_path)))
    results = study_rows.Results(str(tmp_path / 'rows.csv'))
    run = plan.runs()[0]
    results.add(dict.fromkeys(study_rows.COLUMNS, '0') | {
        'student': run.student, 'setting': run.setting, 'seed': run.seed, 'command': run.spelled('elsewhere')})
    study_rows.Results(results.path).check(plan.runs(), 'out')
    changed = study_plan.read_plan(str(write_plan(tmp_path, flags={**TINY['flags'], 'lr': 1e-3})))
    with pytest.raises(UsageError, match='other flags than the plan .*0.001'):
        study_rows.Results(results.path).check(changed.runs(), 'out')
    settings = {**TINY['settings'], run.setting: {'labels': 0.1}}
    fewer = study_plan.read_plan(str(write_plan(tmp_path, settings=settings)))
    with pytest.raises(UsageError, match=r'other flags than the plan .*labels-0\.1'):
        study_rows.Results(results.path).check(fewer.runs(), 'out')


def test_rows_of_before_there_were_probes_are_read(tmp_path: Path) -> None:
    old = [column for column in study_rows.COLUMNS if column not in ('knn', 'linear_probe')]
    (tmp_path / 'rows.csv').write_text(f'{",".join(old)}\n{",".join(["1"] * len(old))}\n')
    (row,) = study_rows.Results(str(tmp_path / 'rows.csv')).rows
    assert set(row) == set(study_rows.COLUMNS) and row['knn'] == ''
    (tmp_path / 'rows.csv').write_text(f'{",".join(old[1:])}\n{",".join(["1"] * len(old[1:]))}\n')
    with pytest.raises(UsageError, match='other columns'):
        study_rows.Results(str(tmp_path / 'rows.csv'))


def test_tiny_imagenet_becomes_class_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tiny_imagenet
    source, output = tmp_path / 'tiny-imagenet-200', tmp_path / 'out'
    for name in ('n01', 'n02'):
        (source / 'train' / name / 'images').mkdir(parents=True)
        (source / 'train' / name / f'{name}_boxes.txt').touch()
        (source / 'train' / name / 'images' / f'{name}_0.JPEG').write_bytes(name.encode())
    (source / 'val' / 'images').mkdir(parents=True)
    (source / 'val' / 'images' / 'val_0.JPEG').touch()
    (source / 'val' / 'val_annotations.txt').write_text('val_0.JPEG\tn02\t0\t0\t9\t9\n')
    assert tiny_imagenet.main([str(source), '--output', str(output)]) == 2 and not output.exists()  # 200 are published
    for name, value in {'NUM_CLASSES': 2, 'TRAIN_IMAGES': 2, 'VALIDATION_IMAGES': 1}.items():
        monkeypatch.setattr(tiny_imagenet, name, value)
    for _ in range(2):  # a second time over the first
        assert tiny_imagenet.main([str(source), '--output', str(output)]) == 0
    files = sorted(str(path.relative_to(output)) for path in output.rglob('*.*'))
    assert files == ['train/n01/n01_0.JPEG', 'train/n02/n02_0.JPEG', 'validation/n02/val_0.JPEG']


def test_difference_is_paired_by_seed_with_its_interval() -> None:
    values, baseline = {'0': 61., '1': 64., '2': 60., '9': 99.}, {'0': 60., '1': 61., '2': 58.}
    mean, half = study_table.paired_difference(values, baseline)
    assert mean == pytest.approx(2.)
    assert half == pytest.approx(4.302653 * statistics.stdev([1, 3, 2]) / 3 ** 0.5, rel=1e-6)
    assert study_table.paired_difference(values, {}) is None


def test_every_plan_of_the_repository_is_valid() -> None:
    plans = sorted((BENCHMARKS / 'plans').glob('*.yaml'))
    assert plans
    for path in plans:
        plan = study_plan.read_plan(str(path))
        results = study_rows.Results(str(BENCHMARKS / 'results' / f'{plan.name}.csv'))
        results.check(plan.runs(), os.path.join('output', 'study', plan.name))


def test_studies_that_run_at_the_same_time_keep_each_others_rows(tmp_path: Path) -> None:
    path = str(tmp_path / 'new' / 'rows.csv')
    studies = [study_rows.Results(path) for _ in range(4)]

    def write(number: int) -> None:
        for seed in range(5):
            studies[number].add({**dict.fromkeys(study_rows.COLUMNS, ''), 'setting': f'x{number}', 'seed': seed})
            studies[number].add_cost('student', f'x{number}', 1., 1.)
            studies[number].add_teacher(f'x{number}', 'resnet50', 90., 0.1, '')
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    read = study_rows.Results(path)
    assert len({(row['setting'], row['seed']) for row in read.rows}) == len(read.rows) == 20
    assert len(read.costs) == len(read.teachers) == 4


def test_page_of_results_is_what_the_rows_say() -> None:
    page = (BENCHMARKS.parent / 'docs' / 'results.md').read_text(encoding='utf-8')
    plans = [path for path in (BENCHMARKS / 'plans').glob('*.yaml') if results_of(path).is_file()]
    assert plans
    for path in plans:
        section = study_table.describe(study_plan.read_plan(str(path)), study_rows.Results(str(results_of(path))))
        assert section in page, f'study.py {path.name} --table writes another page'


def test_rows_that_the_advice_on_methods_names_have_been_run() -> None:
    text = (BENCHMARKS.parent / 'docs' / 'choosing.md').read_text(encoding='utf-8')
    named = {name for names in re.findall(r'rows? (\*[^)]*?)[),]', text) for name in re.findall(r'\*([^*]+)\*', names)}
    rows = study_rows.Results(str(results_of(BENCHMARKS / 'plans' / 'imagenette.yaml'))).rows
    assert named and named <= {row['setting'] for row in rows}


@pytest.mark.slow
def test_study_runs_what_is_missing_and_writes_its_table(
        tmp_path: Path,
        digits_dir: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture,
) -> None:
    import study
    monkeypatch.setattr(study, 'subprocess', SimpleNamespace(Popen=ScriptProcess, STDOUT=None))
    monkeypatch.setattr(study.signal, 'signal', lambda *_: None)
    settings = {
        **TINY['settings'],
        'unlabelled': {
            'teacher': 'small', 'flags': {'kd': 'feature', 'no-labels': True, 'num-classes': 0}, 'seeds': [0]},
        'tuned': {'start': 'unlabelled', 'labels': 0.5},
    }
    flags = study_flags(write_plan(tmp_path, settings=settings), digits_dir)
    assert study.main([*flags, '--only', 'alone']) == 0
    capsys.readouterr()
    assert study.main(flags) == 0
    assert '2 of 5 runs are done' in capsys.readouterr().out
    with open(tmp_path / 'rows.csv', newline='') as f:
        rows = {(row['setting'], row['seed']): row for row in csv.DictReader(f)}
    assert set(rows) == {('alone', '0'), ('alone', '1'), ('norm', '0'), ('unlabelled', '0'), ('tuned', '0')}
    unlabelled = rows.pop(('unlabelled', '0'))
    assert unlabelled['top1'] == '' and min(float(unlabelled[x]) for x in ('knn', 'linear_probe')) > 15
    assert all(float(row['top1']) == pytest.approx(float(row['curve'].split()[-1])) for row in rows.values())
    plan = write_plan(tmp_path, seeds=[0, 1, 2], settings=settings)
    flags = [*study_flags(plan, digits_dir), '--table']
    table = start_program([BENCHMARKS / 'study.py', *flags], tmp_path / 'log', tmp_path / 'log')
    table.join()
    assert table.exitcode == 0, (tmp_path / 'log').read_text()
    text = (tmp_path / 'results.md').read_text()
    assert '5 of the 6 runs of this plan have been made' in text
    assert '| alone | 2 of 3 |' in text and (tmp_path / 'results-tiny.png').exists()
    assert 'Teacher small (test_resnet, 10 classes): top-1' in text


def test_teacher_that_was_stopped_is_not_taken_for_a_trained_one(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import study
    monkeypatch.setattr(study.signal, 'signal', lambda *_: None)
    plan = study_plan.read_plan(str(write_plan(tmp_path)), output=str(tmp_path / 'out'))
    checkpoint = Path(plan.teachers['small'].checkpoint)
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    runs = study.Study(plan, str(checkpoint.parent.parent), study_rows.Results(str(tmp_path / 'rows.csv')), 1)
    commands: List[str] = []
    monkeypatch.setattr(runs, '_start', lambda name, command: commands.append(name))
    runs.run()
    assert commands == ['teacher-small', 'test_efficientnet-alone-0', 'test_efficientnet-alone-1']
