"""Command line `timm-distill train|validate|export|list`.

Stands outside of the package because that imports torch, which takes seconds: help and wrong commands need not wait for
it, and a signal that comes meanwhile ends a training run with its own exit code.
"""
import importlib
import os
import signal
import sys
from importlib import metadata
from typing import Callable, Dict, List, NamedTuple, Optional


class Command(NamedTuple):
    """A command of `timm-distill`.

    Attributes:
        function: Module and name of the function that runs it on `sys.argv`.
        description: One line of help.
        flags: Flags that stand before those of the user.
    """
    function: str
    description: str
    flags: List[str] = []


COMMANDS: Dict[str, Command] = {
    'train': Command('timm_distill.run.train_script:cli', 'train a timm model, alone or distilled (train_distill.py)'),
    'validate': Command('timm_distill.run.validate_script:main', 'evaluate models and checkpoints (validate.py)'),
    'export': Command('timm_distill.export.__main__:cli', 'write a checkpoint as hub folder, plain weights or ONNX'),
    'list': Command(
        'timm_distill.run.train_script:cli', 'print the methods of --kd, their options and papers', ['--list-kd']),
}


def catch_early_signals(program: str) -> None:
    """From now on end the process with the exit codes of a run that has saved nothing, until the run says otherwise."""
    def _stop(number: int, frame: object) -> None:
        os.write(2, f'{program}: stopped by a signal: nothing is saved yet, start the same command again.\n'.encode())
        os._exit(130 if number == signal.SIGINT else 75)

    for name in ('SIGINT', 'SIGTERM', 'SIGUSR1'):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _stop)


def usage() -> str:
    """Return the help of `timm-distill` itself."""
    lines = [f'  {name:10}{command.description}' for name, command in COMMANDS.items()]
    head, tail = 'usage: timm-distill COMMAND [FLAG ...]', 'timm-distill COMMAND --help has the flags.'
    return '\n'.join([head, '', *lines, '', tail])


def main(argv: Optional[List[str]] = None) -> int:
    """Run a command; return its exit code, 2 where there is no such command.

    Args:
        argv: Command and flags; those of the command line if None.
    """
    argv = sys.argv[1:] if argv is None else argv
    name = argv[0] if argv else ''
    if name in ('-h', '--help'):
        print(usage())
        return 0
    if name == '--version':
        print(metadata.version('timm_distill'))
        return 0
    if name not in COMMANDS:
        problem = f"no command '{name}'" if name else 'which command?'
        print(f'timm-distill: error: {problem}: choose one of {", ".join(COMMANDS)}\n\n{usage()}', file=sys.stderr)
        return 2
    program = f'timm-distill {name}'
    if name == 'train':
        catch_early_signals(program)
    sys.argv = [program, *COMMANDS[name].flags, *argv[1:]]  # what parsers and messages call the program
    module, _, function = COMMANDS[name].function.partition(':')
    run: Callable[[], int] = getattr(importlib.import_module(module), function)
    return importlib.import_module('timm_distill.utils.console').run_script(run)


if __name__ == '__main__':
    sys.exit(main())
