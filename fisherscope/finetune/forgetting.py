"""What a model forgets when it is fine-tuned: the loss of its pretraining, with its own head."""

from pathlib import Path

import torch
from torch import nn

from ..data import load_batches
from ..models import infer_objective, load_model, measuring, take_backbone
from ..objectives import example_losses

NUM_EXAMPLES = 512


def pretraining_loss(
    name: str | Path,
    data: str | Path,
    *,
    revision: str | None = None,
    device: str | None = None,
    trained: nn.Module | None = None,
) -> float:
    r"""The loss of a checkpoint's own objective per scored token, :math:`\sum_n \ell_n / \sum_n T_n`, in nats.

    Args:
        name: The checkpoint, with the head of its pretraining.
        data: Texts, as :func:`fisherscope.load_batches` takes them; at most 512 examples drawn by seed 0 are used.
        revision: Of the checkpoint on the Hub.
        device: None means CUDA where there is one, or that of ``trained``.
        trained: A model of the same backbone whose weights the backbone gets; the head keeps its own.

    Raises:
        ValueError: If the checkpoint was saved without a head, or no text has a token to score.
    """
    device = device if trained is None else str(next(trained.parameters()).device)
    model, tokenizer = load_model(name, revision=revision, device=device)
    if trained is not None:
        take_backbone(model, trained)
    objective = infer_objective(model)
    batches = load_batches(data, tokenizer, objective=objective, num_examples=NUM_EXAMPLES, seed=0)
    total, count = 0.0, 0
    with measuring(model), torch.no_grad():
        for batch in batches:
            losses = example_losses(model, batch, objective)
            total, count = total + float(losses.total.sum()), count + int(losses.count.sum())
    if not count:
        raise ValueError(f"Measuring forgetting needs texts with something to score, but those of {data} have none.")
    return total / count
