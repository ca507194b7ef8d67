"""What a run does whose updates are not finite, and files that nobody should load."""
import os
import re
from pathlib import Path

import pytest
import timm
import torch
import yaml

import train_distill
from timm_distill.checkpoint.choice import find_newest
from timm_distill.checkpoint.file import read_checkpoint
from timm_distill.engine.train import NonFiniteLossError
from timm_distill.errors import UsageError
from timm_distill.export.release import load_release
from timm_distill.run import epochs, train_script
from timm_distill.run.recorder import Recorder

DIVERGES = ['--opt', 'sgd', '--lr', '1e30', '--sched', 'none', '--warmup-epochs', '0']


def run(data_dir, output, *flags):
    return train_distill.main([
        '--data-dir', str(data_dir), '--output', str(output), '--experiment', 'run', '--model', 'test_resnet',
        '--num-classes', '10', '--img-size', '32', '-b', '20', '--device', 'cpu', '-j', '0', '--epochs', '1',
        '--no-report', *map(str, flags)])


def test_divergence_stops_with_the_term_and_keeps_the_batch(digits_dir, tmp_path):
    with pytest.raises(NonFiniteLossError, match=r'loss=(nan|inf).*batch \d.*bad-batch\.pth'):
        run(digits_dir, tmp_path, *DIVERGES)
    batch = read_checkpoint(str(tmp_path / 'run' / 'bad-batch.pth'))
    assert batch['input'].shape == (20, 3, 32, 32) and batch['target'].shape == (20,)
    assert 'diverged' in batch['reason']


def test_rollback_goes_back_to_the_newest_checkpoint_a_few_times(digits_dir, tmp_path, caplog):
    with pytest.raises(NonFiniteLossError):
        run(
            digits_dir, tmp_path, *DIVERGES, '--on-nan', 'rollback', '--recovery-interval', 1, '--log-interval', 1,
            '--epochs', 5)
    rollbacks = [r.getMessage() for r in caplog.records if 'Rolling back' in r.getMessage()]
    assert len(rollbacks) == 3 and 'recovery-0-' in rollbacks[0]


def test_skip_goes_on_to_the_end_and_a_student_that_is_no_good_is_not_released(digits_dir, tmp_path, caplog):
    with pytest.raises(NonFiniteLossError, match='no good: .*No hub folder was written'):
        run(digits_dir, tmp_path, *DIVERGES, '--on-nan', 'skip')
    assert 'were not finite and were skipped' in caplog.text
    last = read_checkpoint(str(tmp_path / 'run' / 'last.pth.tar'))
    assert all(tensor.isfinite().all() for tensor in last['state_dict'].values())
    assert last['run']['diverged'] == 'the newest 14 updates were not finite'
    assert not {'hub', 'model_best.pth.tar'} & set(os.listdir(tmp_path / 'run'))


def test_streak_goes_on_over_epochs_that_are_shorter_than_it(digits_dir, tmp_path):
    flags = [*DIVERGES, '-b', 60, '--epochs', 4]  # five updates each
    with pytest.raises(NonFiniteLossError, match='diverged in epoch [12]: .*updates in a row'):
        run(digits_dir, tmp_path, *flags)


def test_rollback_never_takes_a_checkpoint_from_inside_a_streak(digits_dir, tmp_path, caplog, monkeypatch):
    """Loss is nan from the second epoch on; every update is saved, and still the healthy state comes back."""
    poison(monkeypatch, from_epoch=1)
    flags = [
        '--opt', 'sgd', '--lr', 0.01, '--on-nan', 'rollback', '--recovery-interval', 1, '--epochs', 6,
        '--log-interval', 1]
    with pytest.raises(NonFiniteLossError, match='diverged'):
        run(digits_dir, tmp_path, *flags)
    rollbacks = [r.getMessage() for r in caplog.records if 'Rolling back to' in r.getMessage()]
    assert len(rollbacks) == 3
    names = [re.search(r'Rolling back to \S+/(\S+) ', text)[1] for text in rollbacks]
    assert names[0] in ('last.pth.tar', 'recovery-0-14.pth.tar'), names
    caplog.clear()
    with pytest.raises(NonFiniteLossError):  # the number of rollbacks is that of the run, not of the process
        run(digits_dir, tmp_path, *flags, '--resume', 'auto')
    assert 'Rolling back to' not in caplog.text


