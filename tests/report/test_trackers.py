"""Metrics for TensorBoard and Weights & Biases."""
import importlib.util
import logging
import re
import sys
import types
from argparse import Namespace
from pathlib import Path
from typing import Any, Dict, List

import pytest

import train_distill
from timm_distill import UsageError
from timm_distill.report.trackers import TensorBoardLog, read_summary, start_trackers


def flags(few_digits_dir: Path, output: Path) -> List[str]:
    return [
        '--data-dir', str(few_digits_dir), '--output', str(output), '--experiment', 'run', '--num-classes', '10',
        '--img-size', '32', '-b', '30', '--epochs', '2', '--warmup-epochs', '0', '--opt', 'adamw', '--lr', '1e-3',
        '-j', '0', '--device', 'cpu', '--model', 'test_efficientnet', '--no-report']


def test_tensorboard_shows_the_numbers_of_the_summary(few_digits_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip('tensorboard', reason='the tensorboard extra is not installed')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    train_distill.main([*flags(few_digits_dir, tmp_path), '--log-tensorboard'])
    events = EventAccumulator(str(tmp_path / 'run'))
    events.Reload()
    rows = read_summary(str(tmp_path / 'run' / 'summary.csv'))
    for tag, column in (('train/loss', 'train_loss'), ('eval/top1', 'eval_top1'), ('lr', 'lr')):
        assert [event.step for event in events.Scalars(tag)] == [0, 1]
        assert [event.value for event in events.Scalars(tag)] == pytest.approx([row[column] for row in rows], rel=1e-6)


def test_tensorboard_that_is_not_installed_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(UsageError, match='--log-tensorboard.*pip install'):
        TensorBoardLog(str(tmp_path))


def test_weights_and_biases_gets_the_columns_of_the_summary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    logged: List[Dict[str, Any]] = []
    run = types.SimpleNamespace(log=logged.append, finish=lambda: logged.append({'finished': True}))
    started: Dict[str, Any] = {}
    stand_in = types.ModuleType('wandb')
    stand_in.init = lambda **kwargs: started.update(kwargs) or run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, 'wandb', stand_in)
    args = Namespace(log_wandb=True, log_tensorboard=False, wandb_project='p', wandb_tags=['t'], wandb_resume_id='')
    (tracker,) = start_trackers(args, 'run', str(tmp_path))
    tracker.log(3, {'loss': 1.}, {'top1': 50.}, 0.1)
    tracker.finish()
    assert started['project'] == 'p' and started['name'] == 'run' and started['resume'] is None
    assert logged == [{'epoch': 3, 'train_loss': 1., 'eval_top1': 50., 'lr': 0.1}, {'finished': True}]


@pytest.mark.parametrize('style, bar', [('auto', False), ('bar', True), ('lines', False)])
def test_the_style_of_the_log_is_a_bar_or_lines(
        style: str,
        bar: bool,
        few_digits_dir: Path,
        tmp_path: Path,
        capfd: pytest.CaptureFixture[str],
        caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        train_distill.main([*flags(few_digits_dir, tmp_path), '--epochs', '1', '--log-style', style])
    assert ('epoch 0 of 0-0 train' in capfd.readouterr().err) == bar
    (last,) = [line for line in caplog.messages if re.match(r'Train: 0 \[.*100%', line)]
    assert 'images/s' in last and last.endswith('ETA: 0:00:00')
