"""The ways to take one Fisher step that `fisher.py` compares, and the models and batches they take it on."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import torch
import transformers
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from fisherscope.fisher import compiled, hooks_engine, loop_engine
from fisherscope.objectives import example_losses

Batch = dict[str, Tensor]
Sums = dict[str, Tensor]
Run = Callable[[], object]

# Examples a peer sees at once on a CPU: it holds a gradient of the whole model for each, 0.4 GiB for BERT-base.
PEER_CHUNK = 8

FAMILIES = {
    "bert": ("BertForMaskedLM", "mlm", {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
    "gpt2": (
        "GPT2LMHeadModel",
        "causal-lm",
        {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "seq2seq-lm",
        {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12, "dropout_rate": 0.0, "use_cache": False}
        | {"decoder_start_token_id": 0},
    ),
}
TINY = {
    "bert": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
}
TINY_VOCABULARY = 199


@dataclass(frozen=True)
class Case:
    """A model and the shape of a batch for it; T5 reads ``length`` tokens and writes ``target``."""

    family: str
    batch_size: int
    length: int
    target: int = 0

    @property
    def objective(self) -> str:
        return FAMILIES[self.family][1]

    def model(self, device: str, tiny: bool = False) -> nn.Module:
        """Random weights; those of a tiny model are all moved away from their initial 0 or 1."""
        name, _, settings = FAMILIES[self.family]
        if tiny:
            settings = settings | TINY[self.family] | {"vocab_size": TINY_VOCABULARY}
            settings |= {"bos_token_id": 1, "eos_token_id": 1} if self.family == "gpt2" else {}
        kind = getattr(transformers, name)
        torch.manual_seed(0)
        model = kind(kind.config_class(**settings)).eval()
        if tiny:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.1 * torch.randn_like(parameter)
        return model.to(device)

    def batch(self, device: str, tiny: bool = False) -> Batch:
        """Random tokens without padding; every example has a label."""
        torch.manual_seed(self.batch_size)
        low, high = (2, TINY_VOCABULARY) if tiny else (1000, 30000)
        ids = torch.randint(low, high, (self.batch_size, self.length))
        labels = ids
        if self.family == "bert":
            labels = torch.where(torch.rand(ids.shape) < 0.15, ids, -100)
            labels[:, 1] = ids[:, 1]
        if self.family == "t5":
            labels = torch.randint(low, high, (self.batch_size, self.target))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        return {name: value.to(device) for name, value in batch.items()}


@dataclass(frozen=True)
class Candidate:
    """One way to do it.

    Attributes:
        start: ``(model, batch, objective, sums) -> run``; a run adds the squared gradients of the batch to the sums.
        model: What becomes of the model before.
        note: What the reader of the numbers should know.
        scores: Whether it computes scores at all.
    """

    start: Callable[[nn.Module, Batch, str, Sums], Run]
    model: Callable[[nn.Module], nn.Module] = lambda model: model
    note: str = ""
    scores: bool = True


def zeros(model: nn.Module) -> Sums:
    return {name: torch.zeros_like(p) for name, p in model.named_parameters()}


def plain(model: nn.Module, batch: Batch, objective: str, sums: Sums) -> Run:
    def run() -> None:
        model.zero_grad(set_to_none=True)
        model(**batch).loss.backward()

    return run


def plain_scored_rows(model: nn.Module, batch: Batch, objective: str, sums: Sums) -> Run:
    def run() -> None:
        model.zero_grad(set_to_none=True)
        example_losses(model, batch, objective).mean.sum().backward()

    return run


def fisherscope(model: nn.Module, batch: Batch, objective: str, sums: Sums) -> Run:
    add = hooks_engine(model, objective)
    return lambda: add(batch, sums)


def in_chunks(model: nn.Module, batch: Batch, objective: str, sums: Sums) -> Run:
    add = hooks_engine(model, objective)

    def run() -> None:
        with mock.patch.object(compiled, "kernel", return_value=None):
            add(batch, sums)

    return run


def loop(model: nn.Module, batch: Batch, objective: str, sums: Sums) -> Run:
    add = loop_engine(model, objective)
    return lambda: add(batch, sums)


def vmap_of_grad(model: nn.Module, batch: Batch, objective: str, sums: Sums) -> Run:
    """As fast as it goes: eager attention, since sdpa has no batching rule, and masks that no code looks into."""
    inputs, labels = _inputs(model, batch, objective)
    del inputs["attention_mask"]
    length = labels.shape[1]
    if objective == "causal-lm":
        inputs["attention_mask"] = _causal(length, model).expand(len(labels), 1, length, length)
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights: Sums, example: Batch, label: Tensor) -> Tensor:
        single = {name: value.unsqueeze(0) for name, value in example.items()}
        return F.cross_entropy(functional_call(model, weights, kwargs=single).logits[0].float(), label)

    per_example = vmap(grad(loss), in_dims=(None, 0, 0))

    def run() -> None:
        before = model.config._attn_implementation
        model.set_attn_implementation("eager")
        for part, label in _parts(inputs, labels):
            gradients = per_example(weights, part, label)
            while gradients:
                name, gradient = gradients.popitem()
                sums[name].add_(gradient.square_().sum(0))
        model.set_attn_implementation(before)

    return run


def opacus(model: nn.Module, batch: Batch, objective: str, sums: Sums) -> Run:
    """Its hooks mode, squared; with position ids for every example, without which their gradient is wrong."""
    from opacus.grad_sample import GradSampleModule

    inputs, labels = _inputs(model, batch, objective)
    if objective != "seq2seq-lm":
        ids = inputs["input_ids"]
        inputs["position_ids"] = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    if objective == "mlm":
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    own = copy.deepcopy(model).train()  # it records nothing in eval mode; there is no dropout
    wrapped = GradSampleModule(own, batch_first=True, loss_reduction="sum")

    def run() -> None:
        for part, label in _parts(inputs, labels):
            losses = F.cross_entropy(wrapped(**part).logits.float().transpose(1, 2), label, reduction="none")
            (losses.sum(1) / (label != -100).sum(1)).sum().backward()
            for name, parameter in own.named_parameters():
                if parameter.grad_sample is not None:
                    sums[name].add_(parameter.grad_sample.square_().sum(0))
                parameter.grad_sample = parameter.grad = None

    return run


def untied(model: nn.Module) -> nn.Module:
    """A copy whose vocabulary projection has weights of its own."""
    model = copy.deepcopy(model)
    head = model.get_output_embeddings()
    for name, parameter in list(head.named_parameters(recurse=False)):
        setattr(head, name, nn.Parameter(parameter.detach().clone()))
    return model


CANDIDATES = {
    "plain": Candidate(plain, scores=False, note="forward and backward pass of the batch, no scores"),
    "plain, scored rows only": Candidate(
        plain_scored_rows, scores=False, note="the same, only labelled positions reach the vocabulary"
    ),
    "fisherscope": Candidate(fisherscope),
    "fisherscope, no compiler": Candidate(in_chunks, note="products by torch, in a block that stays in the cache"),
    "loop": Candidate(loop, note="one backward pass per example"),
    "vmap(grad)": Candidate(vmap_of_grad, note="eager attention, no padding mask: it fails otherwise"),
    "Opacus": Candidate(opacus, note="hooks, squared; position ids per example"),
    "Opacus, untied": Candidate(opacus, untied, "another model: head and table have weights of their own"),
}


def candidates_for(case: Case, device: str) -> list[str]:
    """The candidates of a case; untying is for BERT, where Opacus fails otherwise."""
    left_out = {"Opacus, untied": case.family != "bert", "fisherscope, no compiler": device != "cpu"}
    return [name for name in CANDIDATES if not left_out.get(name)]


def _inputs(model: nn.Module, batch: Batch, objective: str) -> tuple[Batch, Tensor]:
    """Inputs, and labels by output position."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    labels = batch["labels"]
    if objective == "seq2seq-lm":
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)
    return inputs, F.pad(labels[:, 1:], (0, 1), value=-100) if objective == "causal-lm" else labels


def _parts(inputs: Batch, labels: Tensor) -> list[tuple[Batch, Tensor]]:
    size = PEER_CHUNK if labels.device.type == "cpu" else len(labels)
    pieces = [slice(start, start + size) for start in range(0, len(labels), size)]
    return [({name: value[piece] for name, value in inputs.items()}, labels[piece]) for piece in pieces]


def _causal(length: int, model: nn.Module) -> Tensor:
    weight = next(model.parameters())
    lowest = torch.full((length, length), torch.finfo(weight.dtype).min, dtype=weight.dtype, device=weight.device)
    return lowest.triu(1)