def test_rollback_that_leads_to_the_same_divergence_goes_further_back_the_next_time(
        digits_dir, tmp_path, caplog,
        monkeypatch):
    poison(monkeypatch, from_epoch=2)
    with pytest.raises(NonFiniteLossError):
        run(
            digits_dir, tmp_path, '--opt', 'sgd', '--lr', 0.01, '--on-nan', 'rollback', '--epochs', 6,
            '--log-interval', 1)
    names = re.findall(r'Rolling back to \S+/(\S+) ', caplog.text)
    assert names[:2] == ['last.pth.tar', 'checkpoint-0.pth.tar'], names


def test_weights_that_are_not_finite_end_the_run_with_exit_code_1_and_are_no_good_for_anything(
        digits_dir, tmp_path, caplog, monkeypatch):
    forward = train_script.fit

    def spoil(run, recorder, *args):
        save = recorder.save

        def spoil_and_save(epoch, metric):
            if epoch == 1:
                with torch.no_grad():
                    next(run.task.module.student.parameters()).fill_(float('nan'))
            save(epoch, metric)
        recorder.save = spoil_and_save
        forward(run, recorder, *args)
    monkeypatch.setattr(train_script, 'fit', spoil)
    flags = ['--opt', 'sgd', '--lr', 0.01, '--epochs', 2]
    with pytest.raises(NonFiniteLossError, match=r'weights are not finite \(conv1'):
        run(digits_dir, tmp_path, *flags)
    folder = tmp_path / 'run'
    assert 'hub' not in os.listdir(folder)
    assert read_checkpoint(str(folder / 'model_best.pth.tar'))['epoch'] == 0
    path = str(folder / 'last.pth.tar')
    newest, checkpoint = find_newest(str(folder))
    assert checkpoint['epoch'] == 0 and newest != path
    with pytest.raises(UsageError, match='not finite'):
        load_release(path)
    with pytest.raises(UsageError, match='not finite'):
        run(digits_dir, tmp_path, *flags, '--resume', path)


def poison(monkeypatch, from_epoch):
    """Let the loss of every batch be nan from an epoch on."""
    train = epochs.train_one_epoch

    def train_poisoned(task, *args, epoch, **kwargs):
        def give_nan(input, target):
            result = forward(input, target)
            return {name: value * float('nan') if name == 'loss' else value for name, value in result.items()}
        forward = task.forward
        if epoch >= from_epoch:
            task.forward = give_nan
        try:
            return train(task, *args, epoch=epoch, **kwargs)
        finally:
            task.forward = forward
    monkeypatch.setattr(epochs, 'train_one_epoch', train_poisoned)


class Bomb:
    """Makes a folder when it is unpickled by a reader that runs code."""

    def __init__(self, trace: Path):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


@pytest.mark.parametrize('flags', [
    ['--resume'],
    ['--initial-checkpoint'],
    ['--teacher', 'test_resnet', '--kd', 'kd', '--teacher-checkpoint'],
    ['--teacher', 'test_resnet', '--kd', 'nd', '--no-teacher-pretrained', '--nd-class-means'],
    ['--pretrained', '--pretrained-path'],
], ids=lambda flags: flags[-1])
def test_planted_pickle_is_refused_by_every_flag_that_reads_weights(digits_dir, tmp_path, flags):
    path, trace = tmp_path / 'planted.pth.tar', tmp_path / 'trace'
    torch.save({'state_dict': {'weight': Bomb(trace)}}, path)
    with pytest.raises(UsageError) as error:
        run(digits_dir, tmp_path / 'out', *flags, path)
    assert 'planted.pth.tar' in str(error.value) or 'weights_only' in str(error.value).lower()
    assert not trace.exists()


def test_planted_object_in_a_config_file_is_refused(digits_dir, tmp_path):
    trace = tmp_path / 'trace'
    path = tmp_path / 'config.yaml'
    path.write_text(f'epochs: !!python/object/apply:os.mkdir ["{trace}"]\n')
    with pytest.raises((UsageError, SystemExit, yaml.YAMLError)):
        run(digits_dir, tmp_path / 'out', '--config', path)
    assert not trace.exists()


