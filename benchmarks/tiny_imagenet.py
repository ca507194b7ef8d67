#!/usr/bin/env python
"""Class folders of Tiny ImageNet, from the folder as it is published.

    python benchmarks/tiny_imagenet.py tiny-imagenet-200 --output data/tiny_imagenet

The published folder has an extra level below each training class, lists of boxes between the images, and its
validation images in one folder with a list of their classes. The class folders hold hard links where the file system
has them, else copies.
"""
import argparse
import os
import shutil
import sys
from typing import Iterator, Optional, Sequence, Tuple

from timm_distill import UsageError

NUM_CLASSES, TRAIN_IMAGES, VALIDATION_IMAGES = 200, 100_000, 10_000


def find_images(source: str) -> Iterator[Tuple[str, str, str]]:
    """Yield split, class and path of every labelled image.

    Raises:
        UsageError: If this is not the published folder.
    """
    train, listing = os.path.join(source, 'train'), os.path.join(source, 'val', 'val_annotations.txt')
    for path in (train, listing):
        if not os.path.exists(path):
            raise UsageError(f'{source} is not the published folder tiny-imagenet-200: {path} is missing.')
    for name in sorted(os.listdir(train)):
        images = os.path.join(train, name, 'images')
        for file in sorted(os.listdir(images)):
            yield 'train', name, os.path.join(images, file)
    with open(listing, encoding='utf-8') as f:
        for line in f:
            file, name = line.split('\t')[:2]
            yield 'validation', name, os.path.join(source, 'val', 'images', file)


def link_images(source: str, output: str) -> None:
    """Write the class folders.

    Raises:
        UsageError: If images or classes are missing; then nothing is written.
    """
    images = [image for image in find_images(source) if image[2].endswith('.JPEG')]
    splits = [split for split, _, _ in images]
    found = (len({name for _, name, _ in images}), splits.count('train'), splits.count('validation'))
    expected = (NUM_CLASSES, TRAIN_IMAGES, VALIDATION_IMAGES)
    if found != expected:
        raise UsageError(f'{source} has classes, training and validation images {found}, published are {expected}.')
    for split, name, path in images:
        folder = os.path.join(output, split, name)
        os.makedirs(folder, exist_ok=True)
        target = os.path.join(folder, os.path.basename(path))
        if os.path.exists(target):
            continue
        try:
            os.link(path, target)
        except OSError:
            shutil.copyfile(path, target)
    print(f'{output}: {found[0]} classes, {found[1]} training and {found[2]} validation images.')


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', metavar='tiny-imagenet-200', help='the published folder')
    parser.add_argument('--output', default='data/tiny_imagenet', help='folder of the class folders')
    args = parser.parse_args(argv)
    try:
        link_images(args.source, args.output)
    except UsageError as e:
        print(f'tiny_imagenet.py: error: {e}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
