"""Training the head alone."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from torch.optim import Optimizer

from ..regularizer import Applied, Regularizer
from .fixed_mask import new_names, train_only, whole

_FROZEN = "nothing but the head is trained"


@dataclass(frozen=True)
class LinearProbe(Regularizer):
    """Trains the head of the task on what the frozen backbone computes.

    A pooler that came with the checkpoint is frozen, too; what the checkpoint lacked is trained, wherever it is. The
    backbone's dropout stays. To train the pooler as well, take ``top-k-layers`` with 0 layers.
    """

    name: ClassVar[str] = "linear-probe"
    order: ClassVar[int] = -2
    excludes: ClassVar[Mapping[str, str]] = dict.fromkeys(
        (
            "bitfit", "child-tuning-d", "fish-mask", "fixed-mask", "gradual-unfreezing", "l2-sp", "layerwise-lr-decay",
            "lnsr", "mixout", "random-mask", "recadam", "top-k-layers", "weight-decay-pretrained", "weights-mixup",
        ),
        _FROZEN,
    )  # fmt: skip

    @contextmanager
    def applied_to(self, model: nn.Module, optimizer: Optimizer) -> Iterator[Applied]:
        """Train the head for the length of the block.

        Raises:
            ValueError: If the model has no head.
        """
        with train_only(model, optimizer, whole(model, new_names(model))):
            yield Applied()
