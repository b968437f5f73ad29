"""Corruption of token sequences for denoising objectives, drawn per example.

Every draw depends only on the seed and the example's index in the data set, never on the batch it
sits in, so scores and landscapes do not change with batch size, order or padding.
"""

import numpy as np

from .._typing import Int

IGNORED = -100


def example_generator(seed: int, index: int) -> np.random.Generator:
    """The random numbers of one example: a stream of their own for every (seed, example index)."""
    return np.random.default_rng((seed, index))


def mask_tokens(
    tokens: Int[np.ndarray, "tokens"],
    generator: np.random.Generator,
    *,
    mask_id: int,
    special_ids: frozenset[int],
    vocabulary_size: int,
    probability: float = 0.15,
) -> tuple[Int[np.ndarray, "tokens"], Int[np.ndarray, "tokens"]]:
    """Corrupt one sequence for masked language modelling.

    Every token that is not special is chosen with ``probability``; of the chosen ones 80 % become the
    mask token, 10 % a random token that is not special, and 10 % stay (Devlin et al., arXiv 1810.04805,
    section 3.1).

    Returns:
        The corrupted tokens, and the labels: the original token where chosen, -100 elsewhere. A short
        sequence may end up with no label at all.
    """
    special = np.array(sorted(special_ids), dtype=int)
    ordinary = ~np.isin(tokens, special)
    chosen = ordinary & (generator.random(len(tokens)) < probability)
    fate = generator.random(len(tokens))
    drawn = generator.integers(vocabulary_size - len(special), size=len(tokens))
    steps_over = np.searchsorted(special - np.arange(len(special)), drawn, side="right")  # special ids below
    random_tokens = drawn + steps_over
    corrupted = np.where(chosen & (fate < 0.8), mask_id, tokens)
    corrupted = np.where(chosen & (fate >= 0.9), random_tokens, corrupted)
    return corrupted, np.where(chosen, tokens, IGNORED)


def corrupt_spans(
    tokens: Int[np.ndarray, "tokens"],
    generator: np.random.Generator,
    *,
    sentinels: list[int],
    density: float = 0.15,
    mean_span: float = 3.0,
) -> tuple[Int[np.ndarray, "inputs"], Int[np.ndarray, "targets"]]:
    """Corrupt one sequence by dropping spans, as T5 does (Raffel et al., arXiv 1910.10683, section 3.1.4).

    ``round(density * T)`` of the T tokens are dropped in ``round(dropped / mean_span)`` spans whose
    lengths, and the gaps between them, are uniform random compositions. In the input each span becomes
    one sentinel; the target lists every sentinel followed by the tokens it stands for, and one final sentinel.

    Returns:
        Inputs and targets, without an end-of-sequence token. A sequence of fewer than two tokens is
        left alone and has an empty target.
    """
    length = len(tokens)
    if length < 2:
        return tokens, tokens[:0]
    dropped = min(max(round(density * length), 1), length - 1)
    spans = min(max(round(dropped / mean_span), 1), len(sentinels) - 1, length - dropped)
    dropped_lengths = _composition(dropped, spans, generator)
    kept_lengths = _composition(length - dropped, spans, generator)
    inputs: list[int] = []
    targets: list[int] = []
    position = 0
    for sentinel, kept, lost in zip(sentinels, kept_lengths, dropped_lengths, strict=False):
        inputs += [*tokens[position : position + kept], sentinel]
        targets += [sentinel, *tokens[position + kept : position + kept + lost]]
        position += kept + lost
    return np.array(inputs), np.array([*targets, sentinels[spans]])


def _composition(total: int, parts: int, generator: np.random.Generator) -> Int[np.ndarray, "parts"]:
    """A uniform draw among the ways to write ``total`` as an ordered sum of ``parts`` positive numbers."""
    cuts = np.sort(generator.permutation(total - 1)[: parts - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))
