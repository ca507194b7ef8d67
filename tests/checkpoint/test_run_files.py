"""Whose the files of a folder are, and which of them a run goes on from, counts and removes."""
import argparse
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, List

import pytest
import torch
from stub_task import create_saver, create_task, save_epochs, train_step

from timm_distill.checkpoint import lock as locking
from timm_distill.checkpoint.choice import find_newest, find_rollback, resolve_resume
from timm_distill.checkpoint.file import read_checkpoint, write_checkpoint
from timm_distill.checkpoint.lock import LOCK_NAME, FolderLock
from timm_distill.checkpoint.rank_state import get_rank_state
from timm_distill.checkpoint.run_files import list_run_files, nonfinite_tensors, own_files, remove_temporary, used_by
from timm_distill.errors import UsageError
from timm_distill.run.folder import check_unused, create_folder, open_run


def resume_from(folder: Path, name: str) -> Any:
    """Return a saver that goes on from a checkpoint of a folder, as a resumed process would."""
    task, optimizer = create_task()
    saver = create_saver(folder, task, optimizer)
    saver.continue_from(str(folder / name), read_checkpoint(str(folder / name)))
    return saver


def save_recoveries(saver: Any, epoch: int, updates: List[int], streak: int = 0) -> None:
    for update in updates:
        saver.ranks = [get_rank_state(saver.task, None, {'data': {'num_batches': update + 1}})]
        saver.streak = streak
        saver.save_recovery(epoch, update)
    saver.ranks, saver.streak = [], 0


def names(folder: Path) -> List[str]:
    return sorted(name for name in os.listdir(folder) if name != LOCK_NAME)


def newest(folder: Path) -> str:
    found = find_newest(str(folder))
    return os.path.basename(found[0]) if found else ''


def create_args(folder: Path, resume: str = '', **kwargs: Any) -> argparse.Namespace:
    return argparse.Namespace(**{
        'output': str(folder.parent), 'experiment': folder.name, 'resume': resume, 'overwrite': False,
        'model': 'test_resnet', **kwargs})


def test_run_that_goes_back_to_an_earlier_epoch_keeps_what_it_saves_and_resumes_from_that(tmp_path, caplog):
    save_epochs(tmp_path, 4)
    saver = resume_from(tmp_path, 'checkpoint-0.pth.tar')
    assert 'nothing was removed' in caplog.text and 'last.pth.tar.abandoned' in caplog.text
    assert newest(tmp_path) in ('checkpoint-0.pth.tar', 'model_best.pth.tar')  # the same file
    save_recoveries(saver, 1, [0])
    assert newest(tmp_path) == 'recovery-1-0.pth.tar'
    saver.save_checkpoint(1, metric=-1.)
    assert newest(tmp_path) == 'last.pth.tar'
    assert read_checkpoint(str(tmp_path / 'last.pth.tar'))['epoch'] == 1
    # the best is that of the course that goes on, not of the one given up
    assert read_checkpoint(str(tmp_path / 'model_best.pth.tar'))['epoch'] == 0
    assert (saver.best_metric, saver.best_epoch) == (0., 0)


def test_recoveries_are_removed_by_when_they_were_written_not_by_their_numbers(tmp_path):
    saver = save_epochs(tmp_path, 1)
    save_recoveries(saver, 1, [3, 7, 11])
    for name in ('recovery-1-11.pth.tar', 'recovery-1-7.pth.tar'):
        (tmp_path / name).write_bytes(b'damaged')
    saver = resume_from(tmp_path, 'last.pth.tar')
    save_recoveries(saver, 1, [2])
    assert newest(tmp_path) == 'recovery-1-2.pth.tar'
    save_recoveries(saver, 1, [3, 4])
    assert [name for name in names(tmp_path) if name.startswith('recovery')] == [
        'recovery-1-11.pth.tar.damaged', 'recovery-1-3.pth.tar', 'recovery-1-4.pth.tar',
        'recovery-1-7.pth.tar.damaged']


