"""Promises of writing, reading and resuming checkpoints."""
import argparse
import errno
import hashlib
import logging
import os
import pickle
import random
import re
import zipfile
from types import SimpleNamespace
from typing import Any, Optional, Tuple

import numpy as np
import pytest
import timm
import torch
from stub_task import create_saver, create_task, save_epochs, train_step
from timm.scheduler import CosineLRScheduler, PlateauLRScheduler
from timm.task import ClassificationTask
from timm.utils import CheckpointSaver, NativeScaler

import timm_distill.checkpoint.file
from timm_distill.checkpoint.choice import find_newest, resolve_resume
from timm_distill.checkpoint.file import DamagedFileError, read_checkpoint, verify, write_checkpoint
from timm_distill.checkpoint.rank_state import get_rank_state, restore_rank
from timm_distill.checkpoint.resume import check_same_run, resume_task
from timm_distill.errors import MergeError, UsageError
from timm_distill.utils.random import get_rng_state, set_rng_state


def draw() -> Tuple[float, float, float, float]:
    return random.random(), np.random.rand(), np.random.randn(), torch.rand(()).item()


def test_random_states_come_back(tmp_path):
    np.random.randn()  # an odd number of normal draws keeps one in reserve
    torch.save(get_rng_state(), tmp_path / 'rng.pth')
    expected = draw()
    set_rng_state(torch.load(tmp_path / 'rng.pth', weights_only=True))
    assert draw() == expected


def test_file_loads_into_the_plain_timm_model_and_weights_only(tmp_path):
    task, optimizer = create_task()
    task.setup_ema()
    create_saver(tmp_path, task, optimizer, amp_scaler=NativeScaler('cpu')).save_checkpoint(0, metric=1.)
    path = str(tmp_path / 'last.pth.tar')
    model = timm.create_model('test_resnet', num_classes=4, checkpoint_path=path)
    torch.testing.assert_close(model.state_dict(), task.get_trainable_module(ema=True).module.state_dict())
    assert set(read_checkpoint(path)) == {
        'epoch', 'version', 'arch', 'args', 'optimizer', 'hidden', 'amp_scaler', 'metric', 'saver', 'ranks', 'run',
        'state_dict', 'task_state', 'state_dict_ema', 'task_state_ema'}


@pytest.fixture
def full_disk(monkeypatch):
    """A function that makes files written from now on fail behind so many bytes, None to make room again."""
    original = open

    class Full:
        def __init__(self, file, room):
            self.file, self.room = file, room

        def write(self, data):
            self.room -= len(data)
            if self.room < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(data)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

    def set_room(room: Optional[int]) -> None:
        def open_full(path, mode='r', **kwargs):
            file = original(path, mode, **kwargs)
            return Full(file, room) if 'w' in mode and room is not None else file
        monkeypatch.setattr(timm_distill.checkpoint.file, 'open', open_full, raising=False)
    return set_room


@pytest.mark.parametrize('room', [0, 30_000])
def test_full_disk_is_reported_keeps_the_former_files_and_the_next_save_works(tmp_path, full_disk, caplog, room):
    task, optimizer = create_task()
    saver = create_saver(tmp_path, task, optimizer)
    saver.save_checkpoint(0, metric=1.)
    files = sorted(os.listdir(tmp_path))
    full_disk(room)
    saver.save_checkpoint(1, metric=2.)
    saver.save_recovery(2, 0)
    assert 'No space left on device' in caplog.text and saver.unsaved
    assert sorted(os.listdir(tmp_path)) == files
    for name in files:
        assert read_checkpoint(str(tmp_path / name))['epoch'] == 0
    full_disk(None)
    assert saver.save_checkpoint(2, metric=3.) == (3., 2)
    assert read_checkpoint(saver.last_path)['epoch'] == 2 and not saver.unsaved


