"""Per-example losses against the formula applied to full logits."""

import math
from collections import Counter

import pytest
import reference
import torch
from architectures import ARCHITECTURES, HEADS_BY_NAME, entry
from conftest import IGNORED, VOCABULARY, batched, built, case, untouched
from reference import Objective
from torch import Tensor, nn

from fisherscope.objectives import ExampleLosses, example_losses, is_language_model, num_scored, reference_losses

FAMILIES = ("bert", "gpt2", "t5", "llama", "albert", "bert-classifier", "bert-regressor")


class Output:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class Plain(nn.Module):
    """Logits and nothing else of a Hugging Face model."""

    def __init__(self, outputs: int = 7) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, outputs)

    def forward(self, input_ids: Tensor) -> Output:
        return Output(self.head(self.table(input_ids)))


@pytest.mark.parametrize("name", FAMILIES)
def test_losses_are_those_of_every_example_alone(name: str):
    made = case(name)
    wanted = [reference.example_loss(made.model, e, made.objective, "sum") for e in made.examples]
    counts = [reference.number_scored(e, made.objective) for e in made.examples]
    losses = example_losses(made.model, batched(made.examples, 8)[0], made.objective)
    torch.testing.assert_close(losses.total, torch.stack(wanted), rtol=1e-9, atol=0)
    assert losses.count.tolist() == counts
    torch.testing.assert_close(losses.mean, losses.total / torch.tensor(counts), rtol=1e-12, atol=0)


@pytest.mark.parametrize("head", HEADS_BY_NAME)
def test_scored_labels_are_counted_alike_with_and_without_running_the_model(head: str):
    made = entry(next(name for name, family in ARCHITECTURES.items() if head in family.heads), head)
    (batch,) = batched(made.examples, 8)
    losses = example_losses(made.model, batch, made.objective)
    assert num_scored(batch, made.objective).tolist() == losses.count.tolist()


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_example_without_a_scored_token_has_no_loss(name: str):
    made = case(name)
    silent = {**made.examples[1], "labels": torch.full_like(made.examples[1]["labels"], IGNORED)}
    losses = example_losses(made.model, batched([made.examples[0], silent], 2)[0], made.objective)
    assert losses.count.tolist()[1] == 0
    assert losses.total.tolist()[1] == losses.mean.tolist()[1] == 0.0
    assert losses.total[0] > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_batch_and_model_are_left_alone(name: str):
    made = case(name)
    batch = batched(made.examples, 8)[0]
    before = {key: value.clone() for key, value in batch.items()}
    with untouched(made.model):
        example_losses(made.model, batch, made.objective)
    assert list(batch) == list(before)
    assert all(torch.equal(batch[key], before[key]) for key in before)


def test_full_logits_give_the_same_losses():
    """A model whose vocabulary projection cannot be found, with one example scored at every position."""
    model = Plain().double()
    labels = torch.tensor([[1, 2, 3, 4], [5, IGNORED, 6, IGNORED], [IGNORED, IGNORED, IGNORED, 1]])
    batch = {"input_ids": torch.tensor([[0, 1, 2, 3], [3, 4, 5, 6], [6, 5, 4, 3]]), "labels": labels}
    examples = [{key: value[n] for key, value in batch.items()} for n in range(3)]
    wanted = torch.stack([reference.example_loss(model, example, "mlm", "sum") for example in examples])
    torch.testing.assert_close(example_losses(model, batch, "mlm").total, wanted)


def test_only_scored_positions_reach_the_vocabulary():
    made, widths = case("bert"), []
    handle = made.model.get_output_embeddings().register_forward_hook(lambda m, i, o: widths.append(o.shape[1]))
    losses = example_losses(made.model, batched(made.examples, 8)[0], "mlm")
    handle.remove()
    assert widths == [int(losses.count.max())]
    assert widths[0] < 9


def test_given_decoder_inputs_are_used():
    made = case("t5")
    batch = batched(made.examples, 8)[0]
    shifted = made.model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
    given = example_losses(made.model, {**batch, "decoder_input_ids": shifted}, "seq2seq-lm")
    assert torch.equal(given.total, example_losses(made.model, batch, "seq2seq-lm").total)
    other = example_losses(made.model, {**batch, "decoder_input_ids": torch.ones_like(shifted)}, "seq2seq-lm")
    assert not torch.equal(given.total, other.total)


def test_half_precision_logits_are_scored_in_float32():
    made = case("bert")
    made.model.bfloat16()
    assert example_losses(made.model, batched(made.examples, 8)[0], "mlm").total.dtype == torch.float32


def test_function_returns_the_losses():
    model = nn.Linear(3, 1)
    x = torch.randn(4, 3)
    losses = example_losses(model, {"x": x}, lambda m, b: m(b["x"])[:, 0])
    assert torch.equal(losses.total, model(x)[:, 0])
    assert losses.count.tolist() == [1, 1, 1, 1]


def test_unlabelled_example_is_not_scored():
    batch = {"input_ids": torch.tensor([[1, 2], [3, 4]]), "labels": torch.tensor([2, IGNORED])}
    model = built("bert-classifier")
    assert example_losses(model, batch, "classification").count.tolist() == [1, 0]


@pytest.mark.parametrize("labels", [torch.zeros(2, 1), torch.zeros(2, 2), torch.zeros(3)])
def test_regression_never_broadcasts_labels(labels: Tensor):
    batch = {"input_ids": torch.tensor([[1, 2], [3, 4]]), "labels": labels}
    with pytest.raises(ValueError, match="regression"):
        example_losses(built("bert-regressor"), batch, "regression")


@pytest.mark.parametrize("count", [1, 2, 3])
def test_regression_never_broadcasts_several_outputs(count: int):
    batch = {"input_ids": torch.ones(count, 2, dtype=torch.long), "labels": torch.zeros(count)}
    with pytest.raises(ValueError, match="regression"):
        example_losses(built("bert-classifier"), batch, "regression")


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_labels_shorter_or_longer_than_the_logits_are_refused(name: str):
    made = case(name)
    batch = batched(made.examples, 8)[0]
    if name == "t5":
        batch["decoder_input_ids"] = made.model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
    for labels in (batch["labels"][:, :-1], torch.cat([batch["labels"], batch["labels"]], dim=1)):
        with pytest.raises(ValueError, match=r"(?i)labels"):
            example_losses(made.model, {**batch, "labels": labels}, made.objective)


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_what_a_language_model_is_compared_with(name: str):
    made = case(name)
    labels = [e["labels"][1:] if made.objective == "causal-lm" else e["labels"] for e in made.examples]
    counts = Counter(int(label) for row in labels for label in row if label != IGNORED)
    entropy = -sum(n / counts.total() * math.log(n / counts.total()) for n in counts.values())
    found = reference_losses(made.model, batched(made.examples, 3), made.objective)
    assert found == {"uniform": math.log(VOCABULARY), "unigram": pytest.approx(entropy, rel=1e-12)}


@pytest.mark.parametrize("objective", ["classification", "regression", lambda m, b: b["x"]])
def test_nothing_to_compare_other_losses_with(objective: Objective):
    assert reference_losses(nn.Linear(1, 1), [], objective) == {}


def test_which_objectives_are_in_nats_per_token():
    assert all(map(is_language_model, ("mlm", "causal-lm", "seq2seq-lm")))
    assert not any(map(is_language_model, ("classification", "regression", lambda m, b: b["x"])))


def test_mean_is_per_scored_token():
    losses = ExampleLosses(torch.tensor([6.0, 0.0]), torch.tensor([3, 0]))
    assert losses.mean.tolist() == [2.0, 0.0]
