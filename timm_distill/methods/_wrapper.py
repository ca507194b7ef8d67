"""Base of the methods that take another method: `--kd OUTER:INNER`."""
from typing import ClassVar, Dict, FrozenSet, Optional, Set, Type, TypeVar

import torch

from ..features.spec import PairSpec
from ._base import DistillMethod

Value = TypeVar('Value')


class WrapperMethod(DistillMethod):
    """Base of the methods that run another method on what they make of the features.

    The constructor's first argument is that method; its keyword arguments are the wrapper's own options. Names of terms
    begin with the wrapper's: `rename` does that.

    Args:
        inner: The method that is taken.

    Attributes:
        inner_type: Base class of the methods that it takes. What these read must be among what the wrapper reads.
    """
    inner_type: ClassVar[Type[DistillMethod]] = DistillMethod

    def __init__(self, inner: DistillMethod):
        super().__init__()
        self.inner = inner

    def rename(self, terms: Dict[str, Value]) -> Dict[str, Value]:
        """Return the inner method's terms under names of the whole, 'OUTER:TERM'."""
        return {f'{type(self).name}:{term}': value for term, value in terms.items()}

    def build(self, pair: PairSpec) -> None:
        self.inner.build(pair)

    def set_classifier(self, weight: Optional[torch.Tensor]) -> None:
        self.inner.set_classifier(weight)

    def set_class_means(self, means: torch.Tensor) -> None:
        self.inner.set_class_means(means)

    def check_ready(self) -> None:
        self.inner.check_ready()

    def weight(self, epoch: int) -> float:
        return self.inner.weight(epoch)

    def unscheduled_terms(self) -> FrozenSet[str]:
        return frozenset(self.rename(dict.fromkeys(self.inner.unscheduled_terms())))

    def no_weight_decay(self) -> Set[str]:
        return {f'inner.{name}' for name in self.inner.no_weight_decay()}

    def transform_logits(self, logits: torch.Tensor) -> torch.Tensor:
        return self.inner.transform_logits(logits)
