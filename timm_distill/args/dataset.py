"""Flags of the dataset, its splits and how it is loaded."""
from .parser import ArgumentParser


def add_dataset_args(parser: ArgumentParser) -> None:
    # A positional has to be added to the parser itself, a group would list it twice.
    parser.add_argument('data', nargs='?', metavar='DIR', help='dataset folder (older form of --data-dir)')
    group = parser.add_topic('data', 'Dataset')
    group.add_argument('--data-dir', metavar='DIR',
                       help='dataset folder with one sub-folder per split and, in these, one per class')
    group.add_argument('--dataset', metavar='NAME', default='',
                       help='reader and dataset name such as hfds/NAME, wds/NAME, tfds/NAME or torch/NAME; '
                            'empty: class folders or tar files')
    group.add_argument('--dataset-download', action='store_true', default=False,
                       help='let torch/ and tfds/ datasets download what is missing')
    group.add_argument('--class-map', type=str, default='', metavar='FILENAME',
                       help='text file with one class folder name per line, in label order')
    group.add_argument('--input-img-mode', type=str, default=None,
                       help='PIL mode that images are converted to; None: RGB for 3 channels, else L')
    group.add_argument('--input-key', type=str, default=None, help='name of the image column or field')
    group.add_argument('--target-key', type=str, default=None, help='name of the label column or field')
    group.add_argument('--dataset-trust-remote-code', action='store_true', default=False,
                       help='let a Hugging Face dataset run the Python code that comes with it')


def add_train_split_args(parser: ArgumentParser) -> None:
    group = parser.add_topic('data', 'Splits')
    group.add_argument('--train-split', metavar='NAME', default='train', help='split to train on')
    group.add_argument('--val-split', metavar='NAME', default='validation',
                       help='split to validate on; an empty string trains without validation')
    group.add_argument('--train-num-samples', type=int, default=None, metavar='N',
                       help='size of the training split, for streamed datasets that do not know it')
    group.add_argument('--val-num-samples', type=int, default=None, metavar='N',
                       help='size of the validation split, for streamed datasets that do not know it')


def add_loader_args(parser: ArgumentParser) -> None:
    group = parser.add_topic('loading', 'Loading')
    group.add_argument('--seed', type=int, default=42, metavar='S', help='random seed')
    group.add_argument('-j', '--workers', type=int, default=4, metavar='N', help='loader processes')
    group.add_argument('--pin-mem', action='store_true', default=False, help='load into pinned memory')
    group.add_argument('--no-prefetcher', action='store_true', default=False,
                       help='normalise, erase and mix one step at a time, without timm\'s prefetcher')
