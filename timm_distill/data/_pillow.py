"""Augmentation policies on newer Pillow versions.

timm's policies posterize to as few as 0 bits, which gave a black image; from version 12 on Pillow raises, in the middle
of an epoch and under the most used policies (rand-m9-mstd0.5-inc1 among them).
"""
from contextlib import contextmanager
from typing import Any, Iterator

from PIL import Image
from timm.data import auto_augment


def posterize(img: Image.Image, bits_to_keep: int, **kwargs: Any) -> Image.Image:
    """Keep the highest bits of each channel, as timm does; none at all give a black image."""
    if bits_to_keep < 1:
        return Image.new(img.mode, img.size)
    return auto_augment.posterize(img, bits_to_keep, **kwargs)


@contextmanager
def posterize_to_black() -> Iterator[None]:
    """Let policies that are built inside use this module's `posterize`; those built elsewhere stay timm's."""
    operations = auto_augment.NAME_TO_OP
    originals = {name: op for name, op in operations.items() if op is auto_augment.posterize}
    operations.update(dict.fromkeys(originals, posterize))
    try:
        yield
    finally:
        operations.update(originals)
