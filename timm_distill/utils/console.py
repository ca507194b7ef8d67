"""What a script does where its output is no longer read, as in `train_distill.py --list-kd | head`."""
import os
import select
import sys
from typing import Callable

__all__ = ['EXIT_CLOSED_PIPE', 'run_script']

EXIT_CLOSED_PIPE = 141  # what shells report for other tools: 128 + SIGPIPE


def run_script(main: Callable[[], int]) -> int:
    """Run a script's main function and return its exit code; a reader that has gone ends it without a traceback.

    Raises:
        BrokenPipeError: If another pipe than the standard output is broken.
    """
    try:
        try:
            return main()
        finally:
            sys.stdout.flush()  # SystemExit of `--help` too: the interpreter's own flush would complain
    except BrokenPipeError:
        if not _is_closed(sys.stdout.fileno()):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still in the buffer
        return EXIT_CLOSED_PIPE


def _is_closed(handle: int) -> bool:
    """Whether nobody reads a pipe any more; asked of the pipe itself, as loader processes have pipes too."""
    if not hasattr(select, 'poll'):  # Windows
        return True
    poll = select.poll()
    poll.register(handle, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