def test_damaged_last_does_not_replace_the_good_one_before_it(tmp_path):
    save_epochs(tmp_path, 2)
    for name in ('last.pth.tar', 'checkpoint-1.pth.tar', 'checkpoint-0.pth.tar'):
        os.remove(tmp_path / name)  # a hard link would be damaged along
    os.remove(tmp_path / 'model_best.pth.tar')
    (tmp_path / 'last.pth.tar').write_bytes(b'damaged')
    saver = resume_from(tmp_path, 'last.pth.tar.previous')
    replaced = []
    saver._replace = lambda source, target: replaced.append(target)
    saver._duplicate = lambda source, target: replaced.append(target)
    saver.save_checkpoint(1, metric=None)
    assert str(tmp_path / 'last.pth.tar.previous') not in replaced
    assert read_checkpoint(str(tmp_path / 'last.pth.tar.previous'))['epoch'] == 0


def test_checkpoint_of_another_run_is_named_left_out_and_never_replaced_or_removed(tmp_path, caplog):
    ours, theirs = tmp_path / 'ours', tmp_path / 'theirs'
    for folder, epochs in ((ours, 2), (theirs, 9)):
        folder.mkdir()
        save_epochs(folder, epochs)
    for source, target in (('checkpoint-8', 'checkpoint-8'), ('last', 'teacher'), ('last', 'recovery-9-3')):
        (ours / f'{target}.pth.tar').write_bytes((theirs / f'{source}.pth.tar').read_bytes())
    assert newest(ours) == 'last.pth.tar' and find_newest(str(ours))[1]['epoch'] == 1
    for name in ('checkpoint-8', 'teacher', 'recovery-9-3'):
        assert f'{name}.pth.tar' in caplog.text
    saver = resume_from(ours, 'last.pth.tar')
    for epoch in range(2, 12):
        saver.save_checkpoint(epoch, metric=float(epoch))
    assert (ours / 'checkpoint-8.pth.tar.other-run').exists() and (ours / 'teacher.pth.tar').exists()
    assert read_checkpoint(str(ours / 'checkpoint-8.pth.tar'))['run']['id'] == saver.run_id


def test_file_that_is_no_checkpoint_at_all_is_named_and_the_run_goes_on(tmp_path, caplog):
    save_epochs(tmp_path, 2)
    torch.save([1, 2], tmp_path / 'recovery-5-1.pth.tar')
    torch.save({'run': 3, 'epoch': 'x'}, tmp_path / 'recovery-5-2.pth.tar')
    (tmp_path / 'notes.pth.tar').write_text('mine')
    (tmp_path / 'recovery-5-3.pth.tar').mkdir()
    assert newest(tmp_path) == 'last.pth.tar'
    for name in ('recovery-5-1', 'recovery-5-2', 'recovery-5-3', 'notes'):
        assert f'{name}.pth.tar' in caplog.text
    resume_from(tmp_path, 'last.pth.tar').save_checkpoint(2, metric=1.)
    assert newest(tmp_path) == 'last.pth.tar' and (tmp_path / 'notes.pth.tar').read_text() == 'mine'


def test_folders_of_former_versions_resume_by_their_epochs(tmp_path):
    saver = save_epochs(tmp_path, 3)
    save_recoveries(saver, 3, [1])
    for name in names(tmp_path):
        checkpoint = read_checkpoint(str(tmp_path / name))
        checkpoint.pop('run', None)  # hard links share what they hold
        write_checkpoint(checkpoint, str(tmp_path / name))
    os.rename(tmp_path / 'last.pth.tar.previous', tmp_path / 'previous.pth.tar')
    assert newest(tmp_path) == 'recovery-3-1.pth.tar'
    os.remove(tmp_path / 'recovery-3-1.pth.tar')
    assert newest(tmp_path) == 'last.pth.tar'
    saver = resume_from(tmp_path, 'last.pth.tar')
    assert saver.best_epoch == 2 and 'previous.pth.tar' not in names(tmp_path)
    saver.save_checkpoint(3, metric=0.)
    assert find_newest(str(tmp_path))[1]['epoch'] == 3


