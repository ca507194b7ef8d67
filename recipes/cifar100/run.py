#!/usr/bin/env python
"""The papers' CIFAR-100 tables, a command each: trains a pair's teacher where it has not been, then the student.

    python recipes/cifar100/run.py norm resnet56-resnet20 --data-dir DIR
    python recipes/cifar100/run.py norm --data-dir DIR

The second one goes through all pairs of `table.yaml`. Other flags are those of `train_distill.py`: they go to every
run, the teacher's too, and win over the table's. The same command goes on after a stop; what is complete is not
trained again.
"""
import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import yaml

FOLDER = Path(__file__).resolve().parent
SCRIPT = FOLDER.parent.parent / 'train_distill.py'
TABLE: Dict[str, Any] = yaml.safe_load((FOLDER / 'table.yaml').read_text(encoding='utf-8'))


def networks(pair: str) -> Tuple[str, str]:
    """Return the timm architectures of a pair's teacher and student."""
    teacher, student = pair.split('-')
    return f'cifar_{teacher}', f'cifar_{student}'


def flags_of(method: str, pair: str, network: str) -> List[str]:
    """Return the flags of a method for a pair; those of the network win over the method's, those of the pair over both.

    Args:
        method: Key of the table's methods.
        pair: Key of its pairs.
        network: Architecture that is trained.
    """
    by_method = TABLE['networks'].get(network, {})
    values: Dict[str, Any] = {
        **TABLE['methods'][method].get('flags', {}), **by_method.get('*', {}), **by_method.get(method, {}),
        **TABLE['pairs'][pair].get('flags', {}).get(method, {})}
    parts: List[str] = []
    for name, value in values.items():
        parts += [f'--{name}', *map(str, value if isinstance(value, list) else [value])]
    return parts


def command(network: str, flags: Sequence[str], output: str, experiment: str) -> List[str]:
    """Return the command of one run that goes on where it stopped."""
    return [
        sys.executable, str(SCRIPT), '--config', str(FOLDER / 'template.yaml'), '--model', network, *flags, '--output',
        output, '--experiment', experiment, '--resume', 'auto']


def commands(method: str, pair: str, output: str, teacher_checkpoint: str = '') -> List[List[str]]:
    """Return the commands of a method for a pair, its teacher's training first.

    Args:
        method: Key of the table's methods.
        pair: Key of its pairs.
        output: Folder of all runs.
        teacher_checkpoint: Weights of the teacher that are there already.
    """
    teacher, student = networks(pair)
    trained = 'teacher-' + pair.split('-')[0]
    of_teacher = command(teacher, flags_of('teacher', pair, teacher), output, trained)
    if method == 'teacher':
        return [of_teacher]
    if method == 'alone':
        return [command(student, flags_of(method, pair, student), output, f'alone-{pair.split("-")[1]}')]
    weights = teacher_checkpoint or os.path.join(output, trained, 'last.pth.tar')
    flags = ['--teacher', teacher, '--teacher-checkpoint', weights, *flags_of(method, pair, student)]
    distilled = command(student, flags, output, f'{method}-{pair}')
    return [distilled] if teacher_checkpoint else [of_teacher, distilled]


def all_commands(method: str, pairs: Sequence[str], output: str, teacher_checkpoint: str = '') -> List[List[str]]:
    """Return the commands of a method for several pairs, each once."""
    unique: List[List[str]] = []
    for pair in pairs:
        unique += [c for c in commands(method, pair, output, teacher_checkpoint) if c not in unique]
    return unique


def parse(argv: Optional[Sequence[str]] = None) -> Tuple[argparse.Namespace, List[str]]:
    """Return the own arguments and the flags to pass on."""
    parser = argparse.ArgumentParser(
        description='Run the CIFAR-100 tables of the distillation papers.', allow_abbrev=False,
        epilog='All other flags are those of train_distill.py.')
    parser.add_argument('method', choices=list(TABLE['methods']), help='what to train')
    parser.add_argument('pair', nargs='?', choices=list(TABLE['pairs']), help='teacher-student; all pairs without it')
    parser.add_argument('--output', default='output/cifar100', metavar='DIR', help='folder of all runs')
    parser.add_argument('--teacher-checkpoint', default='', metavar='FILE', help='teacher that is trained already')
    parser.add_argument('--list', action='store_true', help='print commands and published figures, run nothing')
    args, others = parser.parse_known_args(argv)
    if args.teacher_checkpoint and (args.pair is None or args.method in ('teacher', 'alone')):
        parser.error('--teacher-checkpoint is the teacher of one pair and needs its name and a method with a teacher')
    given = [flag.split('=')[0] for flag in others]
    own = [flag for flag in ('--experiment', '--resume', '--config', '-c', '--model', '--student') if flag in given]
    if own:
        parser.error(f'{own[0]} is set by this script: change it in the command that --list prints')
    return args, others


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run or print the commands; return the first exit status that is not 0."""
    args, others = parse(argv)
    pairs = [args.pair] if args.pair else list(TABLE['pairs'])
    if args.list:
        for pair in pairs:
            figure = TABLE['pairs'][pair]['published'].get(args.method)
            print(f'# {pair}, published top-1: {"none" if figure is None else f"{figure:.2f}"}')
    for line in all_commands(args.method, pairs, args.output, args.teacher_checkpoint):
        print(shlex.join([*line, *others]), flush=True)
        status = 0 if args.list else subprocess.run([*line, *others]).returncode
        if status:
            return status if status > 0 else 128 - status
    return 0


if __name__ == '__main__':
    sys.exit(main())
