"""Several tasks at once: who is drawn how often, what a step moves, and what is measured."""

import copy
import json
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from architectures import entry
from conftest import batched, kill_when
from safetensors.torch import load_file

import fisherscope as fs
from fisherscope.cli import main
from fisherscope.finetune import METHODS, Applied, finetune, plan, training
from fisherscope.finetune.callback import STATE_FILE
from fisherscope.finetune.methods.lnsr import LNSR
from fisherscope.finetune.methods.r3f import R3F, R4F
from fisherscope.finetune.methods.smart import SMART
from fisherscope.finetune.multitask import SharedBackbone, shares, step_order
from fisherscope.finetune.parts import before_steps
from fisherscope.models import dropout_sites, infer_objective, load_model, new_parameters
from fisherscope.objectives import predict

BERT = "builtin:bert"
TASKS = ["builtin:acceptability", "builtin:similarity", "builtin:topic"]
QUICK = {"batch_size": 4, "learning_rate": 1e-3, "warmup": 0.0, "max_length": 24, "progress": False}
MINBERT = (8_544, 141_498, 6_040)


def small_task(name, split, **options):
    """Splits of 24, 16 and 8 examples, to be quick."""
    source = fs.read_task(name, split, **options)
    size = (24, 16, 8)[TASKS.index(name)]
    return replace(source, texts=source.texts[:size], labels=source.labels[:size])


@pytest.fixture(autouse=True)
def small_tasks(monkeypatch):
    """Every task is small."""
    monkeypatch.setattr(plan, "read_task", small_task)


