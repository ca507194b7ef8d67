"""Reading images of class folders and tar files, so that a file that cannot be read is not replaced unnoticed."""
import logging
import multiprocessing
import struct
import zlib
from typing import Any, Tuple

from PIL import Image, UnidentifiedImageError
from timm.data import ImageDataset

from ..errors import UsageError

_logger = logging.getLogger(__name__)

# All that PIL is known to raise on damaged or foreign files.
_DECODE_ERRORS = (
    OSError, EOFError, SyntaxError, ValueError, IndexError, struct.error, zlib.error, Image.DecompressionBombError)


class StrictImageDataset(ImageDataset):
    """An `ImageDataset` that stops at an unreadable file, where timm goes on with the next image in its place.

    Args:
        dataset: Dataset to take over; its reader and settings are shared.
        max_bad: How many different files may be replaced by the next readable one, with a warning, before it stops.
            Loader processes count together, ranks each for themselves.
    """

    def __init__(self, dataset: ImageDataset, max_bad: int = 0):
        super().__init__(
            root=None,
            reader=dataset.reader,
            load_bytes=dataset.load_bytes,
            input_img_mode=dataset.input_img_mode,
            transform=dataset.transform,
            target_transform=dataset.target_transform,
            additional_features=dataset.additional_features,
        )
        self.max_bad = max_bad
        # shared with loader processes; one byte per image tells a file seen again from another one
        self._is_bad = multiprocessing.Array('b', len(self.reader) if max_bad else 0)

    @property
    def num_bad(self) -> int:
        """How many different files could not be read so far."""
        return sum(self._is_bad[:])

    def __getitem__(self, index: int) -> Tuple[Any, ...]:
        img, target, features = self._read_or_replace(index)
        if self.transform is not None:
            img = self.transform(img)
        if target is None:
            target = -1
        elif self.target_transform is not None:
            target = self.target_transform(target)
        return (img, target) if self.additional_features is None else (img, target, *features)

    def _read_or_replace(self, index: int) -> Tuple[Any, Any, list]:
        while True:
            try:
                return self._read(index)
            except UsageError as error:
                self._count(index, error)
                index = (index + 1) % len(self.reader)

    def _count(self, index: int, error: UsageError) -> None:
        """Note an unreadable file; raises where there are too many."""
        if not self.max_bad:
            raise error
        with self._is_bad.get_lock():
            is_new = not self._is_bad[index]
            self._is_bad[index] = 1
            count = self.num_bad if is_new else 0
        if count > self.max_bad:
            raise UsageError(f'{error}. That is one more unreadable image than --max-bad-images {self.max_bad} allows.')
        if is_new:
            _logger.warning(f'{error}. The next image takes its place ({count} of at most {self.max_bad}).')

    def _read(self, index: int) -> Tuple[Any, Any, list]:
        try:
            file, target, *features = self.reader[index]
            if self.load_bytes:
                return file.read(), target, features
            img: Image.Image = Image.open(file)
            if self.input_img_mode:
                img = img.convert(self.input_img_mode)
            img.load()  # pixels are decoded here, so that a truncated file fails here
            return img, target, features
        except _DECODE_ERRORS as error:
            is_foreign = isinstance(error, UnidentifiedImageError)
            reason = 'not an image of a known format' if is_foreign else ' '.join(str(error).split())
            raise UsageError(
                f'cannot read image {self.filename(index, absolute=True)}: {reason}; repair or remove it') from error


def user_message(error: UsageError) -> str:
    """One line to print for an error, also for one from a loader's worker process.

    Torch raises a worker's exception again in the main process, with the worker's whole traceback as its text.
    """
    return str(error).strip().split(f'{UsageError.__name__}: ')[-1]