@pytest.fixture(scope='module')
def norm_flags(tmp_path_factory):
    """Flags of a distillation whose student is merged at every save."""
    path = tmp_path_factory.mktemp('teacher') / 'teacher.pth'
    torch.manual_seed(0)
    torch.save(timm.create_model('test_convnext', num_classes=10).state_dict(), path)
    return [
        '--teacher', 'test_convnext', '--teacher-checkpoint', path, '--kd', 'norm', '--kd-kwargs', 'norm.segments=2',
        '--no-teacher-eval', '--opt', 'sgd', '--lr', 0.01, '--log-interval', 1]


def spoil_weights(monkeypatch, part, epoch=1):
    """Let weights be nan at the end of an epoch, once."""
    save = Recorder.save
    left = [1]

    def spoil_and_save(self, current, metric):
        if current == epoch and left.pop():
            with torch.no_grad():
                next(getattr(self.run.task.module, part).parameters()).fill_(float('nan'))
            left.append(0)
        save(self, current, metric)
    monkeypatch.setattr(Recorder, 'save', spoil_and_save)


@pytest.mark.parametrize('part', ['student', 'adapters'])
def test_weights_that_are_nan_at_a_save_of_a_norm_run_are_rolled_back_as_in_any_other(
        digits_dir, tmp_path, caplog, monkeypatch, norm_flags, part):
    spoil_weights(monkeypatch, part)
    result = run(digits_dir, tmp_path, *norm_flags, '--epochs', 4, '--on-nan', 'rollback')
    names = re.findall(r'Rolling back to \S+/(\S+) ', caplog.text)
    assert names and set(names) <= {'checkpoint-0.pth.tar', 'last.pth.tar.previous'}
    assert 'The state that is saved now is no good' in caplog.text
    last = read_checkpoint(os.path.join(result.output_dir, 'last.pth.tar'))
    assert not last['run']['diverged'] and all(tensor.isfinite().all() for tensor in last['state_dict'].values())


@pytest.mark.parametrize('on_nan', ['stop', 'skip', 'rollback'])
def test_norm_run_that_ends_with_weights_that_are_nan_ends_with_that_and_not_with_its_merge(
        digits_dir, tmp_path, monkeypatch, norm_flags, on_nan):
    spoil_weights(monkeypatch, 'student')
    with pytest.raises(NonFiniteLossError, match='weights are not finite'):
        run(digits_dir, tmp_path, *norm_flags, '--epochs', 2, '--on-nan', on_nan)
    newest = find_newest(str(tmp_path / 'run'))
    assert newest is not None and newest[1]['epoch'] == 0
    assert 'hub' not in os.listdir(tmp_path / 'run')


@pytest.mark.slow
@pytest.mark.parametrize('on_nan', ['stop', 'skip', 'rollback'])
def test_first_images_that_give_nan_cost_their_update_and_not_the_run(
        digits_dir, tmp_path, monkeypatch, caplog, norm_flags, on_nan):
    """The very batch that the merge is measured on holds them; a whole run is to end well under every --on-nan."""
    train = epochs.train_one_epoch
    seen = []

    class Poisoned:
        def __init__(self, loader):
            self.loader = loader

        def __len__(self):
            return len(self.loader)

        def __iter__(self):
            for images, target in self.loader:
                seen.append(0)
                if len(seen) == 1:
                    images = images.clone()
                    images[:4] = float('nan')
                yield images, target

    def train_poisoned(task, loader, *args, **kwargs):
        return train(task, Poisoned(loader), *args, **kwargs)
    monkeypatch.setattr(epochs, 'train_one_epoch', train_poisoned)
    result = run(digits_dir, tmp_path, *norm_flags, '--epochs', 2, '--on-nan', on_nan)
    assert len(seen) == 30 and '1 update' in caplog.text and 'Rolling back' not in caplog.text
    last = read_checkpoint(os.path.join(result.output_dir, 'last.pth.tar'))
    assert last['run']['finite'] and last['run']['diverged'] == '' and last['epoch'] == 1
    assert 'hub' in os.listdir(result.output_dir)
