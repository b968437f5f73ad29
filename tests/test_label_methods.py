"""Label smoothing, distillation and its teacher-free forms: the losses they make of labels and of teachers."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from architectures import entry
from conftest import IGNORED, Case, Interrupted, batched, built, case, checkpoint, moved, untouched
from torch import Tensor, nn
from torch.nn import functional as F

import fisherscope as fs
from fisherscope.finetune import finetune, trainer, training
from fisherscope.finetune.methods import distillation
from fisherscope.finetune.methods.distillation import Distillation, Remembered, divergence_from, said_by
from fisherscope.finetune.methods.label_smoothing import LabelSmoothing
from fisherscope.finetune.methods.teacher_free import TeacherFreeDistillation, VirtualTeacher
from fisherscope.finetune.regularizer import Regularizer
from fisherscope.models import dropout_sites
from fisherscope.objectives import Predictions, predict

FAMILIES = ("BERT", "RoBERTa", "DeBERTa", "DeBERTa-v2", "XLNet", "BART", "ELECTRA", "GPT-2", "T5")
KINDS = [
    *[(family, "classification") for family in FAMILIES],
    ("BERT", "regression"), ("GPT-2", "regression"), ("BERT", "masked LM"), ("GPT-2", "causal LM"),
    ("T5", "seq2seq LM"), ("BERT", "token classification"), ("BERT", "question answering"),
]  # fmt: skip

LOGITS, TEACHER = (2.0, 0.0, -1.0), (1.0, 0.5, -0.5)


def categorical(*logits: float, label: int = 0) -> Predictions:
    """One label and the logits for it."""
    outputs = torch.tensor([[logits]], dtype=torch.float64)
    return Predictions("categorical", outputs, torch.tensor([[label]]))


def drawn(classes: int = 5, examples: int = 4, tokens: int = 3) -> Predictions:
    """Logits and labels at random, some of them not scored."""
    labels = torch.randint(classes, (examples, tokens))
    labels[0, 1:] = IGNORED
    logits = 3 * torch.randn(examples, tokens, classes, dtype=torch.float64)
    return Predictions("categorical", logits.requires_grad_(), labels)


def constant(outputs: Tensor) -> distillation.Teacher:
    return lambda batch, predictions: outputs


def total(method: Regularizer, predictions: Predictions, model: Any = None, batch: Any = None) -> Tensor:
    """The loss of every example that the method trains with."""
    term = method.penalty(model, batch, predictions)
    assert term is not None
    return predictions.losses().total + term


def gradient(loss: Tensor, predictions: Predictions) -> Tensor:
    return torch.autograd.grad(loss.sum(), predictions.outputs, retain_graph=True)[0]


def each_token(predictions: Predictions, loss: Callable[[Tensor, int], Tensor]) -> Tensor:
    """The sum over the scored tokens of every example of a loss of its logits and label, one after the other."""
    rows = zip(predictions.outputs, predictions.labels, strict=True)
    return torch.stack(
        [sum((loss(z, int(y)) for z, y in zip(*row, strict=True) if y != IGNORED), torch.zeros(())) for row in rows]
    )


def student_and_teacher(family: str, head: str) -> tuple[Case, nn.Module]:
    made = entry(family, head)
    return made, moved(copy.deepcopy(made.model), 1)


# Label smoothing


def test_the_published_example_of_label_smoothing():
    """Logits (2, 0, -1): the loss is 0.16984602, and 0.33651269 with a tenth of the label spread over all classes."""
    predictions = categorical(*LOGITS)
    assert float(predictions.losses().total) == pytest.approx(0.1698460196, abs=1e-10)
    assert float(total(LabelSmoothing(0.1), predictions)) == pytest.approx(0.3365126862, abs=1e-10)


def test_smoothing_over_all_classes_is_that_of_torch():
    predictions = drawn()
    flat = predictions.outputs.flatten(0, 1), predictions.labels.flatten()
    expected = F.cross_entropy(*flat, label_smoothing=0.3, reduction="none").view(4, 3).sum(1)
    torch.testing.assert_close(total(LabelSmoothing(0.3), predictions), expected)


def test_smoothing_over_all_classes_is_that_of_transformers():
    from transformers.trainer_pt_utils import LabelSmoother

    predictions = drawn()
    found = total(LabelSmoothing(0.3), predictions).sum() / predictions.count.sum()
    expected = LabelSmoother(epsilon=0.3)({"logits": predictions.outputs}, predictions.labels)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_smoothing_over_the_others_is_the_entropy_with_that_label(classes: int):
    """1 - a for the label, a / (K - 1) for every other class (arXiv 1909.11723).

    Over all classes that is the weight a K / (K - 1): twice as much for two of them.
    """
    predictions = drawn(classes)

    def entropy(z: Tensor, y: int) -> Tensor:
        target = torch.full_like(z, 0.1 / (classes - 1))
        target[y] = 0.9
        return -(target * z.log_softmax(0)).sum()

    found = total(LabelSmoothing(0.1, "others"), predictions)
    torch.testing.assert_close(found, each_token(predictions, entropy))
    torch.testing.assert_close(found, total(LabelSmoothing(0.1 * classes / (classes - 1)), predictions))


# Distillation from given outputs


@pytest.mark.parametrize(
    ("temperature", "expected"), [(1, 0.2458913333), (2, 0.2790376086), (10, 0.2613344539), (1e4, 0.25)]
)
def test_the_divergence_at_several_temperatures(temperature: float, expected: float):
    """Logits (2, 0, -1), a teacher's (1, 0.5, -0.5); the limit is half the mean square of the centred differences."""
    found = divergence_from(torch.tensor([[TEACHER]], dtype=torch.float64), categorical(*LOGITS), temperature)
    assert float(found) == pytest.approx(expected, abs=1e-4 if temperature == 1e4 else 1e-9)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 20.0])
