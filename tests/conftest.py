"""Tiny models from configs, examples of unequal length, and the padding that makes batches of them."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor, nn

try:
    from hypothesis import HealthCheck, settings
except ModuleNotFoundError:  # the machine of `make gpu-check`, whose tests do not use it
    pass
else:
    settings.register_profile(
        "fisherscope",
        deadline=None,
        derandomize=True,
        max_examples=12,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    settings.load_profile("fisherscope")

VOCABULARY, WIDTH, LAYERS, HEADS = 99, 32, 2, 4
IGNORED = -100
PADDING = {"labels": IGNORED}  # everything else is padded with 0

Example = dict[str, Tensor]
"""One example without padding and without a batch axis."""


def batched(examples: Sequence[Example], size: int) -> list[dict[str, Tensor]]:
    """Batches of at most ``size`` examples, padded on the right to the longest of each."""
    return [_padded(examples[start : start + size]) for start in range(0, len(examples), size)]


def _padded(examples: Sequence[Example]) -> dict[str, Tensor]:
    def stacked(name: str) -> Tensor:
        rows = [example[name] for example in examples]
        if rows[0].ndim == 0:
            return torch.stack(rows)
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PADDING.get(name, 0))

    return {name: stacked(name) for name in examples[0]}


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Fails unless the block leaves every bit and every flag of the model as it was, also when it raises."""
    before, gradients = _state(model), [p.grad for p in model.parameters()]
    try:
        yield
    finally:
        assert _state(model) == before
        assert all(p.grad is old for p, old in zip(model.parameters(), gradients, strict=True))


def _state(model: nn.Module) -> dict[str, object]:
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
    config = getattr(model, "config", None)
    return {
        "bits": [(id(tensor), tensor.detach().numpy().tobytes()) for tensor in tensors],
        "training": [module.training for module in model.modules()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "config": config and config.to_dict(),
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()],
    }


def contents(path: Path) -> dict[str, object]:
    """Every dataset, attribute and order of an HDF5 file as bytes; provenance without what may differ between runs."""
    found: dict[str, object] = {}

    def note(name: str, item: h5py.Group | h5py.Dataset) -> None:
        attributes = {k: _plain(k, v) for k, v in item.attrs.items() if k not in ("DIMENSION_LIST", "REFERENCE_LIST")}
        data = (item.dtype, item.shape, item[()].tobytes()) if isinstance(item, h5py.Dataset) else list(item)
        found[name] = data, attributes

    with h5py.File(path) as file:
        note("/", file)
        file.visititems(note)
    return found


def _plain(key: str, value: object) -> object:
    if key == "provenance":
        return {k: v for k, v in json.loads(str(value)).items() if k not in ("command", "time")}
    return np.asarray(value).tolist()


def kill_when(ready: Callable[[], bool], script: str, *arguments: Path) -> None:
    """Run a script that finds this folder's modules, and SIGKILL it as soon as it is ready."""
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here.parent), str(here)])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", script, *map(str, arguments)], env=environment)
    until = time.monotonic() + 120
    try:
        while not ready():
            assert process.poll() is None, "the script ended before it could be killed"
            assert time.monotonic() < until, "no progress"
            time.sleep(0.01)
    finally:
        process.kill()
        assert process.wait() in (0, -signal.SIGKILL)


class Interrupted(Exception):
    """What a test raises in the middle of a run."""


class Stopping:
    """A re-iterable of batches that raises before it gives batch number ``stop``, if there is one."""

    def __init__(self, batches: Sequence[dict[str, Tensor]], stop: int | None = None, **facts: object) -> None:
        self.batches, self.stop = batches, stop
        vars(self).update(facts)

    def __iter__(self):
        for number, batch in enumerate(self.batches):
            if number == self.stop:
                raise Interrupted
            yield batch


@dataclass(frozen=True)
class Case:
    """A model, the name of its objective, and examples of unequal length for it."""

    model: nn.Module
    objective: str
    examples: list[Example]

    def with_examples(self, examples: Sequence[Example]) -> "Case":
        return replace(self, examples=list(examples))


