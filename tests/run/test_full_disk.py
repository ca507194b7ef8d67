"""A disk that takes no more costs no traceback and no good exit: what is lost is told, with where the space went."""
import errno
import os
import shutil
from types import SimpleNamespace

import pytest
from stub_task import create_saver, create_task
from test_train_distill import TEACHER, run

import timm_distill.checkpoint.file
import timm_distill.checkpoint.saver
import timm_distill.run.divergence
import timm_distill.run.ending
import timm_distill.run.recorder
from timm_distill import UsageError
from timm_distill.checkpoint.file import checkpoint_size, describe_space, write_checkpoint, write_text
from timm_distill.engine.meters import NonFiniteLossError
from timm_distill.errors import LostStateError, MergeError
from timm_distill.report import trackers
from timm_distill.run import report as closing
from timm_distill.run.recorder import Recorder

FLAGS = ['--model', TEACHER, '--epochs', 2, '--no-report']


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_run_whose_checkpoints_found_no_room_does_not_end_well(few_digits_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(timm_distill.checkpoint.saver, 'write_checkpoint', full)
    with pytest.raises(LostStateError, match=r'No space left.*a checkpoint takes .*Nothing is saved') as error:
        run(few_digits_dir, tmp_path, *FLAGS)
    assert '\n' not in str(error.value)
    assert not os.path.exists(tmp_path / 'run' / 'hub')


def test_run_whose_last_checkpoint_found_no_room_names_the_newest_there_is(few_digits_dir, tmp_path, monkeypatch):
    def write(state, path):
        return full() if state['epoch'] == 1 else write_checkpoint(state, path)
    monkeypatch.setattr(timm_distill.checkpoint.saver, 'write_checkpoint', write)
    with pytest.raises(LostStateError, match=r'newest state there is: .*pth\.tar.*--resume auto'):
        run(few_digits_dir, tmp_path, *FLAGS)
    assert not os.path.exists(tmp_path / 'run' / 'hub')
    monkeypatch.undo()
    assert run(few_digits_dir, tmp_path, *FLAGS, '--resume', 'auto').checkpoint


@pytest.mark.parametrize('change', [
    lambda folder: shutil.rmtree(folder),
    lambda folder: os.rename(folder, folder + '-renamed'),
    lambda folder: (os.remove(folder + '/last.pth.tar'), os.mkdir(folder + '/last.pth.tar')),
], ids=['removed', 'renamed', 'last is a folder'])
@pytest.mark.parametrize('epoch', [0, 1])
def test_run_whose_folder_changed_under_it_does_not_end_well(few_digits_dir, tmp_path, monkeypatch, change, epoch):
    save = Recorder.save

    def save_and_change(self, current, metric):
        save(self, current, metric)
        if current == epoch:
            change(self.result.output_dir)
    monkeypatch.setattr(Recorder, 'save', save_and_change)
    with pytest.raises(LostStateError, match='not on disk'):
        run(few_digits_dir, tmp_path, *FLAGS)


def test_folder_that_takes_no_file_is_one_message_at_the_start_and_at_a_resume(few_digits_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(timm_distill.run.recorder, 'write_text', full)
    with pytest.raises(UsageError, match=r'--output .*No space left'):
        run(few_digits_dir, tmp_path / 'out', *FLAGS)
    assert not os.path.exists(tmp_path / 'out' / 'run')
    monkeypatch.undo()
    result = run(few_digits_dir, tmp_path, *FLAGS, '--stop-epoch', 1)
    files = sorted(os.listdir(result.output_dir))
    monkeypatch.setattr(timm_distill.run.recorder, 'write_text', full)
    with pytest.raises(UsageError, match=r'--output .*No space left.*\.pth\.tar'):
        run(few_digits_dir, tmp_path, *FLAGS, '--resume', 'auto')
    assert sorted(os.listdir(result.output_dir)) == files


def test_hub_folder_without_room_names_the_command_that_writes_it_later(few_digits_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(timm_distill.run.ending, 'export_hub', full)
    with pytest.raises(LostStateError, match=r'trained and saved, but .*hub.*timm_distill\.export'):
        run(few_digits_dir, tmp_path, *FLAGS)
    assert os.path.exists(tmp_path / 'run' / 'last.pth.tar')


def test_divergence_is_told_though_its_batch_cannot_be_kept(digits_dir, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(timm_distill.run.divergence, 'write_checkpoint', full)
    with pytest.raises(NonFiniteLossError):
        run(digits_dir, tmp_path, *FLAGS, '--lr', '1e30', '--log-interval', 1, '--opt', 'sgd', '--grad-accum-steps', 1)
    assert 'could not be kept' in caplog.text


def test_report_without_room_costs_a_warning(few_digits_dir, tmp_path, monkeypatch, caplog):
    pytest.importorskip('matplotlib')
    monkeypatch.setattr(closing, 'write_report', full)
    assert run(few_digits_dir, tmp_path, *FLAGS[:4], '--report').checkpoint
    assert 'The report could not be written: No space left' in caplog.text


@pytest.fixture
def small_disk(tmp_path, monkeypatch):
    """A function that sets how many bytes the checkpoints of tmp_path may take."""
    def set_size(size):
        def used():
            return sum(os.path.getsize(tmp_path / name) for name in os.listdir(tmp_path) if name.startswith('recovery'))

        def write(state, path):
            return full() if used() + checkpoint_size(state) > size else write_checkpoint(state, path)
        monkeypatch.setattr(timm_distill.checkpoint.saver, 'write_checkpoint', write)
    return set_size


def test_obsolete_recoveries_give_way_before_a_checkpoint_is_given_up(tmp_path, small_disk, monkeypatch):
    def recoveries():
        return sorted(name for name in os.listdir(tmp_path) if 'recovery' in name)

    task, optimizer = create_task()
    saver = create_saver(tmp_path, task, optimizer)
    for update in (1, 3):
        saver.save_recovery(0, update)
    size = os.path.getsize(tmp_path / 'recovery-0-1.pth.tar')
    small_disk(2.5 * size)
    saver.save_recovery(0, 5)
    assert not saver.unsaved and recoveries() == ['recovery-0-3.pth.tar', 'recovery-0-5.pth.tar']
    saver.save_checkpoint(0, metric=1.)
    assert not saver.unsaved and recoveries() == ['recovery-0-5.pth.tar']
    small_disk(1.5 * size)
    saver.save_recovery(1, 1)
    assert not saver.unsaved and recoveries() == ['recovery-1-1.pth.tar']
    # now the newest one: it goes only where its room suffices
    for free, expected in ((-size // 2, ['recovery-1-1.pth.tar']), (size // 2, [])):
        monkeypatch.setattr(shutil, 'disk_usage', lambda path, free=free: SimpleNamespace(free=free, total=9 * size))
        saver.save_checkpoint(1, metric=1.)
        assert bool(saver.unsaved) == bool(expected) and recoveries() == expected
    assert saver.newest == saver.last_path


def test_newest_recovery_is_never_given_up_without_a_checkpoint_to_fall_back_to(tmp_path, small_disk):
    task, optimizer = create_task()
    saver = create_saver(tmp_path, task, optimizer)
    for update in (1, 3):
        saver.save_recovery(0, update)
    small_disk(10)
    saver.save_recovery(0, 5)
    assert saver.unsaved
    assert os.listdir(tmp_path) == ['recovery-0-3.pth.tar']


def test_failed_merge_is_told_though_its_tensors_find_no_room(tmp_path, monkeypatch):
    task, optimizer = create_task()
    saver = create_saver(tmp_path, task, optimizer)
    task.fails_merging = True
    monkeypatch.setattr(timm_distill.checkpoint.saver, 'write_checkpoint', full)
    with pytest.raises(MergeError, match='differ by 3 .*could not be written: No space left'):
        saver.save_checkpoint(1)


def test_milestone_without_room_is_survived(tmp_path, monkeypatch):
    task, optimizer = create_task()
    saver = create_saver(tmp_path, task, optimizer)
    saver.save_checkpoint(0, metric=1.)
    monkeypatch.setattr(saver, '_duplicate', full)
    saver.save_milestone(1)
    assert 'No space left' in saver.unsaved


def test_text_that_finds_no_room_leaves_the_former_file_and_no_other(tmp_path, monkeypatch):
    write_text('former', str(tmp_path / 'args.yaml'))
    monkeypatch.setattr(timm_distill.checkpoint.file, 'flush', full)
    with pytest.raises(OSError):
        write_text('new', str(tmp_path / 'args.yaml'))
    assert os.listdir(tmp_path) == ['args.yaml'] and (tmp_path / 'args.yaml').read_text() == 'former'


@pytest.mark.skipif(os.name != 'posix', reason='limits the size of files')
def test_file_that_grows_beyond_its_limit_is_survived(tmp_path):
    import resource
    task, optimizer = create_task()
    saver = create_saver(tmp_path, task, optimizer)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        saver.save_checkpoint(0, metric=1.)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert 'File too large' in saver.unsaved and os.listdir(tmp_path) == []


def test_space_counts_names_of_the_same_file_once(tmp_path):
    (tmp_path / 'last').write_bytes(bytes(1500))
    os.link(tmp_path / 'last', tmp_path / 'best')
    text = describe_space(str(tmp_path), 2_000_000)
    assert 'takes 1.5 KB: best 1.5 KB.' in text and 'a checkpoint takes 2 MB' in text
    assert describe_space(str(tmp_path / 'none')).endswith('is gone.')


def test_run_whose_newest_summary_row_found_no_room_does_not_end_well(few_digits_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, 'write_text', full)
    with pytest.raises(LostStateError, match=r'summary\.csv lacks the newest.*No space left'):
        run(few_digits_dir, tmp_path, *FLAGS)
    assert {'hub', 'last.pth.tar'} <= set(os.listdir(tmp_path / 'run'))


def test_summary_row_that_finds_room_at_the_end_costs_nothing(tmp_path, monkeypatch):
    summary = trackers.Summary(str(tmp_path / 'summary.csv'))
    monkeypatch.setattr(trackers, 'write_text', full)
    summary.add({'epoch': 0, 'lr': 1.})
    assert summary.unwritten
    monkeypatch.undo()
    summary.write()
    assert not summary.unwritten and trackers.read_summary(summary.path) == [{'epoch': 0, 'lr': 1.}]


def test_leftovers_of_a_killed_run_make_room_before_a_resume_writes_anything(few_digits_dir, tmp_path, monkeypatch):
    folder = run(few_digits_dir, tmp_path, *FLAGS, '--stop-epoch', 1).output_dir
    for name in ('tmp.pth.tar', 'recovery_tmp.pth.tar'):
        with open(os.path.join(folder, name), 'wb') as file:
            file.write(bytes(1000))

    def write(text, path):
        return full() if [name for name in os.listdir(folder) if 'tmp' in name] else write_text(text, path)
    monkeypatch.setattr(timm_distill.run.recorder, 'write_text', write)
    assert run(few_digits_dir, tmp_path, *FLAGS, '--resume', 'auto').checkpoint


def test_finished_run_of_another_folder_leaves_nothing_to_train(few_digits_dir, tmp_path):
    result = run(few_digits_dir, tmp_path, *FLAGS[:2], '--epochs', 1, '--no-report')
    source = os.path.join(result.output_dir, 'last.pth.tar')
    with pytest.raises(UsageError, match='nothing is left to train.*--epochs'):
        run(few_digits_dir, tmp_path / 'other', *FLAGS[:2], '--epochs', 1, '--no-report', '--resume', source)
    assert not (tmp_path / 'other').exists()
    os.remove(os.path.join(result.output_dir, 'summary.csv'))
    assert run(few_digits_dir, tmp_path, *FLAGS[:2], '--epochs', 1, '--no-report', '--resume', 'auto').checkpoint
