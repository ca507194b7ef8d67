"""Scripts on a console: their names, and their end where the output is no longer read, as in `--list-kd | head`."""
import os
import select
import sys
from typing import Callable

__all__ = ['EXIT_CLOSED_PIPE', 'program_name', 'run_script']

EXIT_CLOSED_PIPE = 141  # what shells report for other tools: 128 + SIGPIPE


def program_name(script: str) -> str:
    """Return what a user calls to run a script: the script, or the command of `timm-distill` that it was started by."""
    name = os.path.basename(sys.argv[0])
    return name if name.startswith('timm-distill ') else script


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