def moved(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in float64 and eval mode, every parameter moved away from its initial 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def built(name: str, seed: int = 0, **settings: object) -> nn.Module:
    """A tiny random model of a Hugging Face class, in float64; ``settings`` go into its config."""
    import transformers

    classes: dict[str, tuple[str, dict[str, object]]] = {
        "bert": ("BertForMaskedLM", _BERT),
        "bert-classifier": ("BertForSequenceClassification", _BERT | {"num_labels": 3}),
        "bert-regressor": ("BertForSequenceClassification", _BERT | {"num_labels": 1}),
        "albert": ("AlbertForMaskedLM", _BERT | {"embedding_size": 16}),
        "gpt2": ("GPT2LMHeadModel", _GPT2),
        "t5": ("T5ForConditionalGeneration", _T5),
        "llama": ("LlamaForCausalLM", _LLAMA),
    }
    class_name, defaults = classes[name]
    model_class = getattr(transformers, class_name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return moved(model_class(model_class.config_class(**defaults | settings)), seed)


_COMMON = {"vocab_size": VOCABULARY, "pad_token_id": 0}
_BERT = _COMMON | {
    "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 2 * WIDTH,
    "max_position_embeddings": 16,
}  # fmt: skip
_GPT2 = _COMMON | {
    "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 16, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
_T5 = _COMMON | {
    "d_model": WIDTH, "num_layers": LAYERS, "num_heads": HEADS, "d_ff": 2 * WIDTH, "d_kv": 8,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, "decoder_start_token_id": 0,
}  # fmt: skip
_LLAMA = _COMMON | {
    "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": 2,
    "intermediate_size": 2 * WIDTH, "max_position_embeddings": 16, "tie_word_embeddings": False,
}  # fmt: skip


def checkpoint(
    name: str, folder: Path, dtype: torch.dtype = torch.float32, pad: str | None = "[PAD]", **settings
) -> Path:
    """A tiny model with a tokenizer, as ``save_pretrained`` leaves them."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "</s>", *(f"w{i}" for i in range(VOCABULARY - 3))])}
    roles = {"unk_token": "[UNK]", "eos_token": "</s>"} | ({"pad_token": pad} if pad else {})
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles).save_pretrained(folder)
    built(name, **settings).to(dtype).save_pretrained(folder)
    return folder


LENGTHS = (7, 3, 9, 5, 2, 6, 9, 4)


def masked_example(length: int, draw: torch.Generator) -> Example:
    tokens = torch.randint(1, VOCABULARY, (length,), generator=draw)
    labels = torch.where(torch.rand(length, generator=draw) < 0.4, tokens.roll(1), IGNORED)
    labels[length // 2] = 5
    types = (torch.arange(length) >= length // 2).long()
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "token_type_ids": types, "labels": labels}


def causal_example(length: int, draw: torch.Generator) -> Example:
    tokens = torch.randint(1, VOCABULARY, (length,), generator=draw)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}


def translated_example(length: int, draw: torch.Generator) -> Example:
    target = torch.randint(1, VOCABULARY, (11 - length,), generator=draw)
    return causal_example(length, draw) | {"labels": target}


def classified_example(length: int, draw: torch.Generator) -> Example:
    plain = causal_example(length, draw)
    return plain | {"labels": plain["input_ids"][0] % 3}


def valued_example(length: int, draw: torch.Generator) -> Example:
    return causal_example(length, draw) | {"labels": torch.randn((), generator=draw, dtype=torch.float64)}


_KINDS: dict[str, tuple[str, Callable[[int, torch.Generator], Example]]] = {
    "bert": ("mlm", masked_example),
    "albert": ("mlm", masked_example),
    "gpt2": ("causal-lm", causal_example),
    "llama": ("causal-lm", causal_example),
    "t5": ("seq2seq-lm", translated_example),
    "bert-classifier": ("classification", classified_example),
    "bert-regressor": ("regression", valued_example),
}


def case(name: str, lengths: Sequence[int] = LENGTHS, seed: int = 0, **settings: object) -> Case:
    """A tiny model and examples of the given lengths for it."""
    objective, make = _KINDS[name]
    draw = torch.Generator().manual_seed(seed)
    return Case(built(name, seed, **settings), objective, [make(length, draw) for length in lengths])


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Notebooks run with `make test-all`."""
    for item in items:
        if item.path.suffix == ".ipynb":
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Modules that a test makes by hand start from the same weights every time."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def loggers_as_in_a_new_process() -> None:
    """A command that another test ran here left a handler, which writes to what was standard error then."""
    for name in ("fisherscope", "fisherscope.finetune"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.setLevel(logging.NOTSET)
        logger.propagate = True


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Annotations are not checked at run time, as users have it, so that our own refusals are reached."""
    try:
        from jaxtyping import config
    except ModuleNotFoundError:
        yield
        return
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", before)


@pytest.fixture
def bert() -> Case:
    return case("bert")


@pytest.fixture
def gpt2() -> Case:
    return case("gpt2")