@pytest.fixture(scope="module")
def without_dropout(tmp_path_factory):
    """The built-in model without dropout, as a folder."""
    folder = tmp_path_factory.mktemp("model")
    model, tokenizer = load_model(BERT)
    for site in dropout_sites(model, backbone_only=False):
        site.set_rate(0.0)
    for key in [key for key in model.config.to_dict() if key.endswith("dropout_prob")]:
        setattr(model.config, key, 0.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Notes(fs.Regularizer):
    """The start of a training, the gradients of every step, and the batches of every pass."""

    def __init__(self):
        self.start, self.gradients, self.batches, self.values = {}, [], [], []

    @contextmanager
    def applied_to(self, model, optimizer):
        def note():
            self.gradients.append(
                {n: p.grad if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
            )
            self.values.append({n: p.detach().clone() for n, p in model.named_parameters()})

        self.start = {name: p.detach().clone() for name, p in model.named_parameters()}
        with before_steps(optimizer, note):
            yield Applied()

    def penalty(self, model, batch, predictions):
        self.batches.append((model.config.num_labels, {name: t.clone() for name, t in batch.items()}))


def noted(model=BERT, **settings):
    notes = Notes()
    results = finetune(model, tasks=TASKS, method=notes, **QUICK | settings)
    return notes, results


class TestOrder:
    @pytest.mark.parametrize(
        ("exponent", "expected"),
        [(1, (0.054738, 0.906517, 0.038696)), (0.5, (0.169127, 0.688267, 0.142202)), (0, (1 / 3, 1 / 3, 1 / 3))],
    )
    def test_shares_are_powers_of_the_sizes(self, exponent, expected):
        """The trio of minBERT: with 1 Quora dominates, with 0 all are alike."""
        weights = [size**exponent for size in MINBERT]
        assert shares(MINBERT, exponent) == pytest.approx([w / sum(weights) for w in weights])
        assert shares(MINBERT, exponent) == pytest.approx(expected, abs=1e-3)

    @pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
    def test_tasks_are_drawn_by_their_shares(self, exponent):
        """Within four standard deviations of 4000 draws."""
        sizes, steps = (100, 400, 25), 4000
        tasks = np.digitize(step_order(sizes, exponent, steps, 1, 0)[:, 0], np.cumsum(sizes))
        for number, share in enumerate(shares(sizes, exponent)):
            assert abs((tasks == number).mean() - share) < 4 * (share * (1 - share) / steps) ** 0.5

    def test_a_step_is_on_one_task(self):
        sizes = (10, 30)
        tasks = np.digitize(step_order(sizes, 1.0, 200, 8, 0), np.cumsum(sizes))
        assert (tasks == tasks[:, :1]).all()
        assert set(tasks[:, 0]) == {0, 1}

    def test_a_pass_over_a_task_has_every_example_once(self):
        sizes = (12, 20)
        served = step_order(sizes, 1.0, 60, 4, 0).ravel()
        for start, size in ((0, 12), (12, 20)):
            mine = [i - start for i in served if start <= i < start + size]
            passes = [mine[i : i + size] for i in range(0, len(mine) - size + 1, size)]
            assert len(passes) > 3
            assert all(sorted(found) == list(range(size)) for found in passes)
            assert passes[0] != passes[1]

    def test_the_seed_decides_it(self):
        torch.rand(2)
        one, again, other = (step_order((9, 9), 1.0, 30, 2, seed).tolist() for seed in (0, 0, 1))
        assert one == again != other

    def test_a_task_that_is_never_drawn_is_no_trouble(self):
        assert step_order((1, 1000), 1.0, 1, 1, 0).shape == (1, 1)


FAMILIES = ("BERT", "RoBERTa", "DeBERTa", "DeBERTa-v2", "XLNet", "BART", "ELECTRA", "GPT-2", "T5")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_with_a_shared_backbone_says_what_it_says_alone(name):
    """Both tasks, through the one model that trains; no parameter twice, and the other head gets no gradient."""
    case = entry(name, "classification")
    first, batch = case.model, batched(case.examples, 3)[0]
    torch.manual_seed(1)
    config = copy.deepcopy(first.config)
    config.num_labels = 5
    second = type(first)(config).to(first.dtype)
    prefix = first.base_model_prefix
    getattr(second, prefix).load_state_dict(getattr(first, prefix).state_dict())
    batch = {key: value for key, value in batch.items()} | {"labels": batch["labels"] % 2}
    alone = [copy.deepcopy(model).eval() for model in (first, second)]
    plans = [replace(_plan(), name=task, objective="classification") for task in ("a", "b.c")]
    shared = SharedBackbone(plans, [first.eval(), second.eval()], [[], []], 1.0)
    names = [n for n, _ in shared.whole.named_parameters()]
    assert len(names) == len({id(p) for p in shared.whole.parameters()})
    heads = [n for n in names if n.startswith("other_tasks.b_c.")]
    assert heads
    for number, model in enumerate(alone):
        with shared.of(batch | {"task": torch.tensor([number] * len(batch["labels"]))}) as (objective, inputs):
            shared.whole.zero_grad()
            found = predict(shared.whole, inputs, objective)
            found.losses().total.sum().backward()
        assert torch.equal(found.outputs, predict(model, batch, "classification").outputs)
        assert found.outputs.shape[-1] == (first.config.num_labels, 5)[number]
        assert all((shared.whole.get_parameter(n).grad is None) == (number == 0) for n in heads)
    before = {n: p.detach().clone() for n, p in alone[1].named_parameters()}
    separate = shared.separate()["b.c"]
    assert same(before, {n: p.detach() for n, p in separate.named_parameters()})
    assert not any(n.startswith("other_tasks") for n, _ in shared.whole.named_parameters())
    assert "forward" not in vars(shared.whole)


def _plan():
    source = fs.read_source("builtin:similarity", objective="regression")
    return plan.Plan(
        BERT, None, "cpu", "regression", "x", "pearson", source, None, None, 0, None, plan.Recipe(), "vanilla"
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two epochs of three tasks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "read_task", small_task)
        folder = tmp_path_factory.mktemp("run") / "out"
        notes, results = noted(epochs=2, out=folder, save_model=True)
    return notes, results, folder


class TestTraining:
    def test_one_task_is_that_task_alone(self, tmp_path):
        """Bit for bit."""
        for name, settings in {"list": {"tasks": TASKS[1:2]}, "alone": {"task": TASKS[1]}}.items():
            finetune(BERT, **settings, out=tmp_path / name, save_model=True, max_steps=2, **QUICK)
        one, other = (load_file(tmp_path / n / "model-seed-0" / "model.safetensors") for n in ("list", "alone"))
        assert same(one, other)

    def test_heads_begin_as_they_do_alone(self, run):
        for task, name in zip(
            TASKS, ("", "other_tasks.builtin_similarity.", "other_tasks.builtin_topic."), strict=True
        ):
            labels = {"builtin:acceptability": 2, "builtin:topic": 6}.get(task)
            labels = labels and len(fs.read_task(task).label_names)
            objective = "classification" if labels else "regression"
            alone = load_model(BERT, objective=objective, num_labels=labels)[0]
            assert torch.equal(run[0].start[f"{name}classifier.weight"], alone.classifier.weight)

    def test_an_epoch_has_the_steps_of_all_tasks(self, run):
        notes, results, _ = run
        assert [(row["step"], row["epoch"]) for row in results.runs[0].evaluations] == [(12, 1.0), (24, 2.0)]
        assert len(notes.gradients) == 24

    def test_a_step_moves_the_head_of_its_task_only(self, run):
        """Other heads have no gradient, so that decay and moments leave them bit for bit."""
        notes = run[0]
        heads = ["classifier.weight", "other_tasks.builtin_similarity.classifier.weight",
                 "other_tasks.builtin_topic.classifier.weight"]  # fmt: skip
        seen = set()
        for step, gradients in enumerate(notes.gradients[:-1]):
            (mine,) = [name for name in heads if gradients[name] is not None]
            seen.add(mine)
            for name in heads:
                assert torch.equal(notes.values[step][name], notes.values[step + 1][name]) == (name != mine)
        assert seen == set(heads)

    def test_a_regularizer_sees_the_model_of_the_task(self, run):
        """With as many outputs as the task has classes, and 1 for numbers."""
        for outputs, batch in run[0].batches:
            assert (outputs == 1) == batch["labels"].is_floating_point()
            assert "task" not in batch

    def test_a_gradient_is_that_of_the_task_alone(self, without_dropout):
        notes, _ = noted(without_dropout, max_steps=3)
        for step in range(3):
            outputs, batch = notes.batches[step]
            objective = "regression" if outputs == 1 else "classification"
            model = load_model(without_dropout, objective=objective, num_labels=outputs)[0]
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if name.startswith("bert."):
                        p.copy_(notes.values[step][name])
                head = {1: "other_tasks.builtin_similarity.", 2: ""}.get(outputs, "other_tasks.builtin_topic.")
                for name, p in model.classifier.named_parameters():
                    p.copy_(notes.values[step][f"{head}classifier.{name}"])
            predict(model, batch, objective).losses().total.mean().backward()
            gradient = notes.gradients[step]["bert.encoder.layer.1.output.dense.weight"]
            norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
            expected = model.bert.encoder.layer[1].output.dense.weight.grad * min(1.0, 1.0 / (float(norm) + 1e-6))
            assert torch.allclose(gradient, expected, rtol=1e-3, atol=1e-6)

    def test_accumulation_changes_no_gradient(self, without_dropout):
        at_once, in_parts = (
            noted(without_dropout, max_steps=1, batch_size=size, accumulate=4 // size)[0].gradients[0]
            for size in (4, 1)
        )
        for name, expected in at_once.items():
            assert (expected is None) == (in_parts[name] is None)
            assert expected is None or torch.allclose(in_parts[name], expected, rtol=1e-4, atol=1e-6)

    def test_new_heads_are_no_anchors(self):
        """All heads count as new, so that no proximity method pulls to their random values."""
        models = [load_model(BERT, objective="classification", num_labels=n)[0] for n in (2, 3)]
        SharedBackbone([_plan(), replace(_plan(), name="y")], models, [[], []], 1.0)
        new = set(new_parameters(models[0]))
        assert {"classifier.weight", "other_tasks.y.classifier.weight"} <= new
        assert "other_tasks.y.bert.pooler.dense.weight" not in new


class TestResults:
    def test_the_main_metric_is_the_mean_of_the_tasks(self, run):
        _, results, _ = run
        last = results.runs[0].evaluations[-1]
        own = [last[f"{task}.{fs.TASKS[task].metrics[0]}"] for task in TASKS]
        assert results.metric == "mean"
        assert results.values()[0] == pytest.approx(sum(own) / 3)
        assert results.task == "+".join(TASKS)
        assert results.settings["sampling_exponent"] == 1.0

    def test_the_saved_models_open_without_us_and_say_the_same(self, run):
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        _, _, folder = run
        rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
        for task in TASKS:
            saved = folder / f"model-seed-0-{task.removeprefix('builtin:')}"
            assert not any(name.startswith("other_tasks") for name in load_file(saved / "model.safetensors"))
            model = AutoModelForSequenceClassification.from_pretrained(saved).eval()
            texts = list(zip(*small_task(task, "validation").texts, strict=True))
            inputs = AutoTokenizer.from_pretrained(saved)(
                *map(list, texts), padding=True, truncation=True, max_length=24, return_tensors="pt"
            )
            with torch.no_grad():
                logits = model(**inputs).logits
            found = [row["predicted"] for row in rows if row["task"] == task]
            expected = logits[:, 0].tolist() if model.config.num_labels == 1 else logits.argmax(-1).tolist()
            assert found == pytest.approx(expected, abs=1e-4)


SETTINGS = {
    "fish-mask": {"keep": 0.05},
    "recadam": {"gamma": 100.0},
    "top-k-layers": {"layers": 1},
    "weights-mixup": {"splits": 1, "search_epochs": 0.2},
}
UNFIT = {
    "label-smoothing": "label-smoothing is not for regression: it needs classes",
    "distillation": "distillation is not for several tasks: it learns from a teacher, who knows one task",
    "teacher-free-distillation": "teacher-free-distillation is not for several tasks: it learns from a teacher",
    "vanilla-undebiased": "vanilla-undebiased is not for several tasks: it needs parameters that took equally many",
}


def measured(method, **options):
    """What two tasks come to after four steps, of which every task has some."""
    settings = SETTINGS.get(method, {})
    return finetune(BERT, tasks=TASKS[:2], method=method, settings=settings, max_steps=4, **QUICK | options).runs[0]


@pytest.fixture(scope="module")
def plainly():
    """Without a method."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "read_task", small_task)
        return measured("vanilla")


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name not in ("guided-dropout", "fixed-mask", "smart")))
        for name in sorted(METHODS.keys() - UNFIT.keys() - {"vanilla", "vanilla-long"})
    ],
)
def test_a_method_changes_what_several_tasks_come_to(method, plainly):
    found = measured(method)
    assert found.status == "finished"
    for task in TASKS[:2]:
        assert found.evaluations[-1][f"{task}.loss"] != plainly.evaluations[-1][f"{task}.loss"]


@pytest.mark.parametrize("method", UNFIT)
def test_a_method_for_one_task_is_refused_before_anything_runs(method, monkeypatch):
    monkeypatch.setattr(training, "_run_all", lambda *_: pytest.fail("it runs"))
    with pytest.raises(ValueError, match=UNFIT[method]):
        finetune(BERT, tasks=TASKS, method=method, **QUICK)


@pytest.fixture
def shared():
    """A classifier and a model for numbers with one backbone, in training, and a batch of each."""
    tasks = {name: fs.TASKS[name] for name in TASKS[:2]}
    plans = [replace(_plan(), name=n, objective=t.objective, metric=t.metrics[0]) for n, t in tasks.items()]
    labels = {"classification": 2, "regression": None}
    models = [load_model(BERT, objective=p.objective, num_labels=labels[p.objective])[0] for p in plans]
    tokenizer = load_model(BERT)[1]
    batches = [
        fs.load_batches(small_task(p.name, "train"), tokenizer, objective=p.objective, batch_size=4, max_length=24)
        for p in plans
    ]
    found = SharedBackbone(plans, models, batches, 1.0)
    found.whole.train()
    return found


def each_task(shared):
    """Inside every task: its objective and a batch of it."""
    for number, batches in enumerate(shared.batches):
        batch = next(iter(batches))
        with shared.of(batch | {"task": torch.full((len(batch["labels"]),), number)}) as (objective, inputs):
            yield objective, inputs


def test_the_model_that_trains_says_what_the_task_at_hand_predicts(shared):
    before = shared.whole.config
    found = [(objective, infer_objective(shared.whole)) for objective, _ in each_task(shared)]
    assert found == [("classification", "classification"), ("regression", "regression")]
    assert shared.whole.config is before


@pytest.mark.parametrize("method", [R3F(), SMART(4), LNSR()], ids=lambda m: m.name)
def test_a_further_pass_is_one_of_the_task_at_hand(method, shared):
    """With the same dropout, bit for bit."""
    with method.applied_to(shared.whole, torch.optim.AdamW(shared.whole.parameters())):
        for objective, inputs in each_task(shared):
            predictions = predict(shared.whole, inputs, objective)
            again = method.passes_of(shared.current).again(inputs)
            assert again.kind == predictions.kind
            assert torch.equal(again.outputs, predictions.outputs)
            assert method.penalty(shared.current, inputs, predictions).shape == (4,)


def test_r4f_normalises_the_last_layer_of_every_task(shared):
    heads = [model.classifier.weight for model in shared.models]
    before = [head.detach().clone() for head in heads]
    with R4F().applied_to(shared.whole, torch.optim.AdamW(shared.whole.parameters())):
        for number, (objective, inputs) in enumerate(each_task(shared)):
            found = predict(shared.whole.eval(), inputs, objective).outputs
            bias = shared.models[number].classifier.bias
            with torch.no_grad():
                pooled = shared.whole.bert(**{k: v for k, v in inputs.items() if k != "labels"}).pooler_output
                expected = pooled @ (before[number] / torch.linalg.matrix_norm(before[number], 2)).T + bias
            torch.testing.assert_close(found.flatten(), expected.flatten())
    for head in heads:
        assert float(torch.linalg.matrix_norm(head.detach(), 2)) == pytest.approx(1.0)


@pytest.mark.parametrize("method", ["prompt-tuning", "prefix-tuning"])
def test_virtual_tokens_stand_before_the_texts_of_every_task_where_it_is_measured(method, shared):
    """What is measured depends on them, for each task."""
    chosen = METHODS[method](virtual_tokens=3)
    chosen.extend(shared.whole)
    with chosen.applied_to(shared.whole, torch.optim.AdamW(shared.whole.parameters())):
        _, before = shared.evaluate(shared.batches)
        with torch.no_grad():
            for parameter in chosen.added(shared.whole).values():
                parameter.add_(1.0)
        _, after = shared.evaluate(shared.batches)
    for task in TASKS[:2]:
        assert before[f"{task}.loss"] != after[f"{task}.loss"]


def test_a_head_that_is_measured_is_in_eval_mode(shared):
    """Some compute their dropout themselves, by their own flag."""
    modes = []
    forward = shared.models[1].forward
    shared.models[1].forward = lambda *args, **inputs: (
        modes.append(shared.models[1].training) or forward(*args, **inputs)
    )
    shared.evaluate(shared.batches)
    for objective, inputs in each_task(shared):
        predict(shared.whole, inputs, objective)
    assert not any(modes[:-1])
    assert modes[-1]


@pytest.mark.slow
def test_a_stage_comes_before_several_tasks(tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(f"One {i}. Two {i}. Three {i}." for i in range(8)))
    notes, _ = noted(
        pretrain_text=tmp_path / "text.txt", pretrain_steps=2, max_steps=1, out=tmp_path / "out", save_model=True
    )
    adapted = load_file(tmp_path / "out" / "adapt-mlm-seed-0" / "model.safetensors")
    name = "bert.encoder.layer.0.output.dense.weight"
    assert torch.equal(notes.start[name], adapted[name])


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"tasks": TASKS, "task": TASKS[0]}, "a task, tasks or data, and one of them only"),
        ({"tasks": TASKS, "data": "builtin:docs"}, "a task, tasks or data, and one of them only"),
        ({"tasks": [TASKS[0]] * 2}, "tasks must be a list of different tasks"),
        ({"tasks": []}, "tasks must be a list of different tasks"),
        ({"tasks": TASKS[0]}, "tasks must be a list of different tasks"),
        ({"tasks": TASKS, "sampling_exponent": -1.0}, "sampling_exponent must be 0 or more, and finite; got -1"),
        ({"task": TASKS[0], "sampling_exponent": 1.0}, "sampling_exponent goes with tasks only"),
    ],
)
def test_refusals(settings, match):
    with pytest.raises(ValueError, match=match):
        finetune(BERT, **QUICK | settings)


def test_a_model_without_a_backbone_is_refused():
    models = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)]
    with pytest.raises(ValueError, match="A Linear has no backbone apart from its head; train one task at a time"):
        SharedBackbone([_plan(), _plan()], models, [[], []], 1.0)


def _interrupted(out, **options):
    return finetune(BERT, tasks=TASKS, epochs=2, out=out, save_model=True, **QUICK | options)


SCRIPT = """
import sys
import test_multitask
test_multitask.plan.read_task = test_multitask.small_task
from fisherscope.finetune import trainer
trainer.SECONDS_BETWEEN_CHECKPOINTS = 0.0
test_multitask._interrupted(sys.argv[1])
"""


@pytest.mark.slow
def test_a_killed_training_goes_on_to_the_same_weights(tmp_path):
    """SIGKILL in the second epoch: resumed, the same tasks and examples follow."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    expected = _interrupted(whole)
    kill_when(lambda: any((killed / "seed-0.part").glob(f"checkpoint-1[4-9]/{STATE_FILE}")), SCRIPT, killed)
    found = _interrupted(killed, resume=True)
    for task in ("acceptability", "similarity", "topic"):
        file = f"model-seed-0-{task}/model.safetensors"
        assert same(load_file(whole / file), load_file(killed / file))
    assert found.runs[0].losses == expected.runs[0].losses
    assert found.runs[0].evaluations == expected.runs[0].evaluations


def test_flags(tmp_path, monkeypatch):
    found = []

    def note(plan, *_):
        found.append(plan)
        raise ValueError("noted")

    monkeypatch.setattr(training, "_run_all", note)
    words = f"finetune --model {BERT} --tasks {','.join(TASKS)} --sampling-exponent 0.5 --out {tmp_path / 'out'}"
    assert main(words.split()) != 0
    assert [part.name for part in found[0].tasks] == TASKS
    assert found[0].sampling_exponent == 0.5
