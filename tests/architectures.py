"""A catalogue of tiny random Hugging Face models, head by head, with examples of unequal length for each.

Every parameter is moved away from its initial 0 or 1, so that no score is 0 because of how a model starts out. Sizes
are small and differ from each other, so that no axis can be mistaken for another one.
"""

import functools
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from conftest import IGNORED, Case, Example, moved
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

VOCABULARY, WIDTH, INNER, HEADS, LAYERS, POSITIONS = 48, 16, 24, 2, 2, 20
START, END = 1, 2
CLASSES = 3

LENGTHS = (7, 4, 9, 5, 8)
EQUAL_LENGTHS = (6, 6, 6, 6, 6)


@dataclass(frozen=True)
class Head:
    """What a model predicts.

    Attributes:
        auto_class: The class of transformers that finds the model class for a config.
        objective: The name of the loss.
        example: Makes one example of a given length.
        settings: What the head adds to a config.
    """

    auto_class: str
    objective: str
    example: Callable[[int, torch.Generator], Example]
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Architecture:
    """A family of models.

    Attributes:
        config: Name of the config class of transformers.
        settings: What makes it tiny.
        heads: Names of the heads it is tested with.
        rounds: Which of its operations compute in float32 whatever the model's dtype is; empty if none does.
        unpadded: By head, why an example does not give the same numbers when it is padded on the right; such heads are
            tested with examples of equal length.
        head_settings: By head, what else goes into the config.
        own_projection: Whether the vocabulary projection is a parameter of its own where transformers ties it unless a
            checkpoint holds both.
        segments: Whether the examples say which of two texts a token is from; the others leave it to the model.
    """

    config: str
    settings: Mapping[str, Any]
    heads: tuple[str, ...]
    rounds: str = ""
    unpadded: Mapping[str, str] = field(default_factory=dict)
    head_settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    own_projection: bool = False
    segments: bool = False


def entry(architecture: str, head: str, **settings: Any) -> Case:
    """The model of an architecture with a head, and examples for it; ``settings`` go into the config."""
    import transformers

    kind, made = ARCHITECTURES[architecture], HEADS_BY_NAME[head]
    config = getattr(transformers, kind.config)(
        **{**kind.settings, **made.settings, **kind.head_settings.get(head, {}), **settings}
    )
    seed = zlib.crc32(f"{architecture}, {head}".encode())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, made.auto_class).from_config(config)
        if kind.own_projection and model.get_output_embeddings() is not None:
            model.set_output_embeddings(nn.Linear(WIDTH, VOCABULARY, bias=False))
        model = moved(model, seed)
    draw = torch.Generator().manual_seed(seed)
    lengths = EQUAL_LENGTHS if head in kind.unpadded else LENGTHS
    examples = [made.example(length, draw) for length in lengths]
    return Case(model, made.objective, [_segmented(example) for example in examples] if kind.segments else examples)


