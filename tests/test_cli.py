"""The command `timm-distill`: its commands, names in messages, and what happens before torch is imported."""
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import timm.utils
from kill_runs import start_program

import timm_distill_cli
from timm_distill import __version__, list_methods
from timm_distill.export import __main__ as export_script
from timm_distill.run import train_script, validate_script

REPO_DIR = Path(__file__).resolve().parent.parent
NO_TORCH = 'import sys; sys.modules["torch"] = None; import timm_distill_cli; sys.exit(timm_distill_cli.main())'


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """No handlers of logs that outlive the captured streams; the program's name as before."""
    monkeypatch.setattr(sys, 'argv', list(sys.argv))
    monkeypatch.setattr(timm.utils, 'setup_default_logging', lambda: None)
    monkeypatch.setattr(validate_script, 'setup_default_logging', lambda: None)
    monkeypatch.setattr(export_script, 'setup_default_logging', lambda: None)
    monkeypatch.setattr(timm_distill_cli, 'catch_early_signals', lambda program: None)


def run_process(*command: str) -> 'subprocess.CompletedProcess[str]':
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=REPO_DIR,
        env={**os.environ, 'PYTHONPATH': str(REPO_DIR)})


@pytest.mark.parametrize('argv, code, said', [
    (['--help'], 0, 'usage: timm-distill COMMAND'), (['trian'], 2, "no command 'trian'"), ([], 2, 'which command?')])
def test_help_and_wrong_commands_need_no_torch(argv: list, code: int, said: str) -> None:
    out = run_process('-c', NO_TORCH, *argv)
    assert out.returncode == code
    text = out.stderr if code else out.stdout
    assert said in text and all(name in text for name in timm_distill_cli.COMMANDS)
    assert not (out.stdout if code else out.stderr)


def test_list_prints_the_methods(capsys: pytest.CaptureFixture) -> None:
    assert timm_distill_cli.main(['list']) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in list_methods())


@pytest.mark.parametrize('argv', [
    ['train', '--kd', 'nothing', '--teacher', 'test_resnet', '--data-dir', 'DIR'],
    ['validate', '--checkpoint', 'missing.pth'],
    ['export', 'missing.pth'],
])
def test_messages_name_the_command_that_was_given(argv: list, capsys: pytest.CaptureFixture) -> None:
    assert timm_distill_cli.main(argv) == 2
    assert capsys.readouterr().err.startswith(f'timm-distill {argv[0]}: error: ')


@pytest.mark.parametrize('name', ['train', 'validate', 'export'])
def test_help_of_a_command_names_it(name: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        timm_distill_cli.main([name, '--help'])
    assert capsys.readouterr().out.startswith(f'usage: timm-distill {name} ')


def test_the_script_keeps_its_own_name(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, 'argv', ['/usr/bin/train_distill.py', '--kd', 'nothing', '--data-dir', 'DIR'])
    assert train_script.cli() == 2
    assert capsys.readouterr().err.startswith('train_distill.py: error: ')


@pytest.mark.parametrize('number, code', [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_signal_while_torch_is_imported_has_its_word_and_code(number: int, code: int) -> None:
    hook = (
        'import os, sys\nclass Finder:\n    def find_spec(self, name, path=None, target=None):\n'
        f'        if name == "torch": os.kill(os.getpid(), {int(number)})\n'
        'sys.meta_path.insert(0, Finder())\nimport timm_distill_cli\ntimm_distill_cli.main(["train"])\n')
    out = run_process('-c', hook)
    assert out.returncode == code
    assert out.stderr.startswith('timm-distill train: stopped') and 'nothing is saved yet' in out.stderr


def test_the_package_is_the_same_command(tmp_path: Path) -> None:
    process = start_program(['-m', 'timm_distill', '--help'], tmp_path / 'out', tmp_path / 'error')
    process.join()
    assert process.exitcode == 0 and (tmp_path / 'out').read_text().strip() == timm_distill_cli.usage()
    assert __version__.startswith('0.2')
