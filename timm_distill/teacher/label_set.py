"""Label sets: the names of a classifier's classes, and which of them another name means.

Names are WordNet ids, as ImageNet's folders have them, or words: a whole label ('tench, Tinca tinca') counts more than
one of its synonyms. Upper and lower case, underscores and hyphens make no difference.
"""
import re
from dataclasses import dataclass
from functools import cache
from typing import Any, Dict, FrozenSet, List, Optional, Sequence

import torch.nn as nn
from timm.data import CustomDatasetInfo, ImageNetInfo, infer_imagenet_subset

_WORDNET_ID = re.compile(r'(n\d{8})(?:[\s_.:,-]+(.*))?$', re.DOTALL)

Table = Dict[str, List[int]]


@dataclass(frozen=True)
class _Name:
    """A class name as it is compared: its WordNet id, '' for none, its whole labels and their single words."""
    wordnet_id: str
    labels: FrozenSet[str]
    words: FrozenSet[str]


class LabelSet:
    """Names of a classifier's classes.

    Args:
        names: Name of every class in the order of the logits; '' for one without.
        source: Where they were taken from, in words.
    """

    def __init__(self, names: Sequence[str], source: str):
        self.names = tuple(names)
        self.source = source
        self._ids: Table = {}
        self._labels: Table = {}
        self._words: Table = {}
        for index, name in enumerate(map(_read_name, self.names)):
            if name.wordnet_id:
                self._ids.setdefault(name.wordnet_id, []).append(index)
            for table, keys in ((self._labels, name.labels), (self._words, name.words)):
                for key in keys:
                    table.setdefault(key, []).append(index)

    def find(self, name: str) -> List[int]:
        """Return the classes that a name may mean: one where it is clear, several where it is ambiguous.

        A WordNet id is looked up as that alone, where this set has ids.
        """
        wanted = _read_name(name)
        if wanted.wordnet_id and self._ids:
            return self._ids.get(wanted.wordnet_id, [])
        for table, keys in ((self._labels, wanted.labels), (self._words, wanted.words)):
            found = sorted({index for key in keys for index in table.get(key, ())})
            if found:
                return found
        return []

    def has_all_ids(self, names: Sequence[str]) -> bool:
        """Whether all names are WordNet ids, and ids of this set."""
        ids = [_read_name(name).wordnet_id for name in names]
        return bool(ids) and all(key in self._ids for key in ids)

    def describe(self, index: int) -> str:
        """Return a class as its name, its index, and its words where the name is a bare WordNet id."""
        name = self.names[index]
        lemmas = _lemmas(name)
        return f'{name or "class"} ({index}{", " + lemmas.partition(",")[0] if lemmas else ""})'


def _read_name(name: str) -> _Name:
    match = _WORDNET_ID.match(name)
    wordnet_id, text = (match.group(1), match.group(2) or '') if match else ('', name)
    labels = [label for label in (text, _lemmas(wordnet_id)) if _normalize(label)]
    words = [word for label in labels for word in label.split(',') if _normalize(word)]
    return _Name(wordnet_id, frozenset(map(_normalize, labels)), frozenset(map(_normalize, words)))


def _normalize(text: str) -> str:
    return ' '.join(re.sub(r'[_-]', ' ', text).casefold().split())


@cache
def _wordnet() -> ImageNetInfo:
    return ImageNetInfo()  # its words are those of all synsets that timm knows, not of ImageNet-1k's alone


def _lemmas(wordnet_id: str) -> str:
    """Return the words of a synset, '' where timm does not know it."""
    try:
        return _wordnet().label_name_to_description(wordnet_id)
    except KeyError:
        return ''


def find_labels(model: nn.Module, num_classes: int) -> Optional[LabelSet]:
    """Return the names of a classifier's classes: those that its weights say of themselves, else ImageNet's.

    Args:
        model: Model whose `pretrained_cfg` may hold names, as those of a hub do.
        num_classes: Columns of its logits.
    """
    names = (getattr(model, 'pretrained_cfg', None) or {}).get('label_names')
    return recorded_labels(names, num_classes, 'its weights') or imagenet_labels(num_classes)


def recorded_labels(names: Any, num_classes: int, source: str) -> Optional[LabelSet]:
    """Return the label set that weights say of themselves; None where they say none, or one of another class count.

    Args:
        names: List, or mapping from index to name, as timm's configs have it.
        num_classes: Columns of the logits.
        source: Where it was taken from.
    """
    try:
        info = CustomDatasetInfo(names)
        indices = info.label_indices()
        texts = {int(index): str(info.index_to_label_name(index)) for index in indices}
    except (ValueError, TypeError):
        return None
    if not texts or max(texts) >= num_classes or (isinstance(names, (list, tuple)) and len(texts) != num_classes):
        return None
    return LabelSet([texts.get(index, '') for index in range(num_classes)], source)


def imagenet_labels(num_classes: int) -> Optional[LabelSet]:
    """Return the ImageNet set (1k, 12k, the 21k and 22k ones) that has so many classes, None where none has."""
    subset = infer_imagenet_subset({'num_classes': num_classes})
    if subset is None:
        return None
    return LabelSet(ImageNetInfo(subset).label_names(), f'{subset}, which has {num_classes} classes')