def test_no_duplicate_of_a_checkpoint_has_a_name_that_averaging_scripts_collect(tmp_path):
    save_epochs(tmp_path, 3)
    epochs = [read_checkpoint(str(path))['epoch'] for path in tmp_path.glob('*.pth.tar') if 'checkpoint' in path.name]
    assert sorted(epochs) == [0, 1, 2]
    assert not (tmp_path / 'previous.pth.tar').exists()
    assert read_checkpoint(str(tmp_path / 'last.pth.tar.previous'))['epoch'] == 1


def test_state_saved_inside_a_streak_is_marked_and_passed_over_and_costs_no_good_one(tmp_path, caplog):
    saver = save_epochs(tmp_path, 2)
    save_recoveries(saver, 2, [0, 1])
    save_recoveries(saver, 2, [2, 3, 4], streak=5)
    assert [name for name in names(tmp_path) if name.startswith('recovery')] == [
        'recovery-2-0.pth.tar', 'recovery-2-1.pth.tar', 'recovery-2-4.pth.tar']
    assert newest(tmp_path) == 'recovery-2-1.pth.tar'
    assert 'newest 5 updates were not finite' in caplog.text
    saver.streak = 3
    for epoch in (2, 3):
        saver.save_checkpoint(epoch, metric=9.)
    assert read_checkpoint(str(tmp_path / 'last.pth.tar.previous'))['epoch'] == 1  # the newest good one stays


def test_resume_auto_refuses_a_folder_without_any_good_checkpoint(tmp_path):
    task, optimizer = create_task()
    saver = create_saver(tmp_path, task, optimizer)
    saver.streak = 2
    saver.save_checkpoint(0, metric=1.)
    with pytest.raises(UsageError, match='no good checkpoint.*--resume FILE'):
        resolve_resume(create_args(tmp_path, 'auto'))
    args = create_args(tmp_path, str(tmp_path / 'last.pth.tar'))
    assert resolve_resume(args)['epoch'] == 0  # asked for by name


@pytest.mark.parametrize('metric', [float('nan'), float('inf')])
def test_metric_that_is_not_finite_never_ranks(tmp_path, metric):
    task, optimizer = create_task()
    saver = create_saver(tmp_path, task, optimizer)
    saver.save_checkpoint(0, metric=metric)
    assert names(tmp_path) == ['last.pth.tar']
    assert saver.save_checkpoint(1, metric=1.) == (1., 1)


def test_averaged_weights_that_are_not_finite_are_marked_too(tmp_path):
    task, optimizer = create_task()
    task.setup_ema(decay=0.5)
    train_step(task, optimizer)
    saver = create_saver(tmp_path, task, optimizer)
    with torch.no_grad():
        next(task.get_trainable_module(ema=True).parameters())[0] = float('inf')
    saver.save_checkpoint(0, metric=1.)
    assert 'not finite' in read_checkpoint(str(tmp_path / 'last.pth.tar'))['run']['diverged']


def test_buffers_that_are_infinite_by_design_pass():
    bound, spoiled = torch.full((), float('inf')), torch.tensor([1., float('inf')])
    assert nonfinite_tensors({'a': {'bound': bound}}, constant=None) == []
    assert nonfinite_tensors({'bound': bound, 'w': spoiled}, constant={'bound'}) == ['w']
    assert nonfinite_tensors({'w': spoiled, 'n': torch.tensor(float('nan'))}, constant=None) == ['w', 'n']


def test_rollback_goes_to_the_newest_good_save_and_further_back_where_nothing_was_trained_since(tmp_path):
    saver = save_epochs(tmp_path, 3)
    path, checkpoint = find_rollback(str(tmp_path), saver.rollback_origin, saver.rollback_end)
    assert checkpoint['epoch'] == 2
    saver.note_rollback(path, checkpoint)
    save_recoveries(saver, 3, [0])  # what follows a rollback: the same weights at a later place
    path, checkpoint = find_rollback(str(tmp_path), saver.rollback_origin, saver.rollback_end)
    assert checkpoint['epoch'] == 1
    saver = resume_from(tmp_path, 'recovery-3-0.pth.tar')
    assert (saver.num_rollbacks, saver.copy_of) == (1, saver.rollback_origin)
    saver.copy_of = 0  # trained on
    saver.save_checkpoint(3, metric=0.)
    assert find_rollback(str(tmp_path), saver.rollback_origin, saver.rollback_end)[1]['epoch'] == 3