def test_files_are_on_disk_before_they_replace_others_and_never_unlinked(tmp_path, monkeypatch):
    task, optimizer = create_task()
    saver = create_saver(tmp_path, task, optimizer)
    saver.save_checkpoint(0, metric=1.)
    events = []
    fsync, replace, remove = os.fsync, os.replace, os.remove
    monkeypatch.setattr(os, 'fsync', lambda fd: (events.append('fsync'), fsync(fd))[1])
    monkeypatch.setattr(os, 'replace', lambda a, b: (events.append(os.path.basename(b)), replace(a, b))[1])
    monkeypatch.setattr(os, 'remove', lambda p: (events.append(f'remove {os.path.basename(p)}'), remove(p))[1])
    monkeypatch.setattr(os, 'unlink', lambda p: pytest.fail(f'unlinked {p}'))
    saver.save_checkpoint(1, metric=2.)
    assert events == [
        'fsync', 'last.pth.tar.previous', 'fsync', 'last.pth.tar', 'fsync', 'checkpoint-1.pth.tar', 'fsync',
        'model_best.pth.tar', 'fsync']


@pytest.mark.parametrize('hardlinks', [True, False])
def test_history_keeps_the_best_and_no_temporary_files(tmp_path, monkeypatch, hardlinks):
    if not hardlinks:
        monkeypatch.setattr(os, 'link', lambda src, dst: (_ for _ in ()).throw(OSError('not supported')))
    task, optimizer = create_task()
    saver = create_saver(tmp_path, task, optimizer, max_history=2)
    for epoch, metric in enumerate((3., 1., 2.)):
        assert saver.save_checkpoint(epoch, metric=metric) == (3., 0)
    saver.save_milestone(3)
    saver.save_milestone(3)  # the same file again
    assert sorted(os.listdir(tmp_path)) == [
        'checkpoint-0.pth.tar', 'checkpoint-2.pth.tar', 'last.pth.tar', 'last.pth.tar.previous', 'milestone-3.pth.tar',
        'model_best.pth.tar']
    assert read_checkpoint(str(tmp_path / 'model_best.pth.tar'))['epoch'] == 0
    assert read_checkpoint(str(tmp_path / 'last.pth.tar'))['epoch'] == 2


def test_failed_merge_writes_the_unmerged_tensors_and_keeps_last(tmp_path):
    task, optimizer = create_task()
    saver = create_saver(tmp_path, task, optimizer)
    saver.save_checkpoint(0)
    train_step(task, optimizer)
    task.fails_merging = True
    with pytest.raises(MergeError, match=r'differ by 3 .*unmerged-1\.pth\.tar') as error:
        saver.save_checkpoint(1)
    raw = read_checkpoint(str(tmp_path / 'unmerged-1.pth.tar'))
    torch.testing.assert_close(raw['unmerged_state_dict'], dict(task.get_trainable_module().state_dict()))
    assert raw['epoch'] == 1 and 'adapter' in raw['unmerged_task_state'] and error.value.raw_state
    assert read_checkpoint(str(tmp_path / 'last.pth.tar'))['epoch'] == 0
    assert sorted(os.listdir(tmp_path)) == ['checkpoint-0.pth.tar', 'last.pth.tar', 'unmerged-1.pth.tar']


