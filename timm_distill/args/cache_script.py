"""Flags of `python -m timm_distill.cache`."""
import argparse

from ..utils.console import program_name


def create_cache_parser() -> argparse.ArgumentParser:
    """Parser of `python -m timm_distill.cache`; `fill` takes those of the training script, unknown to it."""
    parser = argparse.ArgumentParser(
        prog=program_name('python -m timm_distill.cache'),
        description='Cached targets of a teacher: fill them without training, show, verify and merge them')
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')
    commands.add_parser(
        'fill', help='let a teacher see all views that a cache lacks; takes the flags of train_distill.py, of which '
                     '--data-dir, --teacher, --teacher-cache, --kd and those of augmentation count')
    info = commands.add_parser('info', help='print what a cache holds and what it depends on')
    info.add_argument('folder', metavar='DIR', help='folder of the cache')
    verify = commands.add_parser('verify', help='read all rows and compare their checksums; exit code 1 on damage')
    verify.add_argument('folder', metavar='DIR', help='folder of the cache')
    verify.add_argument('--drop', action='store_true', help='take damaged shards out, to be filled again')
    merge = commands.add_parser('merge', help='add to a cache the views that others of the same have')
    merge.add_argument('folder', metavar='DIR', help='folder of the cache that grows; may be new')
    merge.add_argument('others', metavar='OTHER', nargs='+', help='folders of the other caches')
    return parser
