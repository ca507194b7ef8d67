"""Signals that ask a run to stop: SIGTERM and SIGUSR1 from a scheduler such as SLURM, SIGINT from Ctrl-C.

Where nothing of a run is to be saved, a signal ends it at once. While it trains a handler only notes the signal and the
training loop asks after each update, so that what is saved is a whole update, the same on every rank.
"""
import multiprocessing
import os
import signal
import threading
import time
from contextlib import contextmanager
from types import FrameType
from typing import Any, Dict, Iterator, List, Optional

import torch
import torch.distributed as dist

EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: try again later
EXIT_INTERRUPTED = 130  # what shells report for Ctrl-C
_NAMES = ('SIGINT', 'SIGTERM', 'SIGUSR1')
_NOTHING_SAVED = 'nothing is saved yet, start the same command again'
_PATIENCE = 10.  # seconds for code that a handler cannot interrupt, and for a batch; schedulers give some 30 and more


class StopRequested(BaseException):
    """A signal asked the run to stop. No `Exception`, so that whoever survives errors does not survive it.

    Attributes:
        number: The signal.
    """

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class LoaderStalled(StopRequested):
    """The signal came, and the batch that the loop waits for does not."""


def exit_code(number: int) -> int:
    """Return what a run exits with after a signal."""
    return EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_PREEMPTED


def _numbers() -> List[int]:
    return [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]  # Windows has no SIGUSR1


class StopSignals:
    """Receives stop signals while it is entered. A second Ctrl-C interrupts at once.

    A signal raises StopRequested where the main thread is; between `hold` and `let_go` it is noted instead. A process
    that no handler can interrupt (a library that waits in C++ for other processes) is ended after some seconds.

    Attributes:
        number: The newest signal, 0 for none.
        last_words: What is printed where the process has to be ended like that.
    """

    def __init__(self) -> None:
        self.number = 0
        self.last_words = _NOTHING_SAVED
        self._group: Any = None
        self._shared: Optional[torch.Tensor] = None
        self._work: Any = None
        self._pid = os.getpid()
        self._held = self._waiting = self._insisting = False
        self._previous: Dict[int, Any] = {}
        self._pipe: List[int] = []
        self._previous_fd = -1

    def __enter__(self) -> 'StopSignals':
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in _numbers()}
            if hasattr(signal, 'pthread_kill'):  # not Windows
                self._watch()
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
        if self._pipe:
            signal.set_wakeup_fd(self._previous_fd)
            os.close(self._pipe[1])  # ends the watching thread
            self._pipe = []

    def begin(self) -> None:
        """Begin a run, of which nothing is saved yet: act upon signals at once.

        Raises:
            StopRequested: For a signal that was noted.
        """
        self.last_words = _NOTHING_SAVED
        self.let_go()

    def share(self) -> None:
        """Let ranks agree on the update to stop at. All of them call this.

        They exchange a number in the background while the next update runs, so nobody waits.
        """
        self._group = dist.new_group(backend='gloo')

    def hold(self) -> None:
        """From now on note signals, for `poll`.

        Raises:
            StopRequested: For a signal that came before, where a library swallowed it.
        """
        if self.number and not self._held:
            raise StopRequested(self.number)
        self.note_only()

    def note_only(self) -> None:
        """From now on note signals, whatever came before."""
        self._held = True

    def let_go(self) -> None:
        """From now on act upon signals at once.

        Raises:
            StopRequested: For a signal that was noted.
        """
        self._held = False
        if self.number:
            raise StopRequested(self.number)

    def ignore(self) -> None:
        """Ignore signals to the end of the process: what it exits with is decided."""
        self.note_only()
        for number in self._previous:
            signal.signal(number, signal.SIG_IGN)
        self._previous = {}

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around waiting for a batch, which a loader's process may never bring.

        Raises:
            LoaderStalled: Some seconds after a signal, or where a signal ended the loader's process.
        """
        self._waiting = True
        try:
            yield
        except RuntimeError as e:  # torch's word for dead workers
            if self.number:
                raise LoaderStalled(self.number) from e
            raise
        finally:
            self._waiting = False

    def _note(self, number: int, frame: Optional[FrameType]) -> None:
        if os.getpid() != self._pid:
            return  # a forked process that has no handlers of its own yet
        if self._insisting:
            self._insisting = False
            if self._waiting:
                raise LoaderStalled(self.number)
            return
        previous, self.number = self.number, number
        if number == signal.SIGINT and previous == signal.SIGINT:
            raise KeyboardInterrupt
        if not self._held and not previous:
            raise StopRequested(number)

    def _watch(self) -> None:
        self._pipe = list(os.pipe())
        os.set_blocking(self._pipe[1], False)
        self._previous_fd = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        threading.Thread(target=self._insist, args=(self._pipe[0],), daemon=True).start()

    def _insist(self, pipe: int) -> None:
        """In a thread of its own: see to it that a signal has an effect."""
        received = os.read(pipe, 1)  # the wakeup descriptor: numbers of signals as they come in, nothing at the end
        while received and received[0] not in _numbers():
            received = os.read(pipe, 1)
        while received and self._previous:
            time.sleep(_PATIENCE)
            if self._previous and not self._held:
                self._end_process(received[0])
            if self._previous and self._waiting:
                self._insisting = True
                signal.pthread_kill(threading.main_thread().ident or 0, received[0])
        os.close(pipe)

    def _end_process(self, number: int) -> None:
        name = signal.Signals(number).name
        os.write(2, f'Stopped by {name} where it could not be interrupted: {self.last_words}.\n'.encode())
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(exit_code(number))

    def poll(self) -> int:
        """Return the signal that all ranks know of, 0 for none. Every rank calls this at the same updates."""
        if self._group is None:
            return self.number
        agreed = self._receive()
        self._shared = torch.tensor([self.number])
        self._work = dist.all_reduce(self._shared, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return agreed

    def settle(self) -> int:
        """Like `poll`, but waits for the signals of now: at the end of an epoch."""
        agreed = self.poll()
        return max(agreed, self._receive()) if self._group is not None else agreed

    def _receive(self) -> int:
        if self._work is None or self._shared is None:
            return 0
        self._work.wait()
        self._work = None
        return int(self._shared)


def end_child_processes() -> bool:
    """Kill loader processes that the end of this process would wait for; returns whether all are gone.

    One that is frozen reacts to nothing else.
    """
    if hasattr(signal, 'SIGCHLD') and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises for workers that die
    children = [child for child in multiprocessing.active_children() if child.daemon]
    for child in children:
        child.kill()
    for child in children:
        child.join(_PATIENCE / 10)
    return not any(child.is_alive() for child in children)
