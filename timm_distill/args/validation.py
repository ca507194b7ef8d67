"""Flags of the validation script alone."""
from .parser import ArgumentParser


def add_validate_args(parser: ArgumentParser) -> None:
    group = parser.add_topic('validation', 'Validation')
    group.add_argument('--checkpoint', type=str, default='', metavar='PATH', help='weights to evaluate')
    group.add_argument('--use-ema', action='store_true', default=False,
                       help='evaluate the checkpoint\'s moving average where it has one')
    group.add_argument('--split', metavar='NAME', default='validation', help='split to evaluate on')
    group.add_argument('--num-samples', type=int, default=None, metavar='N',
                       help='size of the split, for streamed datasets that do not know it')
    group.add_argument('--use-train-size', action='store_true', default=False,
                       help='evaluate at the training size where the model also has a test size')
    group.add_argument('--crop-mode', type=str, default=None, metavar='NAME',
                       help='center, squash or border; None: the model\'s own')
    group.add_argument('--test-pool', action='store_true', default=False,
                       help='at sizes above the model\'s own, pool the predictions of all positions')
    group.add_argument('--log-freq', type=int, default=10, metavar='N', help='batches between two log lines')
    group.add_argument('--results-file', type=str, default='', metavar='FILENAME', help='file for the results')
    group.add_argument('--results-format', type=str, default='csv', help='format of --results-file: csv or json')
