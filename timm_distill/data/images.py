"""Images of class folders and tar files, read so that an unreadable file is not replaced unnoticed."""
import logging
import multiprocessing
from typing import Any, Iterator, Optional, Tuple

from timm.data import ImageDataset, IterableImageDataset

from ..errors import UsageError
from .decoding import ImageDecoder, check_regular_file, describe_image_error

_logger = logging.getLogger(__name__)


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
        self.decode = ImageDecoder(self.input_img_mode)
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
            path = self._path(index)
            if path is not None:
                check_regular_file(path)
            file, target, *features = self.reader[index]
            return file.read() if self.load_bytes else self.decode(file, path), target, features
        except Exception as error:  # PIL's plugins and the readers each raise their own
            raise _unreadable(self._name(index), error) from error

    def _path(self, index: int) -> Optional[str]:
        """Return the path of an image that is a file of its own."""
        samples = getattr(self.reader, 'samples', None)
        path = None if samples is None else samples[index][0]
        return path if isinstance(path, str) else None

    def _name(self, index: int) -> str:
        name = self._path(index) or self.filename(index, absolute=True)
        return name or f'number {index}'


class DecodedStream(IterableImageDataset):
    """An `IterableImageDataset` that converts images itself; its reader leaves them as they are.

    Args:
        dataset: Dataset to take over; its reader and transforms are shared.
        mode: PIL mode to convert to.
    """

    def __init__(self, dataset: IterableImageDataset, mode: str):
        super().__init__(
            root=None,
            reader=dataset.reader,
            transform=dataset.transform,
            target_transform=dataset.target_transform,
        )
        self.decode = ImageDecoder(mode)

    def __iter__(self) -> Iterator[Tuple[Any, Any]]:
        for image, target in self.reader:
            try:
                image = self.decode(image)
            except Exception as error:
                raise _unreadable('of the stream', error) from error
            yield (
                image if self.transform is None else self.transform(image),
                target if self.target_transform is None else self.target_transform(target),
            )


def load_file(path: str, decode: ImageDecoder) -> Any:
    """Decode the file of an image, for datasets of torchvision.

    Raises:
        UsageError: If it cannot be read.
    """
    try:
        check_regular_file(path)
        return decode(path, path)
    except Exception as error:
        raise _unreadable(path, error) from error


def _unreadable(name: str, error: Exception) -> UsageError:
    return UsageError(f'cannot read image {name}: {describe_image_error(error)}; repair or remove it')


def user_message(error: UsageError) -> str:
    """One line to print for an error, also for one from a loader's worker process.

    Torch raises a worker's exception again in the main process, with the worker's whole traceback as its text.
    """
    return str(error).strip().split(f'{UsageError.__name__}: ')[-1]