def test_the_gradient_of_the_divergence_keeps_its_size(temperature: float):
    r"""It is :math:`\tau (p_\tau - t_\tau)`, where without the factor it would be smaller by its square."""
    predictions, teacher = drawn(), torch.randn(4, 3, 5, dtype=torch.float64)
    found = gradient(divergence_from(teacher, predictions, temperature), predictions)
    p, t = ((z / temperature).softmax(-1) for z in (predictions.outputs, teacher))
    scored = (predictions.labels != IGNORED)[..., None]
    torch.testing.assert_close(found, temperature * (p - t) * scored)


def test_at_temperature_1_distillation_is_a_mixture_of_labels():
    """The entropy with (1 - a) label + a t, less the teacher's own entropy a H(t)."""
    predictions, teacher = drawn(), torch.randn(4, 3, 5, dtype=torch.float64)
    t = teacher.softmax(-1)
    mixed = 0.3 * t + 0.7 * F.one_hot(predictions.labels.clamp(min=0), 5)
    by_token = -(mixed * predictions.outputs.log_softmax(-1)).sum(-1) + 0.3 * (t * t.log()).sum(-1)
    expected = torch.where(predictions.labels == IGNORED, 0.0, by_token).sum(1)
    torch.testing.assert_close(total(Distillation(constant(teacher), 0.3, 1.0), predictions), expected)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_a_teacher_of_the_same_opinion_leaves_the_rest_of_the_loss(temperature: float):
    """The divergence is 0, and so is its gradient: both are (1 - a) times those of the labels."""
    predictions = drawn()
    found = total(Distillation(constant(predictions.outputs.detach()), 0.3, temperature), predictions)
    plain = predictions.losses().total
    torch.testing.assert_close(found, 0.7 * plain)
    torch.testing.assert_close(gradient(found, predictions), 0.7 * gradient(plain, predictions))


