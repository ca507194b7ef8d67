"""A signal ends a run with a word and a code of its own from its first line to its last."""
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from test_train_distill import TEACHER, run

import train_distill
from timm_distill.run import epochs, prepare, stopping, train_script
from timm_distill.run import report as closing
from timm_distill.run.stopping import LoaderStalled, StopRequested, StopSignals

pytestmark = pytest.mark.skipif(not hasattr(signal, 'pthread_kill'), reason='sends signals')
SCRIPT = Path(train_distill.__file__)


def send(number=signal.SIGTERM, delay=0.):
    if delay:
        threading.Timer(delay, os.kill, (os.getpid(), number)).start()
    else:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signal_acts_at_once_until_there_is_something_to_save(number):
    with StopSignals() as signals, pytest.raises(StopRequested) as stop:
        send(number)
    assert stop.value.number == number == signals.number
    assert not isinstance(stop.value, Exception)  # what survives errors does not survive it


def test_signal_is_noted_while_something_is_to_be_saved():
    with StopSignals() as signals:
        signals.hold()
        send()
        assert signals.poll() == signal.SIGTERM
        with pytest.raises(StopRequested):
            signals.let_go()


def test_signal_that_a_library_swallowed_acts_later():
    with StopSignals() as signals:
        try:
            send()
        except BaseException:
            pass
        with pytest.raises(StopRequested):
            signals.hold()


def test_second_interrupt_interrupts_at_once():
    with StopSignals() as signals:
        signals.hold()
        send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_batch_that_never_comes_does_not_block_a_signal(monkeypatch):
    monkeypatch.setattr(stopping, '_PATIENCE', 0.1)
    with StopSignals() as signals:
        signals.hold()
        send(delay=0.1)
        with pytest.raises(LoaderStalled), signals.waiting():
            threading.Event().wait(30)
    assert signals.number == signal.SIGTERM


def test_worker_that_died_of_the_same_signal_is_no_error():
    with StopSignals() as signals:
        signals.hold()
        with pytest.raises(RuntimeError), signals.waiting():
            raise RuntimeError('DataLoader worker (pid 1) is killed by signal: Terminated.')
        send()
        with pytest.raises(LoaderStalled), signals.waiting():
            raise RuntimeError('DataLoader worker (pid 1) is killed by signal: Terminated.')


def test_process_that_no_handler_can_interrupt_is_ended(monkeypatch, capfd):
    codes = []
    monkeypatch.setattr(stopping, '_PATIENCE', 0.1)
    monkeypatch.setattr(stopping.os, '_exit', codes.append)
    with StopSignals():
        with pytest.raises(StopRequested):
            send()
        deadline = time.monotonic() + 30
        while not codes and time.monotonic() < deadline:
            time.sleep(0.01)
    assert codes[0] == 75
    assert 'nothing is saved yet' in capfd.readouterr().err


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(before[1])
    with StopSignals():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    after = signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(after[1])
    assert after == before


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='forks')
def test_forked_process_without_handlers_of_its_own_lives_on():
    with StopSignals():
        child = os.fork()
        if child == 0:
            send()
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


@pytest.mark.parametrize('number, code', [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_signal_while_torch_is_imported_has_its_word_and_code(number, code):
    # a module that is imported before torch stands for the time the imports take
    lines = f'import os, runpy, sys; sys.modules["argparse"] = None\nsys.argv = [{str(SCRIPT)!r}]\n'
    hook = (
        'class Finder:\n    def find_spec(self, name, path=None, target=None):\n'
        f'        if name == "timm": os.kill(os.getpid(), {int(number)})\n'
        'sys.meta_path.insert(0, Finder())\ndel sys.modules["argparse"]\n')
    out = subprocess.run(
        [sys.executable, '-c', lines + hook + f'runpy.run_path({str(SCRIPT)!r}, run_name="__main__")'],
        capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(SCRIPT.parent)})
    assert out.returncode == code
    assert 'nothing is saved yet' in out.stderr and 'Traceback' not in out.stderr


@pytest.mark.parametrize('phase', [
    'build_run', 'prepare_run', 'report_teacher', 'prepare_class_means', 'resume', 'prepare_for_device'])
def test_signal_while_a_run_is_built_leaves_nothing(few_digits_dir, tmp_path, monkeypatch, phase):
    module = train_script if phase in ('build_run', 'prepare_run') else prepare
    original = getattr(module, phase)
    monkeypatch.setattr(module, phase, lambda *args: (send(), original(*args))[1])
    with pytest.raises(StopRequested):
        run(few_digits_dir, tmp_path / 'out', '--model', TEACHER, '--epochs', 1)
    assert not os.path.exists(tmp_path / 'out' / 'run')


def test_signal_behind_the_last_epoch_is_told_and_the_next_start_finishes(
        few_digits_dir, tmp_path, monkeypatch, caplog):
    flags = ['--model', TEACHER, '--epochs', 1, '--no-report']
    monkeypatch.setattr(closing, 'write_run_report', lambda *args: send())
    result = run(few_digits_dir, tmp_path, *flags)
    assert result.stopped_by == signal.SIGTERM
    assert 'all epochs are trained and saved' in caplog.text and '--resume auto' in caplog.text
    assert not os.path.exists(tmp_path / 'run' / 'hub')
    monkeypatch.undo()
    result = run(few_digits_dir, tmp_path, *flags, '--resume', 'auto')
    assert not result.stopped_by and os.path.exists(tmp_path / 'run' / 'hub' / 'config.json')


def test_signal_ends_validation_and_the_run_goes_on_as_if_never_stopped(few_digits_dir, tmp_path, monkeypatch):
    flags = ['--model', TEACHER, '--epochs', 2, '--drop', '0.2', '--no-report']
    whole = run(few_digits_dir, tmp_path, *flags, experiment='whole')
    original = epochs.validate_student
    monkeypatch.setattr(epochs, 'validate_student', lambda *args: (send(), original(*args))[1])
    stopped = run(few_digits_dir, tmp_path, *flags, experiment='stopped')
    assert stopped.stopped_by and [name for name in os.listdir(stopped.output_dir) if 'recovery-0' in name]
    monkeypatch.undo()
    run(few_digits_dir, tmp_path, *flags, '--resume', 'auto', experiment='stopped')
    rows = [Path(folder, 'summary.csv').read_text() for folder in (whole.output_dir, stopped.output_dir)]
    assert rows[0] == rows[1]
