"""The CIFAR-100 tables: every command of `recipes/cifar100/run.py`, its figures, and what a pair of commands trains."""
import importlib.util
import itertools
import logging
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any, Dict, List

import pytest
import timm
import torch
from kill_runs import ScriptProcess
from timm.optim import create_optimizer_v2, optimizer_kwargs

from timm_distill.args import check_train_args, create_train_parser, parse_args
from timm_distill.factory import create_distill_task
from timm_distill.methods._composition import Recipe, create_composition

REPO_DIR = Path(__file__).resolve().parent.parent
FOLDER = REPO_DIR / 'recipes' / 'cifar100'


def load_run() -> ModuleType:
    spec = importlib.util.spec_from_file_location('cifar100_run', FOLDER / 'run.py')
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


run = load_run()
METHODS, PAIRS = list(run.TABLE['methods']), list(run.TABLE['pairs'])
DISTILLED = [method for method in METHODS if method not in ('teacher', 'alone')]


def parse(command: List[str], *more: str) -> Namespace:
    assert Path(command[1]) == REPO_DIR / 'train_distill.py'
    return parse_args(create_train_parser(), [*command[2:], '--data-dir', 'DIR', *more])


def last_args(method: str, pair: str) -> Namespace:
    return parse(run.commands(method, pair, 'output')[-1])


@pytest.mark.parametrize('method, pair', list(itertools.product(METHODS, PAIRS)))
def test_every_command_is_read_by_the_scripts_own_parser(
        method: str, pair: str, caplog: pytest.LogCaptureFixture) -> None:
    teacher, student = run.networks(pair)
    for command in run.commands(method, pair, 'output'):
        args = parse(command)
        with caplog.at_level(logging.WARNING):
            check_train_args(args)
        assert not caplog.records
        assert args.model in (teacher, student) and timm.is_model(args.model)
        assert (args.train_crop_mode, args.num_classes, args.epochs) == ('pad', 100, 240)
        assert (args.weight_decay, args.momentum, args.smoothing) == (5e-4, 0.9, 0)
        assert (args.sched, args.decay_milestones, args.decay_rate) == ('multistep', [150, 180, 210], 0.1)
        assert (args.teacher is None) == (args.kd == 'none')
        composition = create_composition(Recipe(
            args.kd, args.kd_weight, args.kd_kwargs, args.kd_schedule, num_epochs=args.epochs,
            task_loss_weight=args.task_loss_weight, distill_loss_weight=args.distill_loss_weight))
        assert composition.weights == {name: float(weight) for name, weight in args.kd_weight.items()}
    if method in DISTILLED:
        assert (args.teacher, args.model) == (teacher, student)


def test_pairs_are_those_of_the_published_tables() -> None:
    same = {
        'wrn_40_2-wrn_16_2', 'wrn_40_2-wrn_40_1', 'resnet56-resnet20', 'resnet110-resnet20', 'resnet110-resnet32',
        'resnet32x4-resnet8x4', 'vgg13-vgg8'}
    different = {
        'vgg13-mobilenetv2', 'resnet50-mobilenetv2', 'resnet50-vgg8', 'resnet32x4-shufflenetv1',
        'resnet32x4-shufflenetv2', 'wrn_40_2-shufflenetv1'}
    assert set(PAIRS) == same | different


@pytest.mark.parametrize('pair', PAIRS)
def test_figures_of_a_pair_are_percentages_of_methods_that_there_are(pair: str) -> None:
    published = run.TABLE['pairs'][pair]['published']
    assert {'teacher', 'alone', 'norm', 'norm+kd', 'norm+crd'} <= set(published) <= set(METHODS)
    assert all(isinstance(figure, float) and 60 < figure < 80 for figure in published.values())
    teachers = {name.split('-')[0]: content['published']['teacher'] for name, content in run.TABLE['pairs'].items()}
    assert published['teacher'] == teachers[pair.split('-')[0]]  # one teacher, one figure