def test_a_weight_of_1_leaves_the_labels_out():
    predictions, teacher = drawn(), torch.randn(4, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(
        total(Distillation(constant(teacher), 1.0, 2.0), predictions), divergence_from(teacher, predictions, 2.0)
    )


def test_regression_learns_the_numbers_of_the_teacher():
    """(1 - a)(f - y)^2 + a (f - t)^2 at every temperature."""
    f, y, t = torch.randn(3, 4, 1, dtype=torch.float64)
    for temperature in (1.0, 5.0):
        found = total(Distillation(constant(t), 0.3, temperature), Predictions("gaussian", f, y))
        torch.testing.assert_close(found, (0.7 * (f - y) ** 2 + 0.3 * (f - t) ** 2)[:, 0])


# The virtual teacher


def test_the_published_example_of_the_virtual_teacher():
    """Logits (2, 0, -1), probabilities (0.99, 0.005, 0.005): the divergence is 0.13191301."""
    predictions = categorical(*LOGITS)
    outputs = VirtualTeacher(0.99)({}, predictions)
    assert float(divergence_from(outputs, predictions)) == pytest.approx(0.1319130134, abs=1e-10)


@pytest.mark.parametrize(("classes", "expected"), [(2, [0.557, 0.443]), (3, [0.394, 0.303, 0.303])])
def test_the_virtual_teacher_at_temperature_20(classes: int, expected: list[float]):
    """The softmax of log d / 20, which is further from uniform than the published program's of d / 20."""
    outputs = VirtualTeacher(0.99)({}, categorical(*LOGITS[:classes]))
    assert (outputs / 20).softmax(-1)[0, 0].tolist() == pytest.approx(expected, abs=5e-4)
    published = (outputs.exp() / 20).softmax(-1)[0, 0]
    assert float(published[0]) < expected[0] - 0.04


def test_the_virtual_teacher_at_temperature_1_is_label_smoothing_over_the_others():
    """With weight a (1 - c), but for the entropy of the teacher, a constant (arXiv 1909.11723, section 4)."""
    predictions, a, c = drawn(), 0.4, 0.9
    virtual = total(TeacherFreeDistillation(VirtualTeacher(c), a, 1.0), predictions)
    smoothed = total(LabelSmoothing(a * (1 - c), "others"), predictions)
    entropy = -c * math.log(c) - (1 - c) * math.log((1 - c) / 4)
    torch.testing.assert_close(virtual, smoothed - a * entropy * predictions.count)
    torch.testing.assert_close(gradient(virtual, predictions), gradient(smoothed, predictions))


def test_the_virtual_teacher_at_a_higher_temperature_is_another_method():
    """No label smoothing has a gradient in its direction."""
    predictions = drawn()
    virtual = gradient(divergence_from(VirtualTeacher(0.9)({}, predictions), predictions, 5.0), predictions)
    basis = [gradient(total(LabelSmoothing(a), predictions), predictions).flatten() for a in (0.1, 0.9)]
    solution = torch.linalg.lstsq(torch.stack(basis, 1), virtual.flatten()[:, None]).solution
    rest = virtual.flatten() - (torch.stack(basis, 1) @ solution)[:, 0]
    assert float(rest.norm() / virtual.norm()) > 0.1


# On models


def slow(method: str, z: Tensor, y: Any, teacher: Tensor) -> Tensor:
    """The loss of one token by the formulas, for classes that are not ruled out."""
    kept = z > torch.finfo(z.dtype).min
    p, q = z[kept].softmax(0), torch.zeros_like(z[kept])
    q[int(kept[:y].sum())] = 1.0
    if method == "smoothing":
        return -((0.8 * q + 0.2 / len(q)) * p.log()).sum()
    if method == "virtual":
        t = (0.95 * q + 0.05 * (1 - q) / (len(q) - 1)) ** (1 / 3)
        t = t / t.sum()
    else:
        t = (teacher[kept] / 3).softmax(0)
    cold = (z[kept] / 3).softmax(0)
    return 0.6 * -(q * p.log()).sum() + 0.4 * 9 * (t * (t / cold).log()).sum()


@pytest.mark.parametrize("method", ["smoothing", "virtual", "distillation"])
@pytest.mark.parametrize(("family", "head"), [kind for kind in KINDS if kind[1] != "regression"])
def test_losses_and_gradients_are_those_of_the_formulas(family: str, head: str, method: str):
    """Token by token, for examples of unequal length, where padding is neither scored nor a place for an answer."""
    made, teacher = student_and_teacher(family, head)
    batch = batched(made.examples, 4)[0]
    predictions = predict(made.model, batch, made.objective)
    chosen: dict[str, Regularizer] = {
        "smoothing": LabelSmoothing(0.2),
        "virtual": TeacherFreeDistillation(VirtualTeacher(0.95), 0.4, 3.0),
        "distillation": Distillation(teacher, 0.4, 3.0),
    }
    found = total(chosen[method], predictions, made.model, batch)
    said = predict(teacher, batch, made.objective).outputs.detach()
    flat = iter(said[predictions.labels != IGNORED])
    expected = each_token(predictions, lambda z, y: slow(method, z, y, next(flat)))
    torch.testing.assert_close(found, expected.to(found.dtype))
    parameters = [p for p in made.model.parameters() if p.requires_grad]
    ours, theirs, plain = (
        torch.autograd.grad(loss.sum(), parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        for loss in (found, expected, predictions.losses().total)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    assert any(not torch.allclose(a, b) for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_example_has_its_term_whatever_batch_it_is_in(family: str):
    """So that gradients may be accumulated."""
    made, teacher = student_and_teacher(family, "classification")
    for method in (LabelSmoothing(0.2), Distillation(teacher, 0.4, 3.0)):
        found = []
        for size in (1, 4):
            terms = [
                method.penalty(made.model, batch, predict(made.model, batch, made.objective))
                for batch in batched(made.examples, size)
            ]
            found.append(torch.cat([term for term in terms if term is not None]))
        torch.testing.assert_close(*found, rtol=1e-6, atol=1e-8)


def test_the_teacher_is_asked_in_eval_mode_and_stays_as_it_is():
    """With dropout of its own it would say something else every time."""
    made, teacher = student_and_teacher("BERT", "classification")
    assert any(site.rate for site in dropout_sites(teacher, backbone_only=False))
    teacher.train()
    batch = batched(made.examples, 4)[0]
    generator = torch.get_rng_state()
    with untouched(teacher):
        first, second = said_by(teacher, batch), said_by(teacher, batch)
    assert torch.equal(first, second) and not first.requires_grad
    assert torch.equal(torch.get_rng_state(), generator)


# What a teacher said, remembered


@pytest.mark.parametrize(("family", "head"), [kind for kind in KINDS if kind[1] in ("classification", "regression")])
def test_what_a_teacher_said_is_found_again_in_other_batches(family: str, head: str):
    """By the content of an example: in another order, another size, and with more padding."""
    made, teacher = student_and_teacher(family, head)
    remembered = Remembered(teacher, batched(made.examples, 4))
    for batch in [*batched(made.examples[::-1], 3), *batched(made.examples, 1)]:
        predictions = predict(made.model, batch, made.objective)
        torch.testing.assert_close(remembered(batch, predictions), said_by(teacher, batch))


@pytest.mark.parametrize("side", [0, 1])
def test_padding_on_either_side_makes_no_other_example(side: int):
    made, teacher = student_and_teacher("BERT", "classification")
    remembered = Remembered(teacher, batched(made.examples, 2))
    batch = batched(made.examples, 5)[0]
    padded = {n: F.pad(v, (2, 0) if side else (0, 2)) if v.ndim == 2 else v for n, v in batch.items()}
    predictions = predict(made.model, batch, made.objective)
    assert torch.equal(remembered(padded, predictions), remembered(batch, predictions))


def test_an_example_that_the_teacher_was_not_asked_about_is_refused():
    """Other tokens, other token types, or a longer text; another label makes no other example."""
    made, teacher = student_and_teacher("BERT", "classification")
    remembered = Remembered(teacher, batched(made.examples, 2))
    batch = batched(made.examples, 5)[0]
    predictions = predict(made.model, batch, made.objective)
    assert remembered({**batch, "labels": 0 * batch["labels"]}, predictions).shape == (5, 1, 3)
    for name in ("input_ids", "token_type_ids"):
        changed = {**batch, name: batch[name].clone()}
        changed[name][2, 1] += 1
        with pytest.raises(ValueError) as caught:
            remembered(changed, predictions)
        assert str(caught.value) == (
            "The teacher was asked about the training examples only, but a batch holds another one; give the teacher "
            "itself, or all examples as they are trained on."
        )


# Refusals


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: LabelSmoothing(1.0), r"^The weight of label smoothing must be at least 0 and below 1, got 1\.$"),
        (lambda: LabelSmoothing(float("nan")), "must be at least 0 and below 1, got nan"),
        (lambda: LabelSmoothing(over="none"), r"^over must be 'all' or 'others', got 'none'\.$"),  # pyright: ignore
        (lambda: Distillation(VirtualTeacher(), 1.5), r"^The weight of a teacher must be from 0 to 1, got 1\.5\.$"),
        (lambda: Distillation(VirtualTeacher(), 0.5, 0.5), r"^The temperature must be at least 1, got 0\.5\.$"),
        (lambda: Distillation(VirtualTeacher(), 0.5, math.inf), "must be at least 1, got inf"),
        (
            lambda: VirtualTeacher(1.0),
            r"^The confidence of a virtual teacher must be at least 0\.5 and below 1, got 1\.$",
        ),
        (
            lambda: TeacherFreeDistillation.for_run(None, variant="other"),  # pyright: ignore
            r"^variant must be 'self' or 'virtual', got 'other'\.$",
        ),
    ],
)
def test_settings_out_of_range_are_refused(make: Callable[[], object], match: str):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize(
    ("method", "what"),
    [
        (LabelSmoothing(), "Label smoothing"),
        (TeacherFreeDistillation(VirtualTeacher()), "A virtual teacher"),
    ],
)
def test_regression_has_no_classes_to_spread_a_label_over(method: Regularizer, what: str):
    """Where a program that smooths a single logit would leave a loss of 0 and train nothing."""
    made = case("bert-regressor")
    batch = batched(made.examples, 2)[0]
    with pytest.raises(ValueError) as caught:
        method.penalty(made.model, batch, predict(made.model, batch, "regression"))
    assert str(caught.value) == (
        f"{what} needs at least two classes, but this model predicts a number; train it without this method."
    )


@pytest.mark.parametrize("method", [LabelSmoothing(), Distillation(constant(torch.zeros(1, 1, 1)))])
def test_a_single_class_and_losses_of_a_function_are_refused(method: Regularizer):
    """Their divergence would be 0."""
    single = Predictions("categorical", torch.zeros(1, 1, 1), torch.zeros(1, 1, dtype=torch.long))
    losses = Predictions("losses", torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.long))
    for predictions, found in ((single, "has a single output"), (losses, "was given a function for its loss")):
        with pytest.raises(ValueError, match=f"needs at least two classes, but this model {found};"):
            method.penalty(nn.Identity(), {}, predictions)