def test_new_run_in_a_used_folder_is_refused_and_overwrite_begins_anew(tmp_path):
    save_epochs(tmp_path, 2)
    (tmp_path / 'notes.txt').write_text('mine')
    (tmp_path / 'summary.csv').write_text('epoch\n0\n')
    with FolderLock() as lock:
        with pytest.raises(UsageError, match='holds a run already.*--resume auto.*--overwrite'):
            open_run(create_args(tmp_path), lock)
        before = names(tmp_path)
        args = create_args(tmp_path, overwrite=True)
        assert open_run(args, lock) is None
        assert names(tmp_path) == before  # nothing happens before all else stands
        assert create_folder(args, 32, None, lock) == str(tmp_path)
        assert names(tmp_path) == ['notes.txt']


def test_resuming_a_run_into_the_folder_of_another_is_refused(tmp_path):
    for name in 'ab':
        (tmp_path / name).mkdir()
        save_epochs(tmp_path / name, 1)
    args = create_args(tmp_path / 'b', str(tmp_path / 'a' / 'last.pth.tar'))
    with FolderLock() as lock, pytest.raises(UsageError, match='holds a run already'):
        open_run(args, lock)
    args = create_args(tmp_path / 'a', str(tmp_path / 'a' / 'last.pth.tar'), overwrite=True)
    with FolderLock() as lock, pytest.raises(UsageError, match='--overwrite would remove the run'):
        open_run(args, lock)
    (tmp_path / 'a' / 'checkpoint-7.pth.tar').write_bytes((tmp_path / 'b' / 'last.pth.tar').read_bytes())
    args = create_args(tmp_path / 'a', str(tmp_path / 'a' / 'checkpoint-7.pth.tar'))
    with FolderLock() as lock, pytest.raises(UsageError, match='holds a run already'):
        open_run(args, lock)


def test_folder_of_a_run_that_failed_at_its_start_is_free(tmp_path):
    (tmp_path / 'args.yaml').write_text('model: test_resnet\n')
    (tmp_path / 'teacher.pth.tar').write_bytes(b'somebody else\'s')
    check_unused(create_args(tmp_path), str(tmp_path), None)
    assert used_by(str(tmp_path)) == []


def test_runs_without_a_name_that_begin_in_the_same_second_have_folders_of_their_own(tmp_path):
    args = create_args(tmp_path / 'x', experiment='')
    folders = set()
    for _ in range(4):
        with FolderLock() as lock:
            folders.add(create_folder(args, 32, None, lock))
    assert len(folders) == 4


def test_foreign_checkpoint_beside_the_runs_does_not_hide_them_from_resume_auto(tmp_path):
    folder = tmp_path / '20260101-120000-test_resnet-32'
    folder.mkdir()
    save_epochs(folder, 1)
    (tmp_path / 'teacher.pth.tar').write_bytes(b'not a run')
    assert resolve_resume(create_args(tmp_path / 'x', 'auto', experiment=''))['epoch'] == 0


HOLD = '''
import sys, time
from timm_distill.checkpoint.lock import FolderLock
with FolderLock() as lock:
    lock.acquire(sys.argv[1])
    print('held', flush=True)
    time.sleep(60)
'''


