"""Signals that ask a run to stop: SIGTERM and SIGUSR1 from a scheduler such as SLURM, SIGINT from Ctrl-C.

A handler only notes the signal. The training loop asks after each update, so that what is saved is a whole update,
the same on every rank.
"""
import os
import signal
import threading
from types import FrameType
from typing import Any, Dict, List, Optional

import torch
import torch.distributed as dist

__all__ = ['EXIT_INTERRUPTED', 'EXIT_PREEMPTED', 'StopRequested', 'StopSignals', 'exit_code', 'outlive_stop_signals']

EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: try again later
EXIT_INTERRUPTED = 130  # what shells report for Ctrl-C
_NAMES = ('SIGINT', 'SIGTERM', 'SIGUSR1')


class StopRequested(Exception):
    """A run saved its state because a signal asked it to stop.

    Attributes:
        number: The signal.
    """

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


def exit_code(number: int) -> int:
    """Return what a run exits with after a signal."""
    return EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_PREEMPTED


def _numbers() -> List[int]:
    return [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]  # Windows has no SIGUSR1


class StopSignals:
    """Notes stop signals while it is entered. A second Ctrl-C interrupts at once.

    Args:
        distributed: Ranks agree on the update to stop at. They exchange a number in the background while the next
            update runs, so nobody waits.
    """

    def __init__(self, distributed: bool = False):
        self.number = 0
        self._group: Any = dist.new_group(backend='gloo') if distributed else None
        self._shared: Optional[torch.Tensor] = None
        self._work: Any = None
        self._previous: Dict[int, Any] = {}

    def __enter__(self) -> 'StopSignals':
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in _numbers()}
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Optional[FrameType]) -> None:
        if number == signal.SIGINT and self.number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number

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


def outlive_stop_signals() -> None:
    """Let a loader's worker process go on when its whole process group is told to stop; the main process decides.

    A SIGTERM that the main process sends still ends the worker.
    """
    for name in ('SIGINT', 'SIGUSR1'):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, 'sigwaitinfo'):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_wait_for_parent, args=(os.getppid(),), daemon=True).start()


def _wait_for_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