def test_every_key_of_the_table_is_read() -> None:
    keys: Dict[str, Any] = {'methods': {'about', 'differs', 'flags'}, 'pairs': {'published', 'flags'}}
    assert set(run.TABLE) == {'methods', 'networks', 'pairs'}
    for section, known in keys.items():
        assert all(set(content) <= known for content in run.TABLE[section].values())
    trained = {network for pair in PAIRS for network in run.networks(pair)}
    assert set(run.TABLE['networks']) <= trained
    for flags in [*run.TABLE['networks'].values(), *(c.get('flags', {}) for c in run.TABLE['pairs'].values())]:
        assert set(flags) <= {*METHODS, '*'}


@pytest.mark.parametrize('method, pair, lr, batch_size', [
    ('norm', 'resnet56-resnet20', 0.05, 64), ('norm', 'vgg13-mobilenetv2', 0.01, 64),
    ('norm+crd', 'resnet32x4-shufflenetv1', 0.01, 64), ('alone', 'resnet32x4-shufflenetv2', 0.01, 64),
    ('teacher', 'resnet50-mobilenetv2', 0.05, 64), ('kd++', 'resnet56-resnet20', 0.1, 128),
    ('kd++', 'wrn_40_2-shufflenetv1', 0.02, 128)])
def test_learning_rate_follows_method_and_student(method: str, pair: str, lr: float, batch_size: int) -> None:
    args = last_args(method, pair)
    assert (args.lr, args.batch_size) == (lr, batch_size)


@pytest.mark.parametrize('pair, weights', [
    ('resnet32x4-resnet8x4', {'kd': 3.5, 'nd': 2}), ('resnet32x4-shufflenetv2', {'kd': 4, 'nd': 0.5}),
    ('resnet110-resnet32', {'kd': 1, 'nd': 2})])
def test_kdpp_has_the_weights_of_its_pair_and_the_published_warmup(pair: str, weights: Dict[str, float]) -> None:
    args = last_args('kd++', pair)
    assert args.kd_weight == weights
    composition = create_composition(Recipe(
        args.kd, args.kd_weight, args.kd_kwargs, args.kd_schedule, num_epochs=args.epochs))
    assert [composition.schedules['kd'](epoch) for epoch in (0, 7, 20, 200)] == pytest.approx([0, 0.35, 1, 1])


def test_all_weights_decay_as_in_the_official_code() -> None:
    args = last_args('norm', 'resnet56-resnet20')
    model = timm.create_model('cifar_resnet20')
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    (group,) = optimizer.param_groups
    assert len(group['params']) == len(list(model.parameters())) and group['weight_decay'] == 5e-4
    assert not group['nesterov'] and create_optimizer_v2(
        model, **optimizer_kwargs(cfg=last_args('kd++', 'resnet56-resnet20'))).param_groups[0]['nesterov']


@pytest.mark.parametrize('method, pair', [
    *((method, 'resnet56-resnet20') for method in DISTILLED), ('norm', 'vgg13-mobilenetv2'),
    ('norm+kd', 'resnet32x4-shufflenetv1'), ('srrl', 'wrn_40_2-shufflenetv1'), ('kd++', 'wrn_40_2-wrn_40_1')])
def test_task_of_a_command_trains_the_student(method: str, pair: str) -> None:
    args = last_args(method, pair)
    task = create_distill_task(
        args.model, args.teacher, kd=args.kd, kd_weight=args.kd_weight, kd_kwargs=args.kd_kwargs,
        kd_schedule=args.kd_schedule, task_loss_weight=args.task_loss_weight, num_classes=100, num_epochs=args.epochs,
        input_size=args.input_size, teacher_pretrained=False, teacher_kwargs={'num_classes': 100}, num_samples=200,
        sample_labels=torch.arange(200) % 100, verbose=False,
        class_means=torch.randn(100, timm.create_model(args.teacher).num_features) if 'nd' in args.kd_weight else None)
    task.train()
    target = torch.arange(8)
    if 'crd' in args.kd_weight:
        target = torch.stack([target, target], dim=1)
    output = task(torch.randn(8, 3, 32, 32), target)
    output['loss'].backward()
    assert output['loss'].isfinite()
    assert all(f'{name}' in ' '.join(output) for name in ('task', *args.kd_weight))
    gradients = [p.grad for p in task.trainable_module.parameters() if p.requires_grad]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def test_all_pairs_train_each_teacher_once() -> None:
    names = [command[command.index('--experiment') + 1] for command in run.all_commands('norm', PAIRS, 'output')]
    assert len(names) == len(set(names)) == 13 + 6
    for position, name in enumerate(names):
        if name.startswith('norm-'):
            assert f'teacher-{name.split("-")[1]}' in names[:position]


