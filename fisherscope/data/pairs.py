"""Pairs of texts of which one follows the other, or does not: what BERT was pretrained on, beside masked tokens."""

import re
from collections.abc import Sequence

import numpy as np

SHORT = 0.1
"""Share of the pairs that are cut to a random shorter length, so that short texts are known, too."""

FOLLOWS, RANDOM = 0, 1
"""The labels, as the heads of Hugging Face number them."""


def sentences_of(text: str) -> list[str]:
    """The sentences of a text: what ends in a full stop, question or exclamation mark before white space."""
    return [sentence for sentence in re.split(r"(?<=[.!?])\s+", text.strip()) if sentence]


def next_sentence_pairs(
    documents: Sequence[Sequence[str]],
    lengths: Sequence[Sequence[int]],
    room: int,
    generator: np.random.Generator,
) -> list[tuple[str, str, int]]:
    """Cut documents into pairs of which half are neighbours and half are not (Devlin et al. 2019, arXiv 1810.04805).

    Every document is read from its beginning: sentences that fill the room, or in 10 % of the cases a random shorter
    one, are cut in two at random. In half of the cases the second part follows the first; in the others sentences of
    another document take its place, and it is read again as the beginning of the next pair. A last sentence that is
    left alone is not used.

    Args:
        documents: The sentences of at least two documents.
        lengths: The number of tokens of every sentence.
        room: Tokens in a pair; a sentence that is longer than that stays whole.
        generator: Draws.

    Returns:
        First text, second text, and :data:`FOLLOWS` or :data:`RANDOM`.

    Raises:
        ValueError: If there are not two documents, or one has a single sentence.
    """
    if len(documents) < 2 or min(map(len, documents)) < 2:
        raise ValueError("Pairs need two documents or more, and two sentences or more in each of them.")
    pairs = []
    for number, sentences in enumerate(documents):
        start = 0
        while len(sentences) - start >= 2:
            target = room if generator.random() >= SHORT else int(generator.integers(2, max(room, 2) + 1))
            end = _filled(lengths[number], start, target, at_least=2)
            middle = int(generator.integers(start + 1, end))
            first = " ".join(sentences[start:middle])
            if generator.random() < 0.5:
                pairs.append((first, " ".join(sentences[middle:end]), FOLLOWS))
                start = end
                continue
            other = (number + int(generator.integers(1, len(documents)))) % len(documents)
            begin = int(generator.integers(len(documents[other])))
            left = target - sum(lengths[number][start:middle])
            pairs.append((first, " ".join(documents[other][begin : _filled(lengths[other], begin, left, 1)]), RANDOM))
            start = middle
    return pairs


def _filled(lengths: Sequence[int], start: int, room: int, at_least: int) -> int:
    """Where sentences that are taken in a row end: with the last one that fits, and not before there are enough."""
    end, used = start, 0
    while end < len(lengths) and (end - start < at_least or used + lengths[end] <= room):
        used += lengths[end]
        end += 1
    return end
