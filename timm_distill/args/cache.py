"""Flags of cached targets of the teacher."""
from .parser import ArgumentParser


def add_cache_args(parser: ArgumentParser) -> None:
    group = parser.add_topic(
        'cache', 'Cached targets of the teacher',
        'What a teacher says of replayed views: the first run stores it as it trains, later ones read it.')
    group.add_argument(
        '--teacher-cache', metavar='DIR', default='',
        help='folder of cached targets, or hf://datasets/NAME to read them from the hub; views that are not in it '
             'are filled with --teacher, which a run that finds all of them need not have')
    group.add_argument(
        '--cache-views', type=int, default=None, metavar='N',
        help='views of each image; later epochs see the first ones again; None: those of the cache, 10 in a new one')
    group.add_argument(
        '--cache-topk', type=int, default=None, metavar='K',
        help='logits stored of each view, with the mass of the others; 0: all; None: as the cache has them, in a new '
             'one 10 where the methods read a softmax alone')
    group.add_argument(
        '--cache-precision', type=str, default=None, choices=['float16', 'int8'],
        help='form of stored features, int8 with a scale per channel; None: that of the cache, float16 in a new one')
    group.add_argument(
        '--cache-check', type=int, default=0, metavar='N',
        help='views of each epoch that the teacher recomputes; another result stops the run. Needs --teacher')
