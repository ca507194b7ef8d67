"""Where nobody reads a script's output any more, it ends quietly."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
from kill_runs import start_program

from timm_distill.utils import console

REPO_DIR = Path(__file__).resolve().parent.parent.parent
# the file by itself, since importing the package takes seconds
LOAD = (
    "import importlib.util, sys\n"
    f"spec = importlib.util.spec_from_file_location('console', {console.__file__!r})\n"
    "console = importlib.util.module_from_spec(spec); spec.loader.exec_module(console)\n")


def run_with_a_reader_that_goes(argv: list) -> 'subprocess.CompletedProcess[str]':
    """Run a program whose standard output is closed after the first line; return code and stderr."""
    process = subprocess.Popen(
        [sys.executable, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPO_DIR)
    assert process.stdout is not None and process.stderr is not None
    line = process.stdout.readline()
    process.stdout.close()
    error = process.stderr.read()
    return subprocess.CompletedProcess(argv, process.wait(), line, error)


@pytest.mark.parametrize('main', [
    "def main():\n    [print('x' * 100) for i in range(10000)]\n    return 0",
    "def main():\n    [print('x' * 100) for i in range(10000)]\n    sys.exit(0)",
    "def main():\n    print('x', flush=True); import time; time.sleep(.5); print('y')\n    sys.exit(0)",
], ids=['print', 'exit', 'only_what_was_left_at_the_end'])
def test_a_closed_pipe_ends_a_script_without_a_word(main: str) -> None:
    result = run_with_a_reader_that_goes(['-c', f'{LOAD}{main}\nsys.exit(console.run_script(main))'])
    assert (result.returncode, result.stderr) == (console.EXIT_CLOSED_PIPE, '')


def test_another_broken_pipe_is_an_error_as_ever() -> None:
    main = (
        'def main():\n    raise BrokenPipeError("of a loader process")\n'
        "print('x', flush=True)\nsys.stdout = sys.__stderr__\n")
    result = run_with_a_reader_that_goes(['-c', f'{LOAD}{main}sys.exit(console.run_script(main))'])
    assert result.returncode == 1 and 'of a loader process' in result.stderr


def test_the_exit_code_of_a_script_is_its_own() -> None:
    assert console.run_script(lambda: 75) == 75
    with pytest.raises(SystemExit, match='2'):
        console.run_script(lambda: sys.exit(2))


def test_a_list_of_the_training_script_can_be_cut_by_head() -> None:
    result = run_with_a_reader_that_goes(['train_distill.py', '--list-kd'])
    assert result.stdout and result.stderr == ''


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='needs named pipes')
@pytest.mark.parametrize('argv', [
    [REPO_DIR / 'validate.py', '--help', 'all'], ['-m', 'timm_distill.export', '--help'],
], ids=lambda argv: argv[-2])
def test_help_can_be_cut_by_head(argv: list, tmp_path: Path) -> None:
    pipe, error = tmp_path / 'pipe', tmp_path / 'error'
    os.mkfifo(pipe)
    process = start_program(argv, pipe, error)
    with open(pipe) as file:
        assert file.readline()
    process.join()
    assert error.read_text() == ''