def _segmented(example: Example) -> Example:
    length = len(example["input_ids"])
    return example | {"token_type_ids": (torch.arange(length) >= length // 2).long()}


def _tokens(length: int, draw: torch.Generator) -> torch.Tensor:
    """Token 0 is padding; the last one ends the sequence, as some classification heads require."""
    tokens = torch.randint(END + 1, VOCABULARY, (length,), generator=draw)
    tokens[-1] = END
    return tokens


def _text(length: int, draw: torch.Generator) -> Example:
    tokens = _tokens(length, draw)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def _partly(labels: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """Some positions are not scored; the second always is."""
    kept = torch.rand(len(labels), generator=draw) < 0.6
    kept[1] = True
    return labels.where(kept, torch.tensor(IGNORED))


def _masked(length: int, draw: torch.Generator) -> Example:
    return _text(length, draw) | {"labels": _partly(_tokens(length, draw), draw)}


def _causal(length: int, draw: torch.Generator) -> Example:
    text = _text(length, draw)
    return text | {"labels": _partly(text["input_ids"], draw)}


def _translated(length: int, draw: torch.Generator) -> Example:
    return _text(length, draw) | {"labels": _partly(_tokens(13 - length, draw), draw)}


def _classified(length: int, draw: torch.Generator) -> Example:
    return _text(length, draw) | {"labels": torch.randint(CLASSES, (), generator=draw)}


def _valued(length: int, draw: torch.Generator) -> Example:
    return _text(length, draw) | {"labels": torch.randn((), generator=draw, dtype=torch.float64)}


def _tagged(length: int, draw: torch.Generator) -> Example:
    tags = torch.randint(CLASSES, (length,), generator=draw)
    return _text(length, draw) | {"labels": _partly(tags, draw)}


def _answered(length: int, draw: torch.Generator) -> Example:
    start, end = (torch.randint(length, (2,), generator=draw)).sort().values
    return _text(length, draw) | {"start_positions": start, "end_positions": end}


def _pictured(length: int, draw: torch.Generator) -> Example:
    pixels = torch.randn(3, 6, 8, generator=draw, dtype=torch.float64)
    return {"pixel_values": pixels, "labels": torch.randint(CLASSES, (), generator=draw)}


def _measured(length: int, draw: torch.Generator) -> Example:
    return _pictured(length, draw) | {"labels": torch.randn((), generator=draw, dtype=torch.float64)}


HEADS_BY_NAME: dict[str, Head] = {
    "masked LM": Head("AutoModelForMaskedLM", "mlm", _masked),
    "causal LM": Head("AutoModelForCausalLM", "causal-lm", _causal),
    "seq2seq LM": Head("AutoModelForSeq2SeqLM", "seq2seq-lm", _translated),
    "classification": Head(
        "AutoModelForSequenceClassification", "classification", _classified, {"num_labels": CLASSES}
    ),
    "regression": Head("AutoModelForSequenceClassification", "regression", _valued, {"num_labels": 1}),
    "token classification": Head(
        "AutoModelForTokenClassification", "token-classification", _tagged, {"num_labels": CLASSES}
    ),
    "question answering": Head("AutoModelForQuestionAnswering", "question-answering", _answered),
    "image classification": Head(
        "AutoModelForImageClassification", "classification", _pictured, {"num_labels": CLASSES}
    ),
    "image regression": Head("AutoModelForImageClassification", "regression", _measured, {"num_labels": 1}),
}

_SPECIAL = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": START, "eos_token_id": END}
_ENCODER = _SPECIAL | {
    "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": INNER,
    "max_position_embeddings": POSITIONS,
}  # fmt: skip
_DECODER = _ENCODER | {"num_attention_heads": 4, "num_key_value_heads": 2}
_GEMMA = _DECODER | {"head_dim": 6}
_DEBERTA = _ENCODER | {
    "relative_attention": True, "pos_att_type": "c2p|p2c", "max_relative_positions": 6, "pooler_hidden_size": WIDTH,
}  # fmt: skip
_DEBERTA_V2 = _DEBERTA | {"position_buckets": 4, "norm_rel_ebd": "layer_norm", "position_biased_input": False}
_T5 = _SPECIAL | {
    "d_model": WIDTH, "d_kv": 6, "d_ff": INNER, "num_layers": LAYERS, "num_heads": HEADS,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, "decoder_start_token_id": 0,
}  # fmt: skip

_DISTILBERT = _SPECIAL | {
    "dim": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": INNER, "max_position_embeddings": POSITIONS,
}  # fmt: skip
_BART = _SPECIAL | {
    "d_model": WIDTH, "encoder_layers": LAYERS, "decoder_layers": LAYERS, "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS, "encoder_ffn_dim": INNER, "decoder_ffn_dim": INNER,
    "max_position_embeddings": POSITIONS, "decoder_start_token_id": END, "forced_eos_token_id": None,
}  # fmt: skip
_VIT = {
    "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": INNER,
    "image_size": (6, 8), "patch_size": 2,
}  # fmt: skip

_TEXT = ("classification", "regression", "token classification", "question answering")
_MASKED = ("masked LM", *_TEXT)
_CAUSAL = ("causal LM", *_TEXT)
_AS_DECODER = {"causal LM": {"is_decoder": True}}
_SLIDING = {"sliding_window": 6}  # a padded query must still see a token: eager attention gives NaN else, in float64
_RMS = "RMS norm"

ARCHITECTURES: dict[str, Architecture] = {
    "BERT": Architecture("BertConfig", _ENCODER, ("causal LM", *_MASKED), head_settings=_AS_DECODER, segments=True),
    "RoBERTa": Architecture("RobertaConfig", _ENCODER, ("causal LM", *_MASKED), head_settings=_AS_DECODER),
    "DistilBERT": Architecture("DistilBertConfig", _DISTILBERT, _MASKED),
    "ALBERT": Architecture(
        "AlbertConfig", _ENCODER | {"embedding_size": 12, "num_hidden_layers": 3}, _MASKED, segments=True
    ),
    "ELECTRA": Architecture(
        "ElectraConfig", _ENCODER | {"embedding_size": 12}, ("causal LM", *_MASKED), head_settings=_AS_DECODER
    ),
    "DeBERTa": Architecture("DebertaConfig", _DEBERTA, _MASKED, rounds="layer norm"),
    "DeBERTa, newer MLM head": Architecture(
        "DebertaConfig", _DEBERTA | {"legacy": False}, ("masked LM",), rounds="layer norm"
    ),
    "DeBERTa-v2": Architecture(
        "DebertaV2Config", _DEBERTA_V2 | {"share_att_key": False, "conv_kernel_size": 3, "conv_act": "gelu"}, _MASKED
    ),
    "DeBERTa-v3": Architecture("DebertaV2Config", _DEBERTA_V2 | {"share_att_key": True, "type_vocab_size": 0}, _MASKED),
    "XLNet": Architecture(
        "XLNetConfig",
        _SPECIAL | {"d_model": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "d_inner": INNER},
        ("causal LM", *_TEXT),
        unpadded=dict.fromkeys(("classification", "regression"), "it summarises the last position, padding or not"),
        segments=True,
    ),
    "GPT-2": Architecture(
        "GPT2Config",
        _SPECIAL | {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": POSITIONS},
        _CAUSAL,
    ),
    "GPT-NeoX": Architecture("GPTNeoXConfig", _ENCODER | {"rotary_pct": 0.5}, _CAUSAL),
    "OPT": Architecture(
        "OPTConfig",
        _ENCODER | {"ffn_dim": INNER, "word_embed_proj_dim": 12},
        ("causal LM", "classification", "regression", "question answering"),
    ),
    "Llama": Architecture("LlamaConfig", _DECODER, _CAUSAL, rounds=_RMS),
    "Mistral": Architecture("MistralConfig", _DECODER | _SLIDING, _CAUSAL, rounds=_RMS),
    "Qwen2": Architecture("Qwen2Config", _DECODER, _CAUSAL, rounds=_RMS),
    "Gemma": Architecture("GemmaConfig", _GEMMA, _CAUSAL[:-1], rounds=_RMS),
    "Gemma 2": Architecture("Gemma2Config", _GEMMA | _SLIDING, _CAUSAL[:-1], rounds=f"{_RMS}, softmax"),
    "Gemma 3": Architecture(
        "Gemma3TextConfig",
        _GEMMA | _SLIDING | {"layer_types": ["sliding_attention", "full_attention"]},
        ("causal LM", "classification", "regression"),
        rounds=_RMS,
    ),
    "Mixtral": Architecture(
        "MixtralConfig",
        _DECODER | {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"},
        _CAUSAL,
        rounds=_RMS,
    ),
    "T5": Architecture("T5Config", _T5, ("seq2seq LM", *_TEXT), rounds=f"{_RMS}, softmax"),
    "T5 v1.1": Architecture(
        "T5Config",
        _T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        ("seq2seq LM",),
        rounds=f"{_RMS}, softmax",
        own_projection=True,
    ),
    "mT5": Architecture(
        "MT5Config",
        _T5 | {"feed_forward_proj": "gated-gelu"},
        ("seq2seq LM", *_TEXT),
        rounds=f"{_RMS}, softmax",
        own_projection=True,
    ),
    "BART": Architecture(
        "BartConfig", _BART, ("seq2seq LM", "causal LM", "classification", "regression", "question answering")
    ),
    "ViT": Architecture("ViTConfig", _VIT, ("image classification", "image regression")),
}

ENTRIES = [(name, head) for name, architecture in ARCHITECTURES.items() for head in architecture.heads]


@dataclass(frozen=True)
class Adapter:
    """An adapter of peft.

    Attributes:
        architecture: What it is put on.
        head: The same.
        config: Name of the config class of peft.
        settings: For the config.
    """

    architecture: str
    head: str
    config: str
    settings: Mapping[str, Any]


ADAPTERS: dict[str, Adapter] = {
    "LoRA, linear": Adapter("BERT", "masked LM", "LoraConfig", {"r": 3, "target_modules": ["query", "value", "dense"]}),
    "LoRA and a new head": Adapter(
        "BERT", "classification", "LoraConfig", {"task_type": "SEQ_CLS", "r": 3, "target_modules": ["query", "value"]}
    ),
    "LoRA, embedding and biases": Adapter(
        "BERT",
        "masked LM",
        "LoraConfig",
        {"r": 3, "target_modules": ["word_embeddings", "query"], "bias": "lora_only"},
    ),
    "LoRA, transposed": Adapter(
        "GPT-2",
        "causal LM",
        "LoraConfig",
        {"task_type": "CAUSAL_LM", "r": 3, "target_modules": ["c_attn"], "fan_in_fan_out": True},
    ),
    "LoRA, convolution": Adapter(
        "ViT", "image classification", "LoraConfig", {"r": 3, "target_modules": ["projection", "q_proj"]}
    ),
    "LoRA, all linear": Adapter(
        "Llama", "causal LM", "LoraConfig", {"task_type": "CAUSAL_LM", "r": 3, "target_modules": "all-linear"}
    ),
    "LoRA, two stacks": Adapter(
        "T5", "seq2seq LM", "LoraConfig", {"task_type": "SEQ_2_SEQ_LM", "r": 3, "target_modules": ["q", "v"]}
    ),
    "DoRA": Adapter(
        "BERT", "masked LM", "LoraConfig", {"r": 3, "target_modules": ["query", "value"], "use_dora": True}
    ),
    "IA3": Adapter(
        "GPT-2",
        "causal LM",
        "IA3Config",
        {
            "task_type": "CAUSAL_LM",
            "target_modules": ["c_attn", "mlp.c_proj"],
            "feedforward_modules": ["mlp.c_proj"],
            "fan_in_fan_out": True,
        },
    ),
    "prefix": Adapter("GPT-2", "causal LM", "PrefixTuningConfig", {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}),
    "prefix, projected": Adapter(
        "GPT-2",
        "causal LM",
        "PrefixTuningConfig",
        {
            "task_type": "CAUSAL_LM",
            "num_virtual_tokens": 3,
            "prefix_projection": True,
            "encoder_hidden_size": 10,
        },
    ),
    "prompt": Adapter(
        "BERT", "classification", "PromptTuningConfig", {"task_type": "SEQ_CLS", "num_virtual_tokens": 3}
    ),
    "prompt, encoded": Adapter(
        "BERT",
        "classification",
        "PromptEncoderConfig",
        {"task_type": "SEQ_CLS", "num_virtual_tokens": 3, "encoder_hidden_size": 10},
    ),
}


def adapted(name: str) -> Case:
    """A model with an adapter, every parameter of both away from its start; only the adapter's are to be scored."""
    peft = pytest.importorskip("peft")
    chosen = ADAPTERS[name]
    made = entry(chosen.architecture, chosen.head)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = peft.get_peft_model(made.model, getattr(peft, chosen.config)(**chosen.settings))
    return Case(moved(model), made.objective, made.examples)


def checkpointed(model: nn.Module, reentrant: bool) -> None:
    """Let every numbered layer of a model forget its activations and compute them again, in eval mode too."""
    for name, module in model.named_modules():
        if name.split(".")[-1].isdigit():
            module.forward = _forgetting(module.forward, reentrant)


def _forgetting(forward: Callable[..., Any], reentrant: bool) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(functools.partial(forward, **kwargs), *args, use_reentrant=reentrant)

    return run


class Computing(nn.Module):
    """Parts and parameters, and how to compute with them."""

    def __init__(self, forward: Callable[[Any, torch.Tensor], torch.Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.compute = forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.compute(self, x)


def _free(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.full(shape, 0.3))


def _attend(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Attention by einsum over raw parameters of a module that has children."""
    hidden = m.norm(x)
    query, key, value = (torch.einsum("btd,dhk->bhtk", hidden, table) for table in (m.query, m.key, m.value))
    places = torch.arange(x.shape[1])
    weights = (
        torch.einsum("bhtk,bhsk->bhts", query + m.shift[:, None], key) + m.bias[:, (places[:, None] - places).abs()]
    )
    return m.output(torch.einsum("bhts,bhsk,hkd->btd", weights.softmax(-1), value, m.back)) + x


def _tied(m: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = m.layer(m.words(x)).tanh()
    return functional.linear(hidden, m.words.weight) + m.bias


def _again(m: Any, x: torch.Tensor) -> torch.Tensor:
    """A layer called three times, on inputs of other lengths too."""
    return m.layer(m.layer(x).tanh()) + m.layer(x[:, :1])


def _summarised(m: Any, x: torch.Tensor) -> torch.Tensor:
    """A learnt first token, and a gate."""
    hidden = torch.cat([m.first.expand(len(x), -1, -1), x], 1) * m.gate.sigmoid()
    return m.layer(hidden)[:, 0]


def _branches(m: Any, x: torch.Tensor) -> torch.Tensor:
    """One weight in a module, in an operation of its parent and in another module."""
    return m.one(x) @ m.one.weight + m.other(x.tanh())


def _branching() -> nn.Module:
    one, other = nn.Linear(4, 4), nn.Linear(4, 4)
    other.weight = one.weight
    return Computing(_branches, one=one, other=other)


def _forgetful(reentrant: bool) -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        hidden = m.below(x)
        for block in (m.first, m.second, m.first):
            hidden = checkpoint(block, hidden, use_reentrant=reentrant)
        return m.above(hidden)

    def block() -> nn.Module:
        return nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))

    return Computing(forward, below=nn.Linear(4, 4), first=block(), second=block(), above=nn.Linear(4, 3))


def _numbers(*shape: int) -> list[Example]:
    draw = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(shape, generator=draw, dtype=torch.float64)} for _ in LENGTHS]


def _ids(length: int) -> list[Example]:
    draw = torch.Generator().manual_seed(2)
    return [{"x": torch.randint(9, (length,), generator=draw)} for _ in LENGTHS]


MODULES: dict[str, tuple[Callable[[], nn.Module], list[Example]]] = {
    "einsum": (
        lambda: Computing(
            _attend,
            norm=nn.LayerNorm(4),
            output=nn.Linear(4, 4),
            query=_free(4, 2, 3),
            key=_free(4, 2, 3),
            value=_free(4, 2, 3),
            back=_free(2, 3, 4),
            shift=_free(2, 3),
            bias=_free(2, 5),
        ),
        _numbers(5, 4),
    ),
    "head tied by the parent": (
        lambda: Computing(_tied, words=nn.Embedding(9, 4), layer=nn.Linear(4, 4), bias=_free(9)),
        _ids(5),
    ),
    "called three times": (lambda: Computing(_again, layer=nn.Linear(4, 4)), _numbers(5, 4)),
    "learnt first token": (
        lambda: Computing(_summarised, first=_free(1, 1, 4), gate=_free(), layer=nn.Linear(4, 3)),
        _numbers(5, 4),
    ),
    "one weight in three places": (_branching, _numbers(5, 4)),
    "normalised weight": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 2)),
        _numbers(5, 4),
    ),
    "torch's own attention": (
        lambda: nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, norm_first=True),
        _numbers(5, 4),
    ),
    "pictures": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.GroupNorm(2, 4), nn.Tanh(), nn.Conv2d(4, 3, 2, 2)),
        _numbers(2, 6, 8),
    ),
    "reentrant checkpoint": (lambda: _forgetful(True), _numbers(5, 4)),
    "checkpoint that is not reentrant": (lambda: _forgetful(False), _numbers(5, 4)),
}
