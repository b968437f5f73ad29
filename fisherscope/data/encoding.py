"""Texts as models take them: tokenised, corrupted where the objective asks for it, and collated.

Everything is encoded once. What an example becomes depends on its text, the tokenizer, the seed and its position in the
source, and on nothing else: not on the batch it is served in nor on which other examples were chosen.
"""

import hashlib
import itertools
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .corruption import IGNORED, corrupt_spans, example_generator, mask_tokens
from .sources import LABELLED_OBJECTIVES, Source, check_objective, read_source

logger = logging.getLogger(__name__)

DEFAULT_MAX_LENGTH = 128

WINDOW = 128
"""Batches within which examples are put together by length; a multiple of :data:`PARTS`."""
PARTS = 4
"""Every fourth batch, and so every other one, holds a random choice of the examples, as estimates of noise need it."""

Example = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Batches:
    """A fixed list of encoded examples, served in padded batches; iterating again gives the same batches.

    Examples of similar length are served together, so that little is spent on padding, and yet no part of the batches
    has a length of its own: of 128 batches at a time, in source order, every fourth one takes from a random quarter of
    the examples, and short and long batches alternate. Any of the last 128 may be the smaller one.

    A batch holds ``input_ids``, ``attention_mask``, ``token_type_ids`` if the tokenizer makes them, and ``labels`` as
    the heads of Hugging Face take them: of shape ``[B, tokens]``, -100 where not scored, or of shape ``[B]`` for
    classification (int64) and regression (float32).

    Attributes:
        examples: Encoded and unpadded, in source order.
        padding: What fills up each input on the right.
        batch_size: Examples per batch; one batch may be smaller.
        objective: What the labels are for.
        source: Name of the data, as :class:`Source` has it.
        source_fingerprint: Fingerprint of all texts and labels of the source.
        label_names: Names of the classes, by id.
        settings: How the examples were made, for provenance; JSON-able.
    """

    examples: Sequence[Example]
    padding: Mapping[str, int]
    batch_size: int
    objective: str
    source: str
    source_fingerprint: str
    label_names: tuple[str, ...] | None
    settings: dict[str, object]

    def __post_init__(self) -> None:
        _at_least(1, "batch_size", self.batch_size)

    def __repr__(self) -> str:
        return f"Batches({self.source}, {self.objective}, {self.num_examples} examples in batches of {self.batch_size})"

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        step = WINDOW * self.batch_size
        for start in range(0, self.num_examples, step):
            window = self.examples[start : start + step]
            for positions in _arranged([_length(example) for example in window], self.batch_size, seed=start // step):
                yield self.collate([window[i] for i in positions])

    def collate(self, rows: Sequence[Example]) -> dict[str, Tensor]:
        """Some of the examples as one batch."""
        return {name: _stacked([row[name] for row in rows], self.padding.get(name, 0)) for name in rows[0]}

    def __len__(self) -> int:
        """Number of batches."""
        return -(-self.num_examples // self.batch_size)

    @property
    def num_examples(self) -> int:
        """Number of examples in all batches together."""
        return len(self.examples)

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of a SHA-256 over the encoded examples in order; the batch size does not enter."""
        digest = hashlib.sha256()
        for example in self.examples:
            for name, array in sorted(example.items()):
                digest.update(json.dumps([name, array.dtype.str, array.shape]).encode())
                digest.update(array.tobytes())
        return digest.hexdigest()[:16]

    def with_batch_size(self, batch_size: int) -> "Batches":
        """The same examples in batches of another size."""
        return replace(self, batch_size=batch_size)


def _length(example: Example) -> int:
    """Tokens of the input and, where the labels are tokens, of the target: a model may run on both."""
    return example["input_ids"].size + example["labels"].size


def _arranged(lengths: Sequence[int], size: int, seed: int) -> list[list[int]]:
    """Positions of examples in batches of neighbours in length, within each of the parts that take turns.

    Within a part the shorter and longer batches come in the order of multiples of the golden ratio modulo 1, of which
    any few in a row, and any few at equal steps, are spread evenly.
    """
    generator = np.random.default_rng(seed)
    drawn = np.split(generator.permutation(len(lengths)), range(size, len(lengths), size))
    start, served = generator.random(), {}
    for part in range(min(PARTS, len(drawn))):
        members = sorted(np.concatenate(drawn[part::PARTS]).tolist(), key=lambda i: (lengths[i], i))
        batches = [members[i : i + size] for i in range(0, len(members), size)]
        places = (start + part / PARTS + np.arange(len(batches)) * (5**0.5 - 1) / 2) % 1
        served |= {part + PARTS * k: batches[rank] for k, rank in enumerate(places.argsort().argsort())}
    return [served[number] for number in range(len(drawn))]


def _stacked(rows: Sequence[np.ndarray], value: int) -> Tensor:
    """Rows as one tensor, filled up on the right; at least one column, since models cannot run on none."""
    if rows[0].ndim == 0:
        return torch.from_numpy(np.stack(rows))
    stacked = np.full((len(rows), max(1, *map(len, rows))), value, dtype=rows[0].dtype)
    for target, row in zip(stacked, rows, strict=True):
        target[: len(row)] = row
    return torch.from_numpy(stacked)


def describe_batches(batches: Iterable[Mapping[str, Tensor]]) -> dict[str, object]:
    """What provenance says of any batches; the fingerprint is None unless :func:`load_batches` made them."""
    return {
        "source": getattr(batches, "source", "in memory"),
        "fingerprint": getattr(batches, "fingerprint", None),
        "batch_size": getattr(batches, "batch_size", None),
        "settings": getattr(batches, "settings", None),
    }


class BatchDigest:
    """A fingerprint of batches that come one by one."""

    def __init__(self) -> None:
        """Nothing seen yet."""
        self._digest = hashlib.sha256()

    def update(self, batch: Mapping[str, Tensor]) -> None:
        """See one more batch."""
        for name, tensor in sorted(batch.items()):
            self._digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
            self._digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())

    def __str__(self) -> str:
        """16 hexadecimal digits of a SHA-256 over the batches seen."""
        return self._digest.hexdigest()[:16]


def load_batches(
    data: str | Path | Source,
    tokenizer: PreTrainedTokenizerBase,
    *,
    objective: str,
    num_examples: int | None = None,
    positions: Sequence[int] | None = None,
    batch_size: int = 16,
    max_length: int | None = None,
    seed: int = 0,
    text_columns: Sequence[str] | None = None,
    label_column: str | None = None,
    revision: str | None = None,
) -> Batches:
    """Read, tokenise and, for the denoising objectives, corrupt examples.

    - ``mlm``: BERT's masking, 15 % of the tokens that are not special; two text columns are a sentence pair.
    - ``causal-lm``: every token is a label, unshifted; two text columns are joined by a space.
    - ``seq2seq-lm``: T5's span corruption of one text column; of two, the first is the input and the second the target.
    - ``classification``, ``regression``: the text or sentence pair, and its label.

    Args:
        data: What :func:`read_source` takes, or a source that is read already.
        tokenizer: The tokenizer of the model.
        objective: One of the five names.
        num_examples: How many examples to draw at random, kept in source order; None takes all. If there are
            fewer, all are taken and a warning says so.
        positions: Instead of ``num_examples``: which examples to take, by their place in the source.
        batch_size: Examples per batch; changes nothing else.
        max_length: Tokens per example, special ones included; longer texts are cut. By default 128, or less if the
            tokenizer allows less.
        seed: Decides the choice of examples and, with an example's position in the source, its corruption.
        text_columns: As for :func:`read_source`.
        label_column: As for :func:`read_source`.
        revision: As for :func:`read_source`.

    Returns:
        The encoded examples, in batches.

    Raises:
        FileNotFoundError: If there is no such file or data set.
        TypeError: If the data are no name, path or source.
        ValueError: If an argument is out of range, the data cannot be read, or the tokenizer lacks a token that the
            objective needs.
    """
    check_objective(objective)
    if not isinstance(data, str | Path | Source):
        raise TypeError(
            f"data must be a name, a path or a Source, got a {type(data).__name__}; save it as a file (to_csv) or "
            "folder (save_to_disk) and give that, or make batches of your own."
        )
    _at_least(1, "batch_size", batch_size)
    _at_least(0, "seed", seed)
    max_length = _max_length(max_length, tokenizer)
    if not isinstance(data, Source):
        source = read_source(
            data, objective=objective, text_columns=text_columns, label_column=label_column, revision=revision
        )
    elif text_columns or label_column or revision:
        raise ValueError(f"{data.name} is read already; give text_columns, label_column and revision to read_source.")
    else:
        source = data
    positions = _chosen(source, num_examples, seed) if positions is None else _checked(source, positions, num_examples)
    examples = _encoded(source, positions, objective, _Encoder(tokenizer, max_length, seed))
    return Batches(
        examples,
        _padding(tokenizer),
        batch_size,
        objective,
        source.name,
        source.fingerprint,
        source.label_names if objective == "classification" else None,
        {
            "objective": objective,
            "num_examples": len(examples),
            "max_length": max_length,
            "seed": seed,
            "text_columns": source.text_columns and list(source.text_columns),
            "label_column": source.label_column,
        },
    )


def _at_least(minimum: int, name: str, value: int) -> None:
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}.")


def _max_length(max_length: int | None, tokenizer: PreTrainedTokenizerBase) -> int:
    longest = tokenizer.model_max_length
    if max_length is None:
        return min(DEFAULT_MAX_LENGTH, longest)
    if max_length > longest:
        raise ValueError(f"max_length must be at most {longest}, which is what the tokenizer allows; got {max_length}.")
    return max_length


def _chosen(source: Source, num_examples: int | None, seed: int) -> list[int]:
    """Positions in the source; the choice for a small number is part of the choice for a larger one."""
    available = len(source.texts)
    if num_examples is None:
        return list(range(available))
    _at_least(1, "num_examples", num_examples)
    if num_examples > available:
        found = "only 1 example" if available == 1 else f"{available} examples"
        logger.warning("%s holds %s, %d were asked for; all are used.", source.name, found, num_examples)
    return sorted(np.random.default_rng(seed).permutation(available)[:num_examples].tolist())


def _checked(source: Source, positions: Sequence[int], num_examples: int | None) -> Sequence[int]:
    if num_examples is not None:
        raise ValueError("positions say which examples to take; leave out num_examples.")
    if not positions or min(positions) < 0 or max(positions) >= len(source.texts):
        raise ValueError(f"positions must be some of 0 to {len(source.texts) - 1}, those of {source.name}; mend them.")
    return positions


def _encoded(source: Source, positions: Sequence[int], objective: str, encoder: "_Encoder") -> list[Example]:
    texts = [source.texts[i] for i in positions]
    if objective in LABELLED_OBJECTIVES:
        labels = _labels(source, positions, objective)
        return [example | {"labels": np.array(y)} for example, y in zip(encoder.plain(texts), labels, strict=True)]
    if objective == "mlm":
        return encoder.masked(texts, positions)
    if objective == "causal-lm":
        return encoder.causal(texts)
    return encoder.translated(texts) if len(texts[0]) == 2 else encoder.span_corrupted(texts, positions)


def _labels(source: Source, positions: Sequence[int], objective: str) -> np.ndarray:
    if source.labels is None or (objective == "classification" and source.label_names is None):
        raise ValueError(f"{objective} needs labels, but {source.name} was read without them; read it for {objective}.")
    kind = np.int64 if objective == "classification" else np.float32
    return np.array([source.labels[i] for i in positions], dtype=kind)


@dataclass(frozen=True)
class _Encoder:
    """Turns texts, and their positions in the source where something is drawn, into encoded examples."""

    tokenizer: Any  # a PreTrainedTokenizerBase, whose annotations allow token ids to be anything
    max_length: int
    seed: int

    def plain(self, texts: Sequence[tuple[str, ...]]) -> list[Example]:
        return self._tokenized(*(list(column) for column in zip(*texts, strict=True)))

    def masked(self, texts: Sequence[tuple[str, ...]], positions: Sequence[int]) -> list[Example]:
        mask_id = self.tokenizer.mask_token_id
        if mask_id is None:
            raise ValueError(
                "mlm needs a tokenizer with a mask token, but this one has none; use causal-lm or seq2seq-lm."
            )
        settings = {"mask_id": mask_id, "special_ids": self._special_ids(), "vocabulary_size": len(self.tokenizer)}
        examples = self.plain(texts)
        for example, i in zip(examples, positions, strict=True):
            tokens = example["input_ids"]
            example["input_ids"], example["labels"] = mask_tokens(tokens, example_generator(self.seed, i), **settings)
        return examples

    def causal(self, texts: Sequence[tuple[str, ...]]) -> list[Example]:
        examples = self._tokenized([" ".join(row) for row in texts])
        return [_without_types(example) | {"labels": example["input_ids"]} for example in examples]

    def translated(self, texts: Sequence[tuple[str, ...]]) -> list[Example]:
        sources, targets = ([row[i] for row in texts] for i in (0, 1))
        return [_without_types(example) for example in self._tokenized(sources, text_target=targets)]

    def span_corrupted(self, texts: Sequence[tuple[str, ...]], positions: Sequence[int]) -> list[Example]:
        sentinels, end = self._sentinels(), self.tokenizer.eos_token_id
        if end is None:
            raise ValueError("seq2seq-lm needs a tokenizer with an end-of-sequence token, but this one has none.")
        examples = []
        plain = self._tokenized([row[0] for row in texts], add_special_tokens=False)
        for example, i in zip(plain, positions, strict=True):
            tokens = example["input_ids"][: self.max_length - 1]  # leaves room for the end
            pair = corrupt_spans(tokens, example_generator(self.seed, i), sentinels=sentinels)
            inputs, targets = (np.append(part, end) for part in pair)
            examples.append({"input_ids": inputs, "attention_mask": np.ones_like(inputs), "labels": targets})
        return examples

    def _tokenized(self, *columns: list[str], **options: Any) -> list[Example]:
        special = self.tokenizer.num_special_tokens_to_add(pair=len(columns) == 2)
        if self.max_length <= special:
            raise ValueError(
                f"max_length must leave room for text beside {special} special tokens, got {self.max_length}."
            )
        encoded = self.tokenizer(
            *columns, truncation=True, max_length=self.max_length, return_attention_mask=True, **options
        )
        return [{name: np.array(encoded[name][i], dtype=np.int64) for name in encoded} for i in range(len(columns[0]))]

    def _special_ids(self) -> frozenset[int]:
        """Also the special tokens that have no role of their own, such as the sentinels of T5."""
        added = (i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special)
        return frozenset(self.tokenizer.all_special_ids).union(added)

    def _sentinels(self) -> list[int]:
        vocabulary = self.tokenizer.get_vocab()
        names = itertools.takewhile(vocabulary.__contains__, (f"<extra_id_{i}>" for i in itertools.count()))
        sentinels = [vocabulary[name] for name in names]
        if len(sentinels) < 2:
            raise ValueError(
                "seq2seq-lm of one text column needs the sentinels <extra_id_0>, <extra_id_1>, … of T5, but this "
                "tokenizer has none; use one of T5, or give an input and a target column with --text-columns."
            )
        return sentinels


def _without_types(example: Example) -> Example:
    """Decoders have no sentence pairs: T5 refuses the types, and GPT-2 would add a token's embedding for each."""
    return {name: array for name, array in example.items() if name != "token_type_ids"}


def padding_id(tokenizer: Any) -> int | None:
    """The token that fills up batches: the tokenizer's padding token, else its end of sequence, else None."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _padding(tokenizer: Any) -> dict[str, int]:
    pad = padding_id(tokenizer)
    if pad is None:
        raise ValueError("Batches need a tokenizer with a padding or end-of-sequence token, but this one has neither.")
    return {"input_ids": pad, "token_type_ids": tokenizer.pad_token_type_id, "attention_mask": 0, "labels": IGNORED}