def test_given_teacher_is_not_trained() -> None:
    (command,) = run.commands('norm', PAIRS[0], 'output', 'weights.safetensors')
    assert parse(command).teacher_checkpoint == 'weights.safetensors'


@pytest.mark.parametrize('argv', [
    ['nrom'], ['norm', 'resnet56'], ['norm', '--teacher-checkpoint', 'x'],
    ['alone', PAIRS[0], '--teacher-checkpoint', 'x'], ['norm', '--experiment', 'x'], ['norm', '--resume=x'],
    ['norm', '--student', 'resnet18']])
def test_wrong_arguments_are_refused(argv: List[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        run.parse(argv)
    assert error.value.code == 2 and 'error:' in capsys.readouterr().err


def test_list_prints_commands_with_their_flags_and_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(['norm', 'resnet56-resnet20', '--data-dir', 'a b', '--list']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == '# resnet56-resnet20, published top-1: 71.35'
    assert len(lines) == 3 and all(line.endswith("--data-dir 'a b'") for line in lines[1:])


def test_failing_run_ends_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: List[List[str]] = []

    def fail(command: List[str]) -> 'subprocess.CompletedProcess[bytes]':
        calls.append(command)
        return subprocess.CompletedProcess(command, 75)

    monkeypatch.setattr(run.subprocess, 'run', fail)
    assert run.main(['norm', '--data-dir', 'DIR']) == 75
    assert len(calls) == 1


def test_figures_of_the_document_are_those_of_the_table() -> None:
    lines = (REPO_DIR / 'docs' / 'recipes.md').read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines if line.startswith('|')]
    assert [row[0] for row in rows[2:]] == PAIRS
    for row in rows[2:]:
        figures = {method: float(cell) for method, cell in zip(rows[0][1:], row[1:]) if cell}
        assert figures == run.TABLE['pairs'][row[0]]['published']


def test_one_command_trains_teacher_and_student_and_goes_on(
        few_digits_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, log = tmp_path / 'output', tmp_path / 'log'
    flags = [
        'norm', 'resnet56-resnet20', '--output', str(output), '--data-dir', str(few_digits_dir), '--dataset', '',
        '--num-classes', '10', '--epochs', '1', '-b', '20', '--train-batches-per-epoch', '2', '-j', '0', '--device',
        'cpu', '--no-report']

    def start(command: List[str]) -> 'subprocess.CompletedProcess[bytes]':
        with open(log, 'a') as file:
            return subprocess.CompletedProcess(command, ScriptProcess(command, file).wait())

    monkeypatch.setattr(run, 'subprocess', Namespace(run=start))
    assert run.main(flags) == 0, log.read_text()[-2000:]
    assert {path.name for path in output.iterdir()} == {'teacher-resnet56', 'norm-resnet56-resnet20'}
    written = (output / 'teacher-resnet56' / 'last.pth.tar').stat().st_mtime_ns
    assert run.main(flags) == 0
    assert (output / 'teacher-resnet56' / 'last.pth.tar').stat().st_mtime_ns == written


def test_script_prints_the_commands_that_it_would_run() -> None:
    out = subprocess.run(
        [sys.executable, str(FOLDER / 'run.py'), 'norm', 'vgg13-vgg8', '--list', '--data-dir', 'DIR'],
        capture_output=True, text=True, check=True)
    assert len(out.stdout.splitlines()) == 3