def test_a_teacher_with_other_labels_is_refused_before_training():
    made = case("bert-classifier")
    optimizer = torch.optim.SGD(made.model.parameters())
    with (
        pytest.raises(ValueError) as caught,
        Distillation(built("bert-classifier", num_labels=4)).applied_to(made.model, optimizer),
    ):
        pass
    assert str(caught.value) == (
        "A teacher must have the outputs of the model, 3, but it has 4; take one for the same labels."
    )
    teacher: Any = copy.deepcopy(made.model)
    model: Any = copy.deepcopy(made.model)
    teacher.config.id2label, model.config.id2label = dict(enumerate("abc")), dict(enumerate("acb"))
    with pytest.raises(ValueError) as caught, Distillation(teacher).applied_to(model, optimizer):
        pass
    assert str(caught.value) == (
        "A teacher must have the classes of the model in their order, a, c, b, but it has a, b, c; take one for the "
        "same labels."
    )
    with Distillation(teacher).applied_to(made.model, optimizer):  # whose classes have no names
        pass


def test_outputs_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"of the shape that the model gives, \[1, 1, 3\], but gives \[1, 1, 2\];"):
        Distillation(constant(torch.zeros(1, 1, 2))).penalty(nn.Identity(), {}, categorical(*LOGITS))


