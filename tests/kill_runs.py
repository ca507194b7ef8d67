"""Programs that tests start and kill; imported by a fork server, so that a process starts without importing torch.

Processes come from multiprocessing's fork server, which has loaded everything once and runs nothing itself.
"""
import contextlib
import multiprocessing
import os
import runpy
import signal
import socket
import sys
from typing import Any, List, Optional, Sequence

import train_distill
from timm_distill.checkpoint import file as storage
from timm_distill.checkpoint import run_files, saver
from timm_distill.run import recorder

# Moments that a random time hardly meets: what runs before the process kills itself.
MOMENTS = ('inside a file', 'before the name', 'behind the name', 'inside the summary')


def start_method() -> Any:
    """Return a multiprocessing context whose processes start within a fraction of a second."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['train_distill', 'kill_runs'])
    return context


def warm_up() -> None:
    """Start the fork server, so that the first run is as fast as the others."""
    process = start_method().Process(target=_nothing)
    process.start()
    process.join()


def _nothing() -> None:
    pass


def _die(*args: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _die_at(moment: str, count: int) -> None:
    """Let the process kill itself when it has come to a moment `count` times."""
    left = [count]

    def _reached() -> bool:
        left[0] -= 1
        return left[0] == 0

    if moment == 'inside a file':
        write = storage._WatchedFile.write

        def write_and_die(self: Any, data: Any) -> int:
            if len(data) > 1000 and _reached():
                write(self, bytes(data)[:500])
                self.file.flush()
                _die()
            return write(self, data)
        storage._WatchedFile.write = write_and_die  # type: ignore[method-assign]
    elif moment in ('before the name', 'behind the name'):
        put = storage.put_in_place

        def put_and_die(source: str, target: str) -> None:
            reached = _reached()
            if reached and moment == 'before the name':
                _die()
            put(source, target)
            if reached:
                _die()
        saver.put_in_place = run_files.put_in_place = put_and_die
    else:
        summarize = recorder.Recorder.summarize

        def summarize_and_die(self: Any, *args: Any) -> None:
            summarize(self, *args)
            if _reached():
                _die()
        recorder.Recorder.summarize = summarize_and_die  # type: ignore[method-assign]


def run(argv: Sequence[str], rank: int, world_size: int, port: int, moment: str, count: int, log: str) -> None:
    """Train in this process, as one rank; its output goes to a file."""
    multiprocessing.set_start_method('fork', force=True)  # loader processes need not import torch either
    if world_size > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR='127.0.0.1',
            MASTER_PORT=str(port))
    with open(log, 'a') as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if moment and rank == 0:
        _die_at(moment, count)
    sys.argv = ['train_distill.py', *argv]
    sys.exit(train_distill.cli())


def _run_program(argv: Sequence[str], stdout: str, stderr: str) -> None:
    multiprocessing.set_start_method('fork', force=True)
    for path, handle in ((stdout, 1), (stderr, 2)):
        with open(path, 'ab') as file:
            os.dup2(file.fileno(), handle)
    if argv[0] == '-m':
        sys.argv = list(argv[1:])
        runpy.run_module(argv[1], run_name='__main__', alter_sys=True)
    else:
        sys.argv = list(argv)
        sys.path.insert(0, os.path.dirname(os.path.abspath(argv[0])))  # as the interpreter does
        runpy.run_path(argv[0], run_name='__main__')


def start_program(argv: Sequence[str], stdout: str, stderr: str) -> Any:
    """Start what `python ARGV` does, without importing torch again.

    Args:
        argv: A file or `-m` and a module, and its flags.
        stdout: File or named pipe that its output is appended to.
        stderr: Likewise.
    """
    process = start_method().Process(target=_run_program, args=(list(map(str, argv)), str(stdout), str(stderr)))
    process.start()
    return process


def free_port() -> int:
    """Return a port that nothing listens on."""
    with contextlib.closing(socket.socket()) as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


class Launch:
    """The processes of one attempt.

    Args:
        argv: Flags of the training script.
        log: File for what they print.
        world_size: Number of ranks.
        moment: One of MOMENTS, where rank 0 kills itself; '' for none.
        count: The how manyth time it comes there.
    """

    def __init__(self, argv: Sequence[str], log: str, world_size: int = 1, moment: str = '', count: int = 1):
        context, port = start_method(), free_port()
        self.processes: List[Any] = [
            context.Process(target=run, args=(list(map(str, argv)), rank, world_size, port, moment, count, log))
            for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()

    def wait(self, seconds: Optional[float] = None) -> Optional[int]:
        """Wait for the first rank; returns its exit code, None where the time is up. A dead rank takes all along."""
        self.processes[0].join(seconds)
        code = self.processes[0].exitcode
        if code:
            self.send(signal.SIGKILL)  # the others may wait for it for ever
        if code is not None:
            for process in self.processes:
                process.join()
        return code

    def send(self, number: int) -> None:
        """Send all ranks a signal."""
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, number)


class ScriptProcess:
    """The training script in place of the `subprocess.Popen` of one that starts it, without importing torch again.

    Args:
        command: Interpreter, script and flags.
        stdout: File that its output is appended to.
        others: What the fork server gives all its processes alike.
    """

    def __init__(self, command: Sequence[str], stdout: Any, **others: Any):
        self._launch = Launch(command[2:], stdout.name)

    def send_signal(self, number: int) -> None:
        self._launch.send(number)

    def wait(self) -> Optional[int]:
        return self._launch.wait()
