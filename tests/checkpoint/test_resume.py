"""A run that is killed and resumed is the run that was never stopped, bit by bit."""
import argparse
import csv
import os
import random
import signal
from pathlib import Path
from typing import Any, Dict, List

import pytest
import torch
from kill_runs import MOMENTS, Launch, warm_up

from timm_distill.checkpoint.file import read_checkpoint
from timm_distill.run.demo import write_digits

pytestmark = pytest.mark.skipif(os.name != 'posix', reason='kills processes with signals')
EPOCHS = 3


@pytest.fixture(scope='module')
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip('sklearn')
    root = tmp_path_factory.mktemp('images') / 'digits'
    write_digits(root, train_per_class=8, validation_per_class=2)
    warm_up()
    return root


def flags(images: Path, output: Path, *more: Any) -> List[str]:
    """Everything that has a state: adapter, EMA, dropped paths, mixup, random erasing, update schedule."""
    return [str(flag) for flag in (
        '--data-dir', images, '--output', output, '--num-classes', 10, '--img-size', 32, '-b', 10, '--device', 'cpu',
        '--student', 'test_efficientnet', '--teacher', 'test_resnet', '--no-teacher-pretrained', '--no-teacher-eval',
        '--kd', 'norm', '--kd-kwargs', 'norm.segments=2', '--opt', 'adamw', '--lr', '2e-3', '--warmup-epochs', 1,
        '--sched-on-updates', '--epochs', EPOCHS, '--model-ema', '--model-ema-decay', '0.8', '--mixup', '0.2',
        '--reprob', '0.3', '--drop', '0.2', '--drop-path', '0.1', '--recovery-interval', 2, '--grad-accum-steps', 2,
        '--clip-grad', 1, '--log-interval', 2, '--checkpoint-hist', 2, '--no-report', *more)]


def assert_same(ours: Any, theirs: Any, where: str = '') -> None:
    """Compare all that two checkpoints hold, tensors bit by bit."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(ours, dict):
        assert list(ours) == list(theirs), where
        for key in ours.keys() - ({'id', 'save'} if where.endswith('.run') else set()):  # these tell runs apart
            assert_same(ours[key], theirs[key], f'{where}.{key}')
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs), where
        for i, pair in enumerate(zip(ours, theirs)):
            assert_same(*pair, f'{where}[{i}]')
    elif not isinstance(ours, argparse.Namespace):  # the flags differ: --resume, --experiment
        assert ours == theirs, where


def read(folder: Path) -> Dict[str, Any]:
    return {name: read_checkpoint(str(folder / name)) for name in sorted(os.listdir(folder)) if 'pth' in name}


def assert_same_run(ours: Path, theirs: Path) -> None:
    assert (ours / 'summary.csv').read_bytes() == (theirs / 'summary.csv').read_bytes()
    a, b = read(ours), read(theirs)
    assert list(a) == list(b)
    for name in a:
        assert_same(a[name], b[name], name)


def finish(argv: List[str], log: Path, world_size: int = 1) -> None:
    assert Launch(argv, str(log), world_size).wait(600) == 0, log.read_text()[-3000:]


def wait_for_output(launch: Launch, log: Path, size: float, delay: float) -> None:
    """Wait until a log has grown to a size, which on a busy machine too is a moment inside the run, and a little."""
    while launch.wait(0.002) is None and (log.stat().st_size if log.exists() else 0) < size:
        pass
    launch.wait(delay)


def kill_and_resume(
        argv: List[str], log: Path, world_size: int, full_size: int, seed: int, attempts: range) -> int:
    """Kill attempts at random moments, every other one around a write; returns how many died.

    Ends early where an attempt runs through.
    """
    generator = random.Random(seed)
    for i in attempts:
        moment = MOMENTS[i // 2 % len(MOMENTS)] if i % 2 else ''
        first = moment and i == attempts.start
        count = 1 if first or moment == 'inside the summary' else generator.randint(1, 3)
        launch = Launch(argv, str(log), world_size, moment, count)
        if not moment:
            size = (log.stat().st_size if log.exists() else 0) + generator.uniform(0.1, 0.5) * full_size
            wait_for_output(launch, log, size, generator.uniform(0, 0.05))
            launch.send(signal.SIGKILL)
        code = launch.wait(600)
        assert code in (0, -signal.SIGKILL), log.read_text()[-3000:]
        if code == 0:
            return i - attempts.start
    finish(argv, log, world_size)
    return len(attempts)


@pytest.mark.slow
@pytest.mark.parametrize('workers, world_size, attempts', [
    (0, 1, range(10)),
    (2, 1, range(5, 9)),  # files are written as by a run alone; the first death leaves an epoch that goes on
    pytest.param(1, 2, range(5, 9), marks=pytest.mark.dist),
], ids=['alone', 'loader processes', 'ranks'])
def test_run_killed_at_random_moments_ends_with_the_bits_of_one_never_stopped(
        images: Path, tmp_path: Path, workers: int, world_size: int, attempts: range) -> None:
    argv = flags(images, tmp_path, '-j', workers, '-b', 10 if world_size == 1 else 6)  # epochs of several updates
    log = tmp_path / 'killed.log'
    finish([*argv, '--experiment', 'whole'], tmp_path / 'whole.log', world_size)
    full_size = (tmp_path / 'whole.log').stat().st_size
    died = 0
    for i in range(5):
        name = f'killed-{i}'
        died += kill_and_resume(
            [*argv, '--experiment', name, '--resume', 'auto'], log, world_size, full_size, 10 * workers + i, attempts)
        assert_same_run(tmp_path / name, tmp_path / 'whole')
        with open(tmp_path / name / 'summary.csv') as file:
            assert [row['epoch'] for row in csv.DictReader(file)] == [str(epoch) for epoch in range(EPOCHS)]
        if died >= len(attempts):
            break
    assert died >= len(attempts)
    assert 'batches again' in log.read_text()


def children(pid: int) -> List[int]:
    """Process ids of a process's children, its loader's among them."""
    return [int(child) for child in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]


@pytest.fixture(scope='module')
def never_stopped(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run that no signal met."""
    output = tmp_path_factory.mktemp('never_stopped')
    finish(flags(images, output, '-j', 1, '--recovery-interval', 0, '--experiment', 'whole'), output / 'log')
    return output / 'whole'