def test_resumed_run_continues_bit_for_bit(tmp_path):
    task, optimizer = create_task()
    task.setup_ema(decay=0.5)
    task.adapter = torch.tensor([1., 2., 3.])
    train_step(task, optimizer)
    saver = create_saver(tmp_path, task, optimizer)
    saver.ranks = [get_rank_state(task, None)]
    saver.save_checkpoint(3)
    train_step(task, optimizer)

    resumed, resumed_optimizer = create_task(seed=1)
    resumed.setup_ema(decay=0.5)
    path = str(tmp_path / 'last.pth.tar')
    checkpoint = read_checkpoint(path)
    assert resume_task(resumed, path, resumed_optimizer, checkpoint=checkpoint) == 4
    assert restore_rank(resumed, None, checkpoint) is None
    train_step(resumed, resumed_optimizer)
    torch.testing.assert_close(resumed.state_dict(), task.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(resumed_optimizer.state_dict(), optimizer.state_dict(), rtol=0, atol=0)
    assert resumed.adapter.tolist() == [1., 2., 3.]


@pytest.mark.filterwarnings('ignore:PlateauLRScheduler is deprecated')
def test_plateau_scheduler_remembers_its_counters_and_keeps_this_runs_settings(tmp_path):
    task, optimizer = create_task()
    scheduler = PlateauLRScheduler(optimizer, patience_t=3, decay_rate=0.1)
    for epoch, metric in enumerate((5., 4., 4.), start=1):
        scheduler.step(epoch, metric)
    create_saver(tmp_path, task, optimizer, lr_scheduler=scheduler).save_checkpoint(0)
    resumed, resumed_optimizer = create_task()
    resumed_scheduler = PlateauLRScheduler(resumed_optimizer, patience_t=2, decay_rate=0.1)
    resume_task(resumed, str(tmp_path / 'last.pth.tar'), resumed_optimizer, lr_scheduler=resumed_scheduler)
    assert resumed_scheduler.lr_scheduler.best == 5.
    assert resumed_scheduler.lr_scheduler.num_bad_epochs == 2
    assert resumed_scheduler.lr_scheduler.patience == 2


def test_changed_schedule_is_that_of_the_new_flags_and_warned_of(tmp_path, caplog):
    task, optimizer = create_task()
    scheduler = CosineLRScheduler(optimizer, t_initial=10)
    create_saver(tmp_path, task, optimizer, lr_scheduler=scheduler).save_checkpoint(0)
    longer = CosineLRScheduler(optimizer, t_initial=20)
    resume_task(task, str(tmp_path / 'last.pth.tar'), optimizer, lr_scheduler=longer)
    assert longer.t_initial == 20
    assert 't_initial 10 -> 20' in caplog.text
    assert 'lacks' not in caplog.text


def test_plain_timm_checkpoint_resumes_with_a_warning(tmp_path, caplog):
    task, optimizer = create_task()
    plain = ClassificationTask(task.get_trainable_module(), verbose=False)
    CheckpointSaver(plain.trainable_module, optimizer, task=plain, checkpoint_dir=str(tmp_path)).save_checkpoint(2)
    resumed, resumed_optimizer = create_task(seed=1)
    resumed.setup_ema()
    with caplog.at_level(logging.WARNING):
        start_epoch = resume_task(
            resumed, str(tmp_path / 'last.pth.tar'), resumed_optimizer, loss_scaler=NativeScaler('cpu'),
            lr_scheduler=CosineLRScheduler(resumed_optimizer, t_initial=10))
    assert start_epoch == 3
    for module in resumed.get_trainable_module(), resumed.get_trainable_module(ema=True).module:
        torch.testing.assert_close(module.state_dict(), plain.trainable_module.state_dict())
    assert all(word in caplog.text for word in ('task_state', 'ranks', 'amp_scaler', 'lr_scheduler', 'EMA'))
    assert 'optimizer' not in caplog.text


def test_bare_weights_resume_at_epoch_zero(tmp_path):
    task, _ = create_task()
    torch.save(task.get_trainable_module().state_dict(), tmp_path / 'weights.pth')
    assert resume_task(create_task(seed=1)[0], str(tmp_path / 'weights.pth')) == 0


def test_optimizer_of_other_groups_or_kind_names_the_flag(tmp_path):
    task, optimizer = create_task()
    create_saver(tmp_path, task, optimizer).save_checkpoint(0)
    path = str(tmp_path / 'last.pth.tar')
    parameters = list(task.parameters())
    groups = torch.optim.AdamW([{'params': parameters[:2]}, {'params': parameters[2:]}])
    with pytest.raises(UsageError, match=r'groups of .*--no-resume-opt'):
        resume_task(task, path, groups)
    with pytest.raises(UsageError, match=r'another kind.*--no-resume-opt'):
        resume_task(task, path, torch.optim.SGD(parameters, lr=0.1))


def test_checkpoint_of_another_student_names_it(tmp_path):
    task, optimizer = create_task()
    create_saver(tmp_path, task, optimizer).save_checkpoint(0)
    with pytest.raises(UsageError, match=r'test_resnet.*--student') as error:
        resume_task(create_task('test_vit')[0], str(tmp_path / 'last.pth.tar'))
    assert '\n' not in str(error.value)


def _write_damaged(path: Any, kind: str) -> None:
    torch.save({'state_dict': {'weight': torch.randn(1000)}}, path)
    data = path.read_bytes()
    if kind == 'truncated':
        path.write_bytes(data[:len(data) // 2])
    elif kind == 'empty':
        path.write_bytes(b'')
    elif kind == 'text':
        path.write_text('hello world, this is no checkpoint')
    elif kind == 'unsafe':
        torch.save({'state_dict': {}, 'object': SimpleNamespace()}, path)
    elif kind == 'tensor':
        torch.save(torch.zeros(3), path)


@pytest.mark.parametrize('kind, message', [
    ('truncated', 'truncated, corrupt'),
    ('empty', 'truncated, corrupt'),
    ('text', 'truncated, corrupt'),
    ('unsafe', 'types.SimpleNamespace'),
    ('tensor', 'holds a Tensor'),
])
def test_unreadable_file_has_one_clear_message(tmp_path, kind, message):
    path = tmp_path / 'file.pth.tar'
    _write_damaged(path, kind)
    with pytest.raises(UsageError, match=message) as error:
        read_checkpoint(str(path), flag='--teacher-checkpoint')
    assert str(path) in str(error.value) and '--teacher-checkpoint' in str(error.value)
    assert '\n' not in str(error.value)


def test_missing_file_and_file_without_weights_are_usage_errors(tmp_path):
    with pytest.raises(UsageError, match='--resume'):
        read_checkpoint(str(tmp_path / 'none.pth'))
    torch.save({'epoch': 3}, tmp_path / 'empty.pth')
    with pytest.raises(UsageError, match='state_dict'):
        resume_task(create_task()[0], str(tmp_path / 'empty.pth'))


def test_saving_draws_no_random_numbers(tmp_path):
    task, optimizer = create_task()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    create_saver(tmp_path, task, optimizer).save_checkpoint(0)
    assert torch.equal(torch.rand(2), expected)


def test_others_read_the_file(tmp_path):
    path = str(tmp_path / 'file.pth.tar')
    state = {'state_dict': {'weight': torch.randn(1000)}}
    write_checkpoint(state, path)
    for mmap in (False, True):
        assert torch.equal(torch.load(path, mmap=mmap)['state_dict']['weight'], state['state_dict']['weight'])


def flip(data: bytes, position: int, bit: int) -> bytes:
    damaged = bytearray(data)
    damaged[position] ^= 1 << bit
    return bytes(damaged)


def test_any_flipped_bit_of_a_tensor_is_detected(tmp_path):
    path = tmp_path / 'file.pth.tar'
    weight = torch.randn(100)
    write_checkpoint({'state_dict': {'weight': weight}}, str(path))
    data = path.read_bytes()
    start = data.index(weight.numpy().tobytes())
    for position in random.Random(0).sample(range(start, start + weight.nbytes), 60):
        path.write_bytes(flip(data, position, position % 8))
        with pytest.raises(DamagedFileError, match='checksum'):
            verify(str(path))


def test_no_flipped_bit_anywhere_gives_other_content(tmp_path):
    path = tmp_path / 'file.pth.tar'
    state = {'state_dict': {'weight': torch.arange(9.), 'number': torch.ones(3, dtype=torch.int8)}, 'epoch': 7}
    write_checkpoint(state, str(path))
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        directory = archive.start_dir
    attributes = [match.start() + 38 for match in re.finditer(rb'PK\x01\x02', data)]
    assert len(attributes) >= 3 and min(attributes) > directory
    places = [(position, 4) for position in attributes]  # of a folder: torch reads nothing there and says nothing
    rng = random.Random(0)
    places += [(rng.randrange(len(data)), rng.randrange(8)) for _ in range(150)]
    places += [(rng.randrange(directory, len(data)), rng.randrange(8)) for _ in range(150)]
    caught = 0
    for position, bit in places:
        path.write_bytes(flip(data, position, bit))
        try:
            loaded = read_checkpoint(str(path))
        except DamagedFileError:
            caught += 1
            continue
        assert loaded['epoch'] == 7, (position, bit)
        torch.testing.assert_close(loaded['state_dict'], state['state_dict'], rtol=0, atol=0)
    assert caught > 100


def test_a_file_with_a_sha256_in_its_comment_is_read_and_checked(tmp_path):
    path = tmp_path / 'file.pth.tar'
    state = {'state_dict': {'weight': torch.randn(100)}}
    torch.save(state, path)
    comment = b'sha256:' + hashlib.sha256(path.read_bytes()).hexdigest().encode()
    path.write_bytes(path.read_bytes()[:-2] + len(comment).to_bytes(2, 'little') + comment)  # as versions before 0.2
    assert torch.equal(read_checkpoint(str(path))['state_dict']['weight'], state['state_dict']['weight'])
    data = path.read_bytes()
    path.write_bytes(flip(data, data.index(state['state_dict']['weight'].numpy().tobytes()) + 50, 3))
    with pytest.raises(DamagedFileError, match='checksum'):
        read_checkpoint(str(path))


def test_a_file_written_without_checksums_is_read(tmp_path):
    path = str(tmp_path / 'file.pth.tar')
    computes = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({'state_dict': {'weight': torch.ones(3)}}, path)
    finally:
        torch.serialization.set_crc32_options(computes)
    assert torch.equal(read_checkpoint(path)['state_dict']['weight'], torch.ones(3))


@pytest.mark.parametrize('damage', ['truncate', 'flip'])
@pytest.mark.parametrize('resume', ['auto', 'last.pth.tar'])
def test_resume_falls_back_from_a_damaged_file_with_a_warning(tmp_path, caplog, damage, resume):
    save_epochs(tmp_path)
    path = tmp_path / 'last.pth.tar'
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    # written in place: the numbered file and model_best are names of the same file
    path.write_bytes(data[:len(data) // 3] if damage == 'truncate' else data)
    args = argparse.Namespace(
        resume=resume if resume == 'auto' else str(path), output=str(tmp_path.parent), experiment=tmp_path.name)
    assert resolve_resume(args)['epoch'] == 1
    assert args.resume == str(tmp_path / 'last.pth.tar.previous')
    assert 'last.pth.tar' in caplog.text and any(word in caplog.text for word in ('checksum', 'truncated'))


def test_the_newest_file_inside_an_epoch_wins_over_the_end_of_the_former(tmp_path):
    saver = save_epochs(tmp_path, 2)
    for update in (3, 7, 11):
        position = {'data': {'num_batches': update + 1}}
        saver.ranks = [get_rank_state(saver.task, None, position)]
        saver.save_recovery(2, update)
    assert sorted(name for name in os.listdir(tmp_path) if 'recovery' in name) == [
        'recovery-2-11.pth.tar', 'recovery-2-7.pth.tar']
    assert os.path.basename(find_newest(str(tmp_path))[0]) == 'recovery-2-11.pth.tar'


def test_resume_auto_without_a_checkpoint_begins_a_run(tmp_path):
    args = argparse.Namespace(resume='auto', output=str(tmp_path), experiment='', model='test_resnet')
    assert resolve_resume(args) is None
    assert args.resume == ''


@pytest.mark.parametrize('as_output', [True, False])
def test_resume_auto_finds_a_run_without_its_name(tmp_path, as_output):
    folder = tmp_path / '20260101-120000-test_resnet-32'
    folder.mkdir()
    save_epochs(folder)
    output = folder if as_output else tmp_path
    args = argparse.Namespace(resume='auto', output=str(output), experiment='', model='test_resnet')
    assert resolve_resume(args)['epoch'] == 2
    assert (args.output, args.experiment) == (str(tmp_path), folder.name)


def test_save_that_a_kill_interrupted_is_finished_at_resume(tmp_path):
    save_epochs(tmp_path, 1)
    task, optimizer = create_task()
    saver = create_saver(tmp_path, task, optimizer)
    saver.continue_from(saver.last_path, read_checkpoint(saver.last_path))
    saver._keep = lambda *args: None  # killed behind the replacement of `last`
    saver.save_checkpoint(1, metric=5.)
    (tmp_path / 'model_best.pth.tar.tmp').write_text('half')
    saver = create_saver(tmp_path, task, optimizer)
    saver.continue_from(saver.last_path, read_checkpoint(saver.last_path))
    assert read_checkpoint(str(tmp_path / 'model_best.pth.tar'))['epoch'] == 1
    assert (saver.best_metric, saver.best_epoch) == (5., 1)
    assert sorted(os.listdir(tmp_path)) == [
        'checkpoint-0.pth.tar', 'checkpoint-1.pth.tar', 'last.pth.tar', 'last.pth.tar.previous', 'model_best.pth.tar']


def test_flags_of_another_run_are_refused_with_the_difference():
    flags = dict(resume='x.pth.tar', model='resnet18', teacher='resnet50', kd='norm', kd_kwargs={'norm.segments': 8})
    checkpoint = {'args': argparse.Namespace(**flags)}
    for name, value in dict(model='vgg11', teacher='resnet34', kd='kd', kd_kwargs={'norm.segments': 4}).items():
        with pytest.raises(UsageError) as error:
            check_same_run(argparse.Namespace(**{**flags, name: value}), checkpoint)
        flag = '--student' if name == 'model' else '--' + name.replace('_', '-')
        assert f'{flag} {flags[name]} -> {value}' in str(error.value)


def test_flags_that_change_the_course_are_warned_of_and_others_are_not(caplog):
    checkpoint = {'args': argparse.Namespace(resume='', lr=0.1, epochs=3, kd_kwargs=None, output='a')}
    check_same_run(argparse.Namespace(resume='x', lr=0.1, epochs=3, kd_kwargs={}, output='b'), checkpoint)
    assert caplog.text == ''
    check_same_run(argparse.Namespace(resume='x', lr=0.2, epochs=3, kd_kwargs={}, output='a'), checkpoint)
    assert '--lr 0.1 -> 0.2' in caplog.text and 'epochs' not in caplog.text


class Bomb:
    """Runs a command when it is unpickled by a reader that runs code."""

    def __init__(self, trace: str):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (self.trace,)


@pytest.mark.parametrize('protocol', ['zip', 'legacy', 'bare pickle'])
def test_planted_pickle_is_refused_and_never_runs(tmp_path, protocol):
    path, trace = str(tmp_path / 'last.pth.tar'), str(tmp_path / 'trace')
    if protocol == 'bare pickle':
        with open(path, 'wb') as file:
            pickle.dump({'state_dict': Bomb(trace)}, file)
    else:
        torch.save({'state_dict': Bomb(trace)}, path, _use_new_zipfile_serialization=protocol == 'zip')
    with pytest.raises(UsageError) as error:
        read_checkpoint(path)
    assert protocol != 'zip' or 'posix.mkdir' in str(error.value)
    assert find_newest(str(tmp_path)) is None
    assert not os.path.exists(trace)
