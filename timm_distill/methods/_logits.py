"""Base of the methods that compare the logits of each sample by itself."""
from typing import Dict

import torch

from ..features.spec import Features
from ..losses import among_classes
from ._base import DistillMethod


class LogitMethod(DistillMethod):
    """Base of the methods whose terms are means over samples of a loss of each sample's logits.

    Another method can take them (`sdd:kd`): it gives other logits and weighs the samples. Where a loss reads the label,
    a sample whose class the teacher does not know has none.
    """

    def sample_losses(
            self,
            student_logits: torch.Tensor,
            teacher_logits: torch.Tensor,
            target: torch.Tensor,
    ) -> Dict[str, torch.Tensor]:
        """Return each term for every sample, [B], under the term's name.

        Args:
            student_logits: [B, K], with gradients.
            teacher_logits: [B, K].
            target: Class indices [B] or soft targets [B, K].
        """
        raise NotImplementedError

    def forward(self, student: Features, teacher: Features, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        assert student.logits is not None and teacher.logits is not None
        share = None
        if teacher.classes is not None:
            target, share = among_classes(target, teacher.classes)
        losses = self.sample_losses(student.logits, teacher.logits, target)
        weigh = share is not None and self.reads_labels
        return {name: (share * loss if weigh else loss).mean() for name, loss in losses.items()}