def hold(folder: Path) -> 'subprocess.Popen[str]':
    process = subprocess.Popen([sys.executable, '-c', HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == 'held\n'
    return process


@pytest.mark.skipif(os.name != 'posix', reason='flock')
def test_folder_in_use_is_one_message_with_the_process_and_free_when_that_is_killed(tmp_path):
    process = hold(tmp_path)
    try:
        with FolderLock() as lock, pytest.raises(UsageError, match=rf'in use by process {process.pid} on .*since'):
            open_run(create_args(tmp_path), lock)
        with FolderLock(enabled=False) as lock:  # a further rank
            lock.acquire(str(tmp_path))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with FolderLock() as lock:
        lock.acquire(str(tmp_path))


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='fork')
def test_forked_loader_process_that_outlives_its_parent_keeps_no_lock(tmp_path):
    lock = FolderLock()
    lock.acquire(str(tmp_path))
    end, start = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(start, b'x')
        time.sleep(30)
        os._exit(0)
    try:
        os.read(end, 1)
        lock._close()  # as a kill does
        with FolderLock() as lock:
            lock.acquire(str(tmp_path))
    finally:
        os.close(end)
        os.close(start)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize('number', ['ENOLCK', 'ENOSYS', 'EOPNOTSUPP'])
def test_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog, number):
    import errno

    def fail(*args: Any) -> None:
        raise OSError(getattr(errno, number), os.strerror(getattr(errno, number)))
    monkeypatch.setattr(locking.fcntl, 'flock', fail)
    with FolderLock() as lock:
        lock.acquire(str(tmp_path))
    assert 'cannot be locked' in caplog.text


def test_files_of_a_run_have_the_permissions_that_the_umask_leaves(tmp_path):
    former = os.umask(0o027)
    try:
        save_epochs(tmp_path, 2)
        with FolderLock() as lock:
            lock.acquire(str(tmp_path))
    finally:
        os.umask(former)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o640}


def test_own_files_are_those_of_last_whatever_else_is_more(tmp_path):
    ours, theirs = tmp_path / 'ours', tmp_path / 'theirs'
    for folder in (ours, theirs):
        folder.mkdir()
        save_epochs(folder, 1)
    for epoch in range(5, 9):
        (ours / f'checkpoint-{epoch}.pth.tar').write_bytes((theirs / 'last.pth.tar').read_bytes())
    kept = own_files(list_run_files(str(ours)))
    assert sorted(file.name for file in kept) == ['checkpoint-0.pth.tar', 'last.pth.tar', 'model_best.pth.tar']


@pytest.mark.parametrize('name', ['checkpoint-1.pth.tar', 'mine.pth.tar'])
def test_run_that_goes_on_from_an_earlier_epoch_has_a_last_checkpoint_even_if_it_trains_no_more(tmp_path, name):
    save_epochs(tmp_path)
    source = str(tmp_path / name)
    if name == 'mine.pth.tar':
        shutil.copy(tmp_path / 'checkpoint-1.pth.tar', source)
    resume_from(tmp_path, name).keep_as_last(source)
    assert 'last.pth.tar.abandoned' in os.listdir(tmp_path)
    assert read_checkpoint(str(tmp_path / 'last.pth.tar'))['epoch'] == 1
    newest = find_newest(str(tmp_path))
    assert newest is not None and newest[1]['epoch'] == 1


def test_file_of_the_user_shares_nothing_with_those_of_the_run(tmp_path):
    """Who writes a file anew in place would change the run's own if they were names of one file."""
    save_epochs(tmp_path)
    shutil.copy(tmp_path / 'checkpoint-1.pth.tar', tmp_path / 'mine.pth.tar')
    resume_from(tmp_path, 'mine.pth.tar')
    mine = os.stat(tmp_path / 'mine.pth.tar').st_ino
    assert mine not in [os.stat(tmp_path / name).st_ino for name in os.listdir(tmp_path) if name != 'mine.pth.tar']


def test_what_a_kill_left_half_written_is_removed_folders_too(tmp_path):
    (tmp_path / '.hub-x.tmp').mkdir()
    (tmp_path / '.hub-x.tmp' / 'model.safetensors').write_bytes(b'half')
    (tmp_path / 'summary.csv.tmp').write_text('half')
    (tmp_path / 'mine').write_text('mine')
    remove_temporary(str(tmp_path))
    assert os.listdir(tmp_path) == ['mine']
