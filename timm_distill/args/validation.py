"""Flags of the validation script alone."""
from .parser import ArgumentParser


def add_validate_args(parser: ArgumentParser) -> None:
    group = parser.add_topic('validation', 'Validation')
    group.add_argument('--checkpoint', type=str, default='', metavar='PATH', help='weights to evaluate')
    group.add_argument(
        '--use-ema', action='store_true', default=False,
        help='evaluate the checkpoint\'s moving average where it has one')
    group.add_argument('--split', metavar='NAME', default='validation', help='split to evaluate on')
    group.add_argument(
        '--knn', action='store_true', default=False,
        help='also classify by the nearest neighbours among the frozen features of --fit-split')
    group.add_argument(
        '--probe', action='store_true', default=False,
        help='also train a linear classifier on the frozen features of --fit-split')
    group.add_argument(
        '--fit-split', metavar='NAME', default='train',
        help='split that --knn and --probe learn from; empty, or where there is none: every other image of --split')
    group.add_argument(
        '--num-samples', type=int, default=None, metavar='N',
        help='size of the split, for streamed datasets that do not know it')
    group.add_argument(
        '--use-train-size', action='store_true', default=False,
        help='evaluate at the training size where the model also has a test size')
    group.add_argument(
        '--crop-mode', type=str, default=None, metavar='NAME',
        help='center, squash or border; None: the model\'s own')
    group.add_argument(
        '--crop-border-pixels', type=int, default=None, metavar='N',
        help='pixels to cut off around the image before anything else')
    group.add_argument(
        '--tf-preprocessing', action='store_true', default=False,
        help='decode and resize with TensorFlow, where it is installed')
    group.add_argument(
        '--test-pool', action='store_true', default=False,
        help='at sizes above the model\'s own, pool the predictions of all positions')
    group.add_argument(
        '--reparam', action='store_true', default=False,
        help='merge the branches of models that have a form for inference')
    group.add_argument('--num-gpu', type=int, default=1, metavar='N', help='GPUs to split each batch over')
    group.add_argument(
        '--real-labels', type=str, default='', metavar='FILENAME',
        help='JSON file with the reassessed labels of ImageNet (Beyer et al., 2020)')
    group.add_argument(
        '--valid-labels', type=str, default='', metavar='FILENAME',
        help='text file with the indices of the classes that occur, one per line; others are left out')
    group.add_argument(
        '--metrics-avg', type=str, default=None, choices=['micro', 'macro', 'weighted'],
        help='also report precision, recall and F1, averaged like this')
    group.add_argument(
        '--retry', action='store_true', default=False,
        help='try again with smaller batches where memory does not suffice')
    group.add_argument('--log-freq', type=int, default=10, metavar='N', help='batches between two log lines')
    group.add_argument('--results-file', type=str, default='', metavar='FILENAME', help='file for the results')
    group.add_argument('--results-format', type=str, default='csv', help='format of --results-file: csv or json')
