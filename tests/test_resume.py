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

from timm_distill.demo import write_digits
from timm_distill.storage import read_checkpoint

pytestmark = pytest.mark.skipif(os.name != 'posix', reason='kills processes with signals')
EPOCHS = 3


@pytest.fixture(scope='module')
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip('sklearn')
    root = tmp_path_factory.mktemp('images') / 'digits'
    write_digits(root, train_per_class=12, validation_per_class=2)
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
        '--clip-grad', 1, '--log-interval', 2, '--checkpoint-hist', 2, *more)]


def assert_same(ours: Any, theirs: Any, where: str = '') -> None:
    """Compare all that two checkpoints hold, tensors bit by bit."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(ours, dict):
        assert list(ours) == list(theirs), where
        for key in ours:
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
    assert Launch(argv, str(log), world_size).wait(240) == 0, log.read_text()[-3000:]


def wait_for_output(launch: Launch, log: Path, size: float, delay: float) -> None:
    """Wait until a log has grown to a size, which on a busy machine too is a moment inside the run, and a little."""
    while launch.wait(0.002) is None and (log.stat().st_size if log.exists() else 0) < size:
        pass
    launch.wait(delay)


def kill_and_resume(argv: List[str], log: Path, world_size: int, full_size: int, seed: int) -> int:
    """Kill up to ten attempts at random moments, every other one around a write; returns how many died.

    Ends early where an attempt runs through.
    """
    generator = random.Random(seed)
    for i in range(10):
        moment = MOMENTS[i // 2 % len(MOMENTS)] if i % 2 else ''
        count = 1 if moment == 'inside the summary' else generator.randint(1, 3)
        launch = Launch(argv, str(log), world_size, moment, count)
        if not moment:
            size = (log.stat().st_size if log.exists() else 0) + generator.uniform(0.1, 0.5) * full_size
            wait_for_output(launch, log, size, generator.uniform(0, 0.05))
            launch.send(signal.SIGKILL)
        code = launch.wait(240)
        assert code in (0, -signal.SIGKILL), log.read_text()[-3000:]
        if code == 0:
            return i
    finish(argv, log, world_size)
    return 10


@pytest.mark.slow
@pytest.mark.parametrize('workers, world_size', [
    (0, 1),
    (2, 1),
    pytest.param(1, 2, marks=pytest.mark.dist),
])
def test_run_killed_at_ten_random_moments_ends_with_the_bits_of_one_never_stopped(
        images: Path, tmp_path: Path, workers: int, world_size: int) -> None:
    argv = flags(images, tmp_path, '-j', workers)
    log = tmp_path / 'killed.log'
    finish([*argv, '--experiment', 'whole'], tmp_path / 'whole.log', world_size)
    full_size = (tmp_path / 'whole.log').stat().st_size
    died = 0
    for i in range(5):
        name = f'killed-{i}'
        died += kill_and_resume(
            [*argv, '--experiment', name, '--resume', 'auto'], log, world_size, full_size, seed=10 * workers + i)
        assert_same_run(tmp_path / name, tmp_path / 'whole')
        with open(tmp_path / name / 'summary.csv') as file:
            assert [row['epoch'] for row in csv.DictReader(file)] == [str(epoch) for epoch in range(EPOCHS)]
        if died >= 10:
            break
    assert died >= 10
    assert 'batches again' in log.read_text()