@pytest.mark.skipif(not os.path.exists(f'/proc/{os.getpid()}/task/{os.getpid()}/children'), reason='reads /proc')
@pytest.mark.parametrize('number, code', [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_signal_to_all_processes_saves_and_exits_with_a_code_of_its_own(
        images: Path, tmp_path: Path, never_stopped: Path, number: int, code: int) -> None:
    argv = flags(images, tmp_path, '-j', 1, '--recovery-interval', 0)
    log = tmp_path / 'stopped.log'
    launch = Launch([*argv, '--experiment', 'stopped'], str(log))
    while 'Train: 1 [' not in (log.read_text() if log.exists() else ''):
        assert launch.wait(0.01) is None, log.read_text()[-3000:]
    for child in children(launch.processes[0].pid):
        os.kill(child, number)  # a scheduler and a terminal signal loader processes too
    launch.send(number)
    assert launch.wait(600) == code, log.read_text()[-3000:]
    assert f'Stopped by {signal.Signals(number).name}' in log.read_text()
    assert '--experiment stopped --resume auto' in log.read_text()
    finish([*argv, '--experiment', 'stopped', '--resume', 'auto'], log)
    stopped = tmp_path / 'stopped'
    assert (stopped / 'summary.csv').read_bytes() == (never_stopped / 'summary.csv').read_bytes()
    assert_same(*(read_checkpoint(str(folder / 'last.pth.tar')) for folder in (stopped, never_stopped)))


@pytest.mark.slow
@pytest.mark.dist
def test_signal_to_one_rank_stops_all_at_the_same_update(images: Path, tmp_path: Path) -> None:
    argv = flags(images, tmp_path, '-j', 0, '--epochs', 20)
    log = tmp_path / 'log'
    launch = Launch([*argv, '--experiment', 'stopped'], str(log), world_size=2)
    while 'Train: 1 [' not in (log.read_text() if log.exists() else ''):
        assert launch.wait(0.01) is None, log.read_text()[-3000:]
    os.kill(launch.processes[1].pid, signal.SIGTERM)
    assert launch.wait(600) == 75, log.read_text()[-3000:]
    assert [process.exitcode for process in launch.processes] == [75, 75]
    assert log.read_text().count('Stopped by SIGTERM') == 2
