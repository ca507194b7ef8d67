"""Flags of the dataset, its splits and how it is loaded."""
from .parser import ArgumentParser


def add_dataset_args(parser: ArgumentParser) -> None:
    # A positional has to be added to the parser itself, a group would list it twice.
    parser.add_argument('data', nargs='?', metavar='DIR', help='dataset folder (older form of --data-dir)')
    group = parser.add_topic('data', 'Dataset')
    group.add_argument(
        '--data-dir', metavar='DIR',
        help='dataset folder with one sub-folder per split and, in these, one per class; or images without labels')
    group.add_argument(
        '--dataset', metavar='NAME', default='',
        help='reader and dataset name such as hfds/NAME, wds/NAME, tfds/NAME or torch/NAME; '
             'empty: class folders or tar files')
    group.add_argument(
        '--dataset-download', action='store_true', default=False,
        help='let torch/ and tfds/ datasets download what is missing')
    group.add_argument(
        '--class-map', type=str, default='', metavar='FILENAME',
        help='text file with one class folder name per line, in label order')
    group.add_argument(
        '--input-img-mode', type=str, default=None,
        help='PIL mode that images are converted to; None: RGB for 3 channels, else L')
    group.add_argument('--input-key', type=str, default=None, help='name of the image column or field')
    group.add_argument('--target-key', type=str, default=None, help='name of the label column or field')
    group.add_argument(
        '--dataset-trust-remote-code', action='store_true', default=False,
        help='let a Hugging Face dataset run the Python code that comes with it')


def add_train_split_args(parser: ArgumentParser) -> None:
    group = parser.add_topic('data', 'Splits')
    group.add_argument('--train-split', metavar='NAME', default='train', help='split to train on')
    group.add_argument(
        '--val-split', metavar='NAME', default='validation',
        help='split to validate on, or the part of the training images to hold out for it, e.g. 0.05; an empty '
             'string trains without validation')
    group.add_argument(
        '--no-labels', action='store_true', default=False,
        help='take all images of the training split, nested at will, and no label: the methods of --kd say alone what '
             'is learnt. Found by itself where there are images, but no class folders')
    group.add_argument(
        '--train-num-samples', type=int, default=None, metavar='N',
        help='size of the training split, for streamed datasets that do not know it')
    group.add_argument(
        '--val-num-samples', type=int, default=None, metavar='N',
        help='size of the validation split, for streamed datasets that do not know it')


def add_loader_args(parser: ArgumentParser) -> None:
    group = parser.add_topic('loading', 'Loading')
    group.add_argument('--seed', type=int, default=42, metavar='S', help='random seed')
    group.add_argument('-j', '--workers', type=int, default=4, metavar='N', help='loader processes')
    group.add_argument(
        '--max-bad-images', type=int, default=0, metavar='N',
        help='unreadable training images per process that the next one may replace before the run stops')
    group.add_argument('--pin-mem', action='store_true', default=False, help='load into pinned memory')
    group.add_argument(
        '--no-prefetcher', action='store_true', default=False,
        help='normalise, erase and mix one step at a time, without timm\'s prefetcher')


def add_target_args(parser: ArgumentParser) -> None:
    group = parser.add_topic('data', 'Dataset')
    group.add_argument(
        '--task', type=str, default='classification', choices=['classification', 'multilabel'],
        help='one label per image, or any number of them (needs a --dataset with such targets)')
    group.add_argument(
        '--target-format', type=str, default='indices', choices=['indices', 'multihot'],
        help='multilabel: targets are lists of class indices, or vectors with one entry per class')
    group.add_argument(
        '--multilabel-threshold', type=float, default=0.5, metavar='P',
        help='multilabel: probability from which a label counts as predicted, for the F1 metrics')


def add_naflex_args(parser: ArgumentParser) -> None:
    group = parser.add_topic('naflex', 'NaFlex: images at their own aspect ratio, for naflexvit models')
    group.add_argument(
        '--naflex-loader', action='store_true', default=False,
        help='load patch sequences of varying length instead of images of one size')
    group.add_argument(
        '--naflex-max-seq-len', type=int, default=576, metavar='N',
        help='longest sequence in validation')


def add_train_naflex_args(parser: ArgumentParser) -> None:
    add_naflex_args(parser)
    group = parser.topics['naflex']
    group.add_argument(
        '--naflex-train-seq-lens', type=int, nargs='+', default=[128, 256, 576, 784, 1024],
        metavar='N', help='sequence lengths that training batches are drawn from')
    group.add_argument(
        '--naflex-patch-sizes', type=int, nargs='+', default=None, metavar='N',
        help='patch sizes that training batches are drawn from; None: the model\'s own')
    group.add_argument(
        '--naflex-patch-size-probs', type=float, nargs='+', default=None, metavar='P',
        help='probability of each of --naflex-patch-sizes; None: all alike')
    group.add_argument(
        '--naflex-loss-scale', type=str, default='linear', choices=['none', 'sqrt', 'linear'],
        help='how the loss of a batch grows with its size, which falls with the sequence length')
    group.add_argument(
        '--naflex-patchify-channels-first', action='store_true', default=False,
        help='order the values of a patch by channel, row, column, not row, column, channel')


def add_resolution_args(parser: ArgumentParser) -> None:
    group = parser.add_topic('sizes', 'Training at several image sizes')
    group.add_argument(
        '--train-img-sizes', type=int, nargs='+', default=None, metavar='N',
        help='image sizes that training batches are drawn from')
    group.add_argument(
        '--train-batch-sizes', type=int, nargs='+', default=None, metavar='N',
        help='batch size for each of --train-img-sizes; None: --batch-size for all')
    group.add_argument(
        '--train-size-probs', type=float, nargs='+', default=None, metavar='P',
        help='weight of each of --train-img-sizes; None: all alike')
    group.add_argument(
        '--train-size-schedule', type=str, default='constant', choices=['constant', 'progressive'],
        help='draw from all sizes throughout, or move from the first to the last')
    group.add_argument(
        '--train-size-schedule-spread', type=float, default=0.65, metavar='S',
        help='progressive: how far around the current size others are drawn, in steps of the list')
    group.add_argument(
        '--train-size-random-mix', type=float, default=0.1, metavar='P',
        help='progressive: part of the batches that may have any size')
    group.add_argument(
        '--train-batches-per-epoch', '--train-steps-per-epoch', type=int, default=None, metavar='N',
        help='batches of an epoch; None: as many as the images make on average')
    group.add_argument(
        '--variable-batch-loss-scale', type=str, default='none', choices=['none', 'sqrt', 'linear'],
        help='how the loss of a batch grows with its size')
