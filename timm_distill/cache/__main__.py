"""Cached targets from the command line.

    python -m timm_distill.cache fill --data-dir DIR --teacher resnet50 --kd kd --teacher-cache cache --cache-views 10
"""
import sys
from typing import Optional, Sequence

from timm.utils import setup_default_logging

from ..args.cache_script import create_cache_parser
from ..data import user_message
from ..errors import UsageError
from ..run.fill_cache import fill_cache
from ..utils.console import program_name, run_script
from .maintenance import describe_cache, merge_caches, verify_cache


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run from the command line; returns 1 where `verify` found damage.

    Raises:
        UsageError: For anything that the user can put right.
    """
    parser = create_cache_parser()
    args, flags = parser.parse_known_args(argv)
    if flags and args.command != 'fill':
        parser.error(f'unrecognized arguments: {" ".join(flags)}')
    if args.command == 'fill':
        print(f'{fill_cache(flags)} views added by this process')
    elif args.command == 'info':
        print('\n'.join(describe_cache(args.folder)))
    elif args.command == 'merge':
        for name, count in merge_caches(args.folder, args.others).items():
            print(f'{name}: {count} views added')
    else:
        damaged = verify_cache(args.folder, args.drop)
        for name, paths in damaged.items():
            words = ', '.join(paths) + (' taken out' if args.drop else ' damaged') if paths else 'whole'
            print(f'{name}: {words}')
        return int(any(damaged.values()))
    return 0


def cli() -> int:
    """Run from the command line: 0 on success, 1 for damaged shards, 2 for what the user can put right."""
    setup_default_logging()
    try:
        return main()
    except UsageError as e:
        print(f'{program_name("timm_distill.cache")}: error: {user_message(e)}', file=sys.stderr)
        return 2


if __name__ == '__main__':
    sys.exit(run_script(cli))
