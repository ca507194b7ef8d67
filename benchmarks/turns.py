"""Training scripts as processes that take turns: all but one are stopped, with their loaders' workers.

Built once, they can be compared in the same minute and still each has the whole machine. The clock is this process's,
read when a progress line arrives, the same for every script, whatever the script's own line says.
"""
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from typing import Dict, List, Sequence, Tuple

_PROGRESS = re.compile(r'Train: \d+ \[\s*(\d+)/')
_PATIENCE = 600.  # seconds to wait for a line


class ScriptProcess:
    """A training script that runs until its first progress line, and then only in its turns.

    Args:
        command: Script and flags, for this Python. Progress lines must have the form of timm's.
        env: More environment variables.
    """

    def __init__(self, command: Sequence[str], env: Dict[str, str]):
        self.lines: List[str] = []
        self.goal = self.newest = 0  # index of the update to stop at, and of the one that was reached
        self.reached: queue.Queue[Tuple[int, float]] = queue.Queue()
        self.process = subprocess.Popen(
            [sys.executable, '-u', *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **env},
            start_new_session=True,  # a group of its own, to be stopped with its workers
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            found = _PROGRESS.search(line)
            if found and int(found.group(1)) >= self.goal:
                when = time.perf_counter()
                self._signal(signal.SIGSTOP)  # here, so that no other script's turn is waited for
                self.reached.put((int(found.group(1)), when))
        self.reached.put((-1, 0.))

    def wait(self) -> float:
        """Wait until the goal of this turn is reached and the script stopped; return when."""
        while True:
            self.newest, when = self.reached.get(timeout=_PATIENCE)
            if self.newest < 0:
                raise RuntimeError('The script ended early:\n' + ''.join(self.lines[-20:]))
            if self.newest >= self.goal:  # not a line of the turn before, written until the stop took effect
                return when

    def turn(self, updates: int) -> float:
        """Run until a progress line at least `updates` after the newest one; return seconds per update."""
        while not self.reached.empty() and self.reached.queue[0][0] >= 0:
            self.newest, _ = self.reached.get()
        first, self.goal = self.newest, self.newest + updates
        start = time.perf_counter()
        self._signal(signal.SIGCONT)
        return (self.wait() - start) / (self.newest - first)

    def close(self) -> None:
        """End the script."""
        for name in (signal.SIGTERM, signal.SIGCONT):
            self._signal(name)
        self.process.wait(_PATIENCE)

    def _signal(self, which: signal.Signals) -> None:
        try:
            os.killpg(self.process.pid, which)
        except ProcessLookupError:
            pass


def take_turns(
        commands: Dict[str, Sequence[str]],
        env: Dict[str, str],
        turns: int,
        updates: int,
        warmup: int,
) -> Dict[str, List[float]]:
    """Return the seconds per update of each command's turns.

    Args:
        commands: Script and flags by name.
        env: More environment variables for all.
        turns: How many turns each has.
        updates: Updates in a turn; the scripts' --log-interval.
        warmup: Updates at least before the first turn, which do not count.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit('terminated'))  # so that the scripts are ended too
    processes: Dict[str, ScriptProcess] = {}
    seconds: Dict[str, List[float]] = {name: [] for name in commands}
    try:
        for name, command in commands.items():
            processes[name] = ScriptProcess(command, env)
            processes[name].wait()  # one after the other: their threads would wait for each other
        for process in processes.values():
            process.turn(warmup)
        for _ in range(turns):
            for name, process in processes.items():
                seconds[name].append(process.turn(updates))
    finally:
        for process in processes.values():
            process.close()
    return seconds