# Whole trainings

SHORT: dict[str, Any] = {"batch_size": 4, "learning_rate": 1e-3, "warmup": 0.0, "progress": False}


def readable(folder: Path) -> Path:
    """The tokenizer of a tiny model splits texts into words."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with dropout."""
    return readable(checkpoint("bert", tmp_path_factory.mktemp("bert")))


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Four steps on texts of unequal length in two classes."""
    draw = np.random.default_rng(0)
    rows = [(" ".join(f"w{i}" for i in draw.integers(90, size=3 + n % 5)), n % 2) for n in range(8)]
    file = tmp_path_factory.mktemp("data") / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    return {**SHORT, "data": file, "objective": "classification", "max_steps": 4}


def weights(folder: Path, run: str = "model-seed-0") -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / run / "model.safetensors")


def differences(one: Path, other: Path) -> list[str]:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


@pytest.fixture(scope="module")
def vanilla(bert: Path, quick: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training without a method."""
    folder = tmp_path_factory.mktemp("runs") / "vanilla"
    finetune(bert, **quick, out=folder, save_model=True)
    return folder


@pytest.fixture(scope="module")
def distilled(bert: Path, quick: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training with the teacher that is fine-tuned first."""
    folder = tmp_path_factory.mktemp("runs") / "distilled"
    finetune(bert, **quick, method="distillation", out=folder, save_model=True)
    return folder


def test_the_teacher_that_is_fine_tuned_first_is_vanilla(
    bert: Path, quick: dict[str, Any], vanilla: Path, distilled: Path, tmp_path: Path
):
    """The model that vanilla leaves, as a teacher by its folder, gives the same weights bit for bit."""
    named = tmp_path / "named"
    settings = {"teacher": str(vanilla / "model-seed-0")}
    finetune(bert, **quick, method="distillation", settings=settings, out=named, save_model=True)
    assert differences(named, distilled) == []
    assert len(differences(vanilla, distilled)) > 10
    config = yaml.safe_load((named / "config.yaml").read_text())
    assert config["settings"]["distillation"]["teacher"] == "model-seed-0"


@pytest.mark.slow
def test_distillation_from_the_model_itself_is_distillation_without_a_teacher_given(
    bert: Path, quick: dict[str, Any], distilled: Path, tmp_path: Path
):
    finetune(bert, **quick, method="teacher-free-distillation", out=tmp_path / "self", save_model=True)
    assert differences(tmp_path / "self", distilled) == []


@pytest.mark.parametrize("method", ["label-smoothing", "distillation", "teacher-free-distillation"])
def test_weight_0_is_vanilla_bit_for_bit_and_trains_no_teacher(
    method: str,
    bert: Path,
    quick: dict[str, Any],
    vanilla: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(training, "_fine_tuned", lambda *_: pytest.fail("a teacher was trained"))
    finetune(bert, **quick, method=method, settings={"weight": 0.0}, out=tmp_path / "run", save_model=True)
    assert differences(tmp_path / "run", vanilla) == []


def test_the_virtual_teacher_is_no_model(
    bert: Path, quick: dict[str, Any], vanilla: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(training, "_fine_tuned", lambda *_: pytest.fail("a teacher was trained"))
    finetune(bert, **quick, method="teacher-free-distillation", settings={"variant": "virtual"},
             out=tmp_path / "run", save_model=True)  # fmt: skip
    assert len(differences(tmp_path / "run", vanilla)) > 10


@pytest.mark.slow
def test_a_training_that_stopped_goes_on_with_its_teacher(
    bert: Path, quick: dict[str, Any], distilled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It is not trained again, and the weights are those of a training that did not stop."""
    asked = []

    class Stops(Remembered):
        def __call__(self, batch: Any, predictions: Predictions) -> Tensor:
            asked.append(1)
            if len(asked) == 4:
                raise Interrupted
            return super().__call__(batch, predictions)

    options: dict[str, Any] = {**quick, "method": "distillation", "out": tmp_path / "run", "save_model": True}
    with monkeypatch.context() as patch:
        patch.setattr(distillation, "Remembered", Stops)
        patch.setattr(trainer, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
        with pytest.raises(Interrupted):
            finetune(bert, **options)
    assert (tmp_path / "run" / "seed-0.part" / "teacher" / "model" / "config.json").exists()
    trained = []
    make = training.make_trainer
    monkeypatch.setattr(training, "make_trainer", lambda *given: (trained.append(given[2].name), make(*given))[1])
    finetune(bert, **options, resume=True)
    assert trained == ["seed-0.part"]
    assert differences(tmp_path / "run", distilled) == []
    assert not (tmp_path / "run" / "seed-0.part").exists()


def test_a_language_model_learns_from_a_teacher_in_memory(tmp_path: Path):
    """From one that says the same, without dropout: of the first loss only the part of the labels is left."""
    made = checkpoint("gpt2", tmp_path / "model", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    folder = readable(made)
    texts = tmp_path / "texts.txt"
    texts.write_text("w1 w2 w3 w4\nw5 w6\nw7 w8 w9\nw4 w3 w2 w1 w7\n")
    options: dict[str, Any] = {**SHORT, "data": texts, "objective": "causal-lm", "max_steps": 1}
    plain = finetune(folder, **options)
    settings = {"teacher": str(folder), "weight": 0.75}
    results = finetune(folder, **options, method="distillation", settings=settings)
    losses = [run.losses[0]["loss"] for run in (plain.runs[0], results.runs[0])]
    assert losses[1] == pytest.approx(0.25 * losses[0], rel=1e-5)


def test_a_saved_teacher_must_fit(bert: Path, quick: dict[str, Any], tmp_path: Path):
    """The objective of its head, its number of classes, and its vocabulary."""
    three, words = (
        readable(checkpoint("bert-classifier", tmp_path / name, num_labels=n)) for name, n in (("a", 3), ("b", 2))
    )
    tokenizer: Any = fs.load_model(words)[1]
    tokenizer.add_tokens("another")
    tokenizer.save_pretrained(words)
    for teacher, sentence in (
        (bert, f"The teacher {str(bert)!r} was saved with a head for mlm, but the training is for classification; "
         "take a model that was fine-tuned for it, or leave teacher out."),
        (three, "A teacher must have the outputs of the model, 2, but it has 3; take one for the same labels."),
        (words, f"A teacher reads the tokens of the model, but {str(words)!r} has another vocabulary; take a teacher "
         "with the model's own tokenizer."),
    ):  # fmt: skip
        with pytest.raises(ValueError) as caught:
            finetune(bert, **quick, method="distillation", settings={"teacher": str(teacher)})
        assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (
            "label-smoothing",
            {},
            r"^label-smoothing is not for regression: it needs classes to spread",
        ),
        (
            "teacher-free-distillation",
            {"variant": "virtual"},
            r"^A virtual teacher needs classes, which ",
        ),
    ],
)
def test_what_needs_classes_refuses_regression_before_the_training(method, settings, message, monkeypatch):
    monkeypatch.setattr(training, "_fit", lambda *_: pytest.fail("it trains"))
    options = {"task": "builtin:similarity", "train_size": 8, "max_steps": 1, "progress": False}
    with pytest.raises(ValueError, match=message):
        finetune("builtin:bert", **options, method=method, settings=settings)


def test_a_number_of_minus_100_is_a_label_like_others(tmp_path):
    """The loss of a step is the mean over all four examples; that number alone gives it nearly all of its size."""
    (tmp_path / "train.tsv").write_text("text\tlabel\n" + "".join(f"a text\t{y}\n" for y in (-100.0, 0.0, 0.0, 0.0)))
    options = {"objective": "regression", "batch_size": 4, "max_steps": 1, "progress": False}
    (run,) = finetune("builtin:bert", data=tmp_path / "train.tsv", **options).runs
    assert run.losses[0]["loss"] == pytest.approx(100**2 / 4, rel=0.05)
