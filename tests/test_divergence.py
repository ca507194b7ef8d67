"""What a run does whose updates are not finite, and files that nobody should load."""
import os
from pathlib import Path

import pytest
import torch
import yaml

import train_distill
from timm_distill.engine import NonFiniteLossError
from timm_distill.errors import UsageError
from timm_distill.storage import read_checkpoint

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
        run(digits_dir, tmp_path, *DIVERGES, '--on-nan', 'rollback', '--recovery-interval', 1, '--log-interval', 1,
            '--epochs', 5)
    rollbacks = [r.getMessage() for r in caplog.records if 'Rolling back' in r.getMessage()]
    assert len(rollbacks) == 3 and 'recovery-0-' in rollbacks[0]


def test_skip_goes_on_to_the_end(digits_dir, tmp_path, caplog):
    result = run(digits_dir, tmp_path, *DIVERGES, '--on-nan', 'skip')
    assert 'were not finite and were skipped' in caplog.text
    state = read_checkpoint(os.path.join(result.output_dir, 'last.pth.tar'))['state_dict']
    assert all(tensor.isfinite().all() for tensor in state.values())


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
