"""Whole trainings: the loss they minimise, what they measure, and what they leave behind."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import kill_when

import fisherscope as fs
from fisherscope import storage
from fisherscope.finetune import Applied, Composed, Results, finetune, folder, plan, trainer, training
from fisherscope.finetune.callback import STATE_FILE
from fisherscope.finetune.parts import before_steps
from fisherscope.models import backbone_prefix, dropout_sites
from fisherscope.objectives import example_losses

TASK = "builtin:acceptability"
QUICK = {"task": TASK, "train_size": 24, "batch_size": 8, "learning_rate": 1e-3, "warmup": 0.0, "progress": False}


@pytest.fixture(scope="module", autouse=True)
def small_validation():
    """A validation split of 40 examples, to be quick."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "read_task", _small_task)
        yield


def _small_task(name, split, **options):
    from dataclasses import replace

    source = fs.read_task(name, split, **options)
    return source if split == "train" else replace(source, texts=source.texts[:40], labels=source.labels[:40])


@pytest.fixture(scope="module")
def without_dropout(tmp_path_factory):
    """The built-in models without dropout, as folders."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("bert", "gpt2"):
        model, tokenizer = fs.load_model(f"builtin:{name}")
        for site in dropout_sites(model, backbone_only=False):
            site.set_rate(0.0)
        for key in [key for key in model.config.to_dict() if key.endswith(("dropout_prob", "pdrop"))]:
            setattr(model.config, key, 0.0)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def same(a: Path, b: Path) -> bool:
    one, other = weights(a), weights(b)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class TestLoss:
    @pytest.mark.parametrize(
        "data",
        [
            {"task": TASK, "name": "bert"},
            {"task": "builtin:similarity", "name": "bert"},
            {"data": "builtin:docs", "objective": "mlm", "name": "bert"},
            {"data": "builtin:docs", "objective": "causal-lm", "name": "gpt2"},
            {"task": TASK, "name": "gpt2"},
        ],
        ids=lambda d: f"{d['name']}-{d.get('objective', d.get('task'))}",
    )
    def test_accumulation_changes_no_gradient(self, without_dropout, data):
        """8 examples at once and 4 times 2 give the same gradients, for examples of unequal length, too."""
        settings = {key: value for key, value in data.items() if key != "name"}
        at_once, in_parts = (first_gradients(without_dropout / data["name"], size, **settings) for size in (8, 2))
        assert relative_difference(at_once, in_parts) < 1e-5

    def test_the_logged_loss_is_that_of_the_examples(self, without_dropout, tmp_path):
        """The first logged loss is the mean of the losses of the examples, computed one by one."""
        results = finetune(
            without_dropout / "gpt2", data="builtin:docs", objective="causal-lm", train_size=6, batch_size=2,
            accumulate=3, max_steps=1, learning_rate=1e-3, progress=False,
        )  # fmt: skip
        model, tokenizer = fs.load_model(without_dropout / "gpt2")
        batches = fs.load_batches("builtin:docs", tokenizer, objective="causal-lm", num_examples=6, batch_size=1)
        with torch.no_grad():
            losses = [example_losses(model, batch, "causal-lm") for batch in batches]
        expected = sum(float(x.total) for x in losses) / sum(int(x.count) for x in losses)
        assert results.runs[0].losses[0]["loss"] == pytest.approx(expected, rel=1e-5)

    def test_penalties_are_added_once_whatever_the_accumulation(self, without_dropout):
        model = without_dropout / "bert"
        at_once, in_parts = (first_gradients(model, size, PullsToZero(0.1), task=TASK) for size in (8, 2))
        assert relative_difference(at_once, in_parts) < 1e-5
        assert relative_difference(at_once, first_gradients(model, 8, task=TASK)) > 1e-2


class Notes(fs.Regularizer):
    """The gradients of the first optimizer step."""

    def __init__(self):
        self.gradients = {}

    @contextmanager
    def applied_to(self, model, optimizer):
        def note():
            self.gradients |= {name: p.grad.clone() for name, p in model.named_parameters()}

        with before_steps(optimizer, note):
            yield Applied()


def first_gradients(model, batch_size, *others, total=8, **settings):
    """The gradients of 8 examples, as many at once as the batch size says, and ``total`` of them on every rank."""
    notes = Notes()
    finetune(
        model, method=Composed((notes, *others)), train_size=8, max_steps=1, batch_size=batch_size,
        accumulate=total // batch_size, progress=False, **settings,
    )  # fmt: skip
    return notes.gradients


def relative_difference(one, other):
    largest = max(float(gradient.abs().max()) for gradient in one.values())
    return max(float((one[name] - other[name]).abs().max()) for name in one) / largest


RANKS = """
import sys
import torch
from fisherscope import distributed
import test_finetune
with distributed.started("cpu"):
    total = 8 // distributed.world_size()
    gradients = test_finetune.first_gradients(sys.argv[1], 4, total=total, task=test_finetune.TASK)
    if distributed.is_first():
        torch.save(gradients, sys.argv[2])
"""


@pytest.mark.slow
def test_two_ranks_give_the_gradients_of_one(without_dropout, tmp_path):
    """2 ranks with 4 examples each, and one with twice 4."""
    found = []
    for ranks in (1, 2):
        words = (
            [] if ranks == 1 else ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--master_port=29517"]
        )
        script, out = tmp_path / "ranks.py", tmp_path / f"{ranks}.pt"
        script.write_text(RANKS)
        here = Path(__file__).parent
        paths = os.pathsep.join([str(here.parent), str(here)])
        environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        subprocess.run(
            [sys.executable, *words, str(script), str(without_dropout / "bert"), str(out)], env=environment, check=True
        )
        found.append(torch.load(out))
    assert relative_difference(*found) < 1e-5


class PullsToZero(fs.Regularizer):
    """A penalty on the logits."""

    def __init__(self, weight):
        self.weight = weight

    def penalty(self, model, batch, predictions):
        return self.weight * predictions.outputs.square().flatten(1).sum(1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two seeds, two epochs."""
    folder = tmp_path_factory.mktemp("run") / "out"
    results = finetune(
        "builtin:bert", **QUICK, epochs=2, seeds=[0, 3], out=folder, save_model=True,
        measure_forgetting="builtin:docs",
    )  # fmt: skip
    return folder, results


class TestResults:
    def test_the_folder_holds_what_was_done(self, run):
        folder, results = run
        assert {f.name for f in folder.iterdir()} == {
            "config.yaml", "run.json", "results.json", "predictions.jsonl", "splits.json",
            "model-seed-0", "model-seed-3",
        }  # fmt: skip
        loaded = Results.load(folder)
        assert str(loaded) == str(results)
        assert loaded.runs[1] == results.runs[1]
        assert [run.seed for run in loaded.runs] == [0, 3]
        assert all(len(value) == 16 for value in loaded.fingerprints.values())

    def test_metrics_are_those_of_the_predictions(self, run):
        folder, results = run
        rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
        mine = [row for row in rows if row["seed"] == 3]
        assert [row["example"] for row in mine] == list(range(40))
        source = _small_task(TASK, "validation")
        assert [row["label"] for row in mine] == list(source.labels)
        accuracy = np.mean([row["label"] == row["predicted"] for row in mine])
        last = results.runs[1].evaluations[-1]
        assert last["accuracy"] == pytest.approx(accuracy)
        assert last["loss"] == pytest.approx(np.mean([row["loss"] for row in mine]))
        assert [(row["step"], row["epoch"]) for row in results.runs[1].evaluations] == [(3, 1.0), (6, 2.0)]

    def test_the_saved_model_opens_without_us_and_says_the_same(self, run):
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        folder, _ = run
        model = AutoModelForSequenceClassification.from_pretrained(folder / "model-seed-3").eval()
        tokenizer = AutoTokenizer.from_pretrained(folder / "model-seed-3")
        assert model.config.id2label == dict(enumerate(fs.read_task(TASK, "train").label_names))
        texts = [text for (text,) in _small_task(TASK, "validation").texts]
        inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            predicted = model(**inputs).logits.argmax(-1).tolist()
        rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
        assert predicted == [row["predicted"] for row in rows if row["seed"] == 3]

    def test_forgetting_is_the_loss_of_pretraining_with_the_new_backbone(self, run):
        folder, results = run
        model, tokenizer = fs.load_model("builtin:bert")
        batches = fs.load_batches("builtin:docs", tokenizer, objective="mlm", num_examples=512, seed=0)

        def loss() -> float:
            with torch.no_grad():
                losses = [example_losses(model, batch, "mlm") for batch in batches]
            return float(sum(x.total.sum() for x in losses) / sum(x.count.sum() for x in losses))

        forgotten = results.runs[0].forgetting
        assert forgotten["before"] == pytest.approx(loss(), rel=1e-5)
        trained = weights(folder / "model-seed-0")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.startswith(backbone_prefix(model)):
                    parameter.copy_(trained[name])
        assert forgotten["after"] == pytest.approx(loss(), rel=1e-5)
        assert forgotten["after"] > forgotten["before"]

    def test_the_same_again(self, run, tmp_path):
        """Two calls with one seed give the same weights, bit for bit, whatever ran before."""
        folder, _ = run
        torch.rand(7)
        finetune("builtin:bert", **QUICK, epochs=2, seeds=[3], out=tmp_path / "again", save_model=True)
        assert same(folder / "model-seed-3", tmp_path / "again" / "model-seed-3")
        assert not same(folder / "model-seed-0", folder / "model-seed-3")

    def test_a_finished_run_is_read_and_not_run_again(self, run):
        folder, results = run
        before = (folder / "results.json").stat().st_mtime_ns
        again = finetune("builtin:bert", **QUICK, epochs=2, seeds=[0, 3], out=folder, resume=True,
                         measure_forgetting="builtin:docs")  # fmt: skip
        assert str(again) == str(results)
        assert (folder / "results.json").stat().st_mtime_ns == before

    def test_results_are_not_replaced(self, run):
        folder, _ = run
        with pytest.raises(FileExistsError, match="holds results; give resume"):
            finetune("builtin:bert", **QUICK, out=folder)

    def test_a_run_goes_on_with_its_own_settings_only(self, run):
        folder, _ = run
        with pytest.raises(ValueError, match=r"begun with another setting: epochs \(2 there, 5 now\)"):
            finetune("builtin:bert", **QUICK, epochs=5, out=folder, resume=True, measure_forgetting="builtin:docs")

    def test_a_damaged_file_is_refused(self, tmp_path):
        for text, match in (("{", "not JSON"), ('{"format": "x"}', "should be a"), ("[1]", "damaged|not JSON")):
            (tmp_path / "results.json").write_text(text)
            with pytest.raises(storage.WrongFile, match=match):
                Results.load(tmp_path)


SCRIPT = """
import sys
import fisherscope as fs
import test_finetune
test_finetune.plan.read_task = test_finetune._small_task
test_finetune.trainer.SECONDS_BETWEEN_CHECKPOINTS = 0.0
test_finetune.interrupted(sys.argv[1], sys.argv[2])
"""

METHODS_TO_KILL = {
    "guided-dropout": {},
    "fixed-mask": {"fraction": 0.3},
    "dps-dense": {"update_ratio": 0.2},
    "child-tuning-f": {},
}


def interrupted(out: str, method: str, **options) -> Results:
    return finetune(
        "builtin:bert", **QUICK, epochs=4, method=method, settings=METHODS_TO_KILL[method], out=out, save_model=True,
        **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[pytest.mark.slow] * (name != "guided-dropout")) for name in METHODS_TO_KILL]
)
def test_a_killed_training_goes_on_to_the_same_weights(method, tmp_path):
    """SIGKILL in the middle of epoch 2: resumed, the weights and results are those of an uninterrupted run."""
    whole = interrupted(str(tmp_path / "whole"), method)
    killed = tmp_path / "killed"

    def in_second_epoch() -> bool:
        return any((killed / "seed-0.part").glob(f"checkpoint-[5-9]/{STATE_FILE}"))

    kill_when(in_second_epoch, SCRIPT, killed, Path(method))
    assert not (killed / "results.json").exists()
    resumed = interrupted(str(killed), method, resume=True)
    assert same(tmp_path / "whole" / "model-seed-0", killed / "model-seed-0")
    assert resumed.runs[0].evaluations == whole.runs[0].evaluations
    assert resumed.runs[0].losses == whole.runs[0].losses
    assert not (killed / "seed-0.part").exists()


def test_an_exception_takes_the_regularizer_off(monkeypatch):
    removed = []

    class Fails(fs.Regularizer):
        def applied_to(self, model, optimizer):
            from contextlib import ExitStack

            stack = ExitStack()
            stack.callback(removed.append, True)
            return stack

        def penalty(self, model, batch, predictions):
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        finetune("builtin:bert", **QUICK, method=Fails())
    assert removed == [True]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"task": None}, "needs a task or data, and not both"),
        ({"data": "builtin:docs"}, "needs a task or data, and not both"),
        (
            {"method": "guided"},
            "no method 'guided' .did you mean 'guided-dropout'.*; the method must be one of .*, vanilla",
        ),
        ({"seeds": [-1]}, "Seeds must be whole numbers from 0 to 4294967295; got -1"),
        ({"seeds": [2**32]}, "Seeds must be whole numbers from 0"),
        ({"device": "gpu"}, "The device must be cpu, cuda, cuda:1 or another name of torch's; got 'gpu'"),
        ({"train_size": 0}, "train_size must be a number of examples, 1 or more"),
        ({"settings": {"highest": 1}}, "vanilla has no setting 'highest'; it has none"),
        ({"epochs": 0}, "epochs must be a number above 0, and finite; got 0"),
        ({"save_model": True}, "save_model needs out"),
        ({"seeds": []}, "at least one seed"),
        ({"objective": "mlm"}, "objective goes with data only"),
        ({"task": None, "data": "builtin:docs", "objective": len}, "an objective by name, but here is a function"),
        ({"validation_data": "x.txt"}, "validation_data goes with data only"),
        ({"method": "top-k-layers"}, "top-k-layers needs the setting 'layers'"),
        ({"method": "fixed-mask", "settings": {"fraction": 2.0}}, "fraction must be between 0 and 1"),
    ],
)
def test_what_cannot_be_is_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        finetune("builtin:bert", **(QUICK | arguments))


def test_a_gpu_that_trainer_would_not_take_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    message = "takes the first GPU that it sees, not cuda:1; set CUDA_VISIBLE_DEVICES=1 and leave out the device"
    with pytest.raises(ValueError, match=message):
        finetune("builtin:bert", **QUICK, device="cuda:1")


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("epochs", float("inf"), "above 0, and finite; got inf"),
        ("epochs", float("nan"), "above 0, and finite; got nan"),
        ("epochs", "3", "above 0, and finite; got '3'"),
        ("learning_rate", float("inf"), "above 0, and finite; got inf"),
        ("learning_rate", True, "above 0, and finite; got True"),
        ("weight_decay", -1, "weight_decay must be a number, at least 0 and finite; got -1"),
        ("weight_decay", float("nan"), "at least 0 and finite; got nan"),
        ("accumulate", 0, "whole number and at least 1, got 0"),
        ("batch_size", 2.5, "whole number and at least 1, got 2.5"),
        ("max_steps", 0, "whole number and at least 1, got 0"),
        ("max_steps", float("inf"), "whole number and at least 1, got inf"),
        ("warmup", 1.0, "warmup is a share of the steps"),
        ("warmup", float("nan"), "warmup is a share of the steps"),
        ("precision", "bf16", "precision must be one of float32, bfloat16, float16; got 'bf16'"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(name, value, match):
    with pytest.raises(ValueError, match=match):
        plan.Recipe(**{name: value})


def test_a_recipe_may_be_without_decay_and_warmup():
    assert (plan.Recipe(weight_decay=0, warmup=0).weight_decay, plan.Recipe(epochs=0.5).epochs) == (0, 0.5)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("lr", r"; did you mean learning_rate\?"), ("sedes", r"; did you mean seeds\?"), ("zzz", r"\.")],
)
def test_unknown_keywords_are_named_with_the_nearest(name, hint):
    with pytest.raises(TypeError, match=rf"^finetune has no keyword {name}{hint}$"):
        finetune("builtin:bert", task=TASK, **{name: 1e-3})


@pytest.mark.parametrize(
    "given",
    [{"scores": fs.FisherScores({"w": torch.ones(1)}, 1)}, {"mask": fs.Mask({"w": torch.ones(1, dtype=torch.bool)})}],
)
def test_a_regularizer_has_its_scores_and_mask(given):
    """They would do nothing."""
    with pytest.raises(ValueError, match=f"has its {next(iter(given))} already"):
        finetune("builtin:bert", task=TASK, method=PullsToZero(0.1), **given)


SETTINGS = {"model": "builtin:bert", "method": "vanilla", "epochs": 3.0}


def begun(place, settings=SETTINGS, local=(), seeds=(0,), resume=False, save=False):
    return folder.begin(place, settings, dict(local), seeds, resume, save)


def with_results(place, seeds=(0,)):
    """A run that was begun, with results as if it had been trained."""
    begun(place)
    done = [fs.finetune.results.SeedResult(seed, "finished", [], [], False, 0.1, 1, 1) for seed in seeds]
    Results("task", "vanilla", "accuracy", SETTINGS, done).save(place / "results.json")
    return place


def contents(place):
    return {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}


class TestFolder:
    def test_runs_below_stay_whatever_their_names(self, tmp_path):
        """Those of a sweep are called seed-K, as the folders of a run's own work once were."""
        for seed in (0, 1):
            with_results(tmp_path / "exp" / f"seed-{seed}", [seed])
        before = contents(tmp_path)
        with pytest.raises(FileExistsError, match="has another run below it"):
            finetune("builtin:bert", **QUICK, seeds=[0, 1], out=tmp_path / "exp")
        assert contents(tmp_path) == before

    def test_the_folder_of_a_model_is_no_place_for_a_run(self, tmp_path):
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(FileExistsError, match="is the folder of a model; give another one"):
            finetune("builtin:bert", **QUICK, out=tmp_path)
        assert contents(tmp_path) == {tmp_path / "config.json": b"{}"}

    def test_a_run_without_a_finished_training_is_named_as_such(self, tmp_path):
        (tmp_path / "seed-0.part").mkdir()
        with pytest.raises(FileNotFoundError, match=r"No training in .* is finished yet; go on with resume"):
            Results.load(tmp_path)

    def test_a_failed_call_takes_away_only_what_it_made(self, tmp_path, monkeypatch):
        place = tmp_path / "exp"
        for name in ("seed-0/notes.txt", "notes.txt"):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_text("mine")
        before = contents(tmp_path)

        def fail(plan, *_):
            (place / "seed-0.part").mkdir()
            raise ValueError("a wrong mask")

        monkeypatch.setattr(training, "_run_all", fail)
        with pytest.raises(ValueError, match="a wrong mask"):
            finetune("builtin:bert", **QUICK, out=place)
        assert contents(tmp_path) == before
        assert not (place / "seed-0.part").exists()

    def test_a_failed_resumption_leaves_the_run(self, tmp_path, monkeypatch):
        place, settings = tmp_path / "run", []

        def stop(plan, *_):
            settings.append(plan)
            raise KeyboardInterrupt if len(settings) == 1 else ValueError("no")

        monkeypatch.setattr(training, "_run_all", stop)
        with pytest.raises(KeyboardInterrupt):
            finetune("builtin:bert", **QUICK, out=place)
        before = contents(place)
        with pytest.raises(ValueError, match="no"):
            finetune("builtin:bert", **QUICK, out=place, resume=True)
        assert contents(place) == before != {}

    def test_what_was_trained_stays(self, tmp_path):
        begun(tmp_path / "run")
        (tmp_path / "run" / "seed-0.part" / "checkpoint-3").mkdir(parents=True)
        folder.leave(tmp_path / "run", made=True)
        assert (tmp_path / "run" / "config.yaml").exists()

    @pytest.mark.parametrize("name", ["predictions.jsonl", "splits.json", "run.json", "results.json", "model-seed-0"])
    @pytest.mark.parametrize("resume", [False, True])
    def test_files_of_something_else_are_not_replaced(self, name, resume, tmp_path):
        (tmp_path / name).write_text("hours of work")
        with pytest.raises(FileExistsError, match="holds"):
            begun(tmp_path, resume=resume)
        assert contents(tmp_path) == {tmp_path / name: b"hours of work"}

    def test_other_files_do_no_harm(self, tmp_path):
        (tmp_path / "notes.txt").write_text("mine")
        assert begun(tmp_path) is None

    @pytest.mark.parametrize("text", ["a: [1", "", "a: 1", "- 1", "\x00"])
    def test_a_config_of_something_else_is_refused(self, text, tmp_path):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(
            storage.WrongFile, match=r"config.yaml was cut short, or is not of a run; give another folder"
        ):
            begun(tmp_path, resume=True)

    @pytest.mark.parametrize("text", ['{"example": 1}\n', "{", "1\n"])
    def test_damaged_predictions_are_refused_before_the_training(self, text, tmp_path):
        begun(tmp_path)
        (tmp_path / "predictions.jsonl").write_text(text)
        with pytest.raises(storage.WrongFile, match=r"predictions.jsonl was cut short, or is not of a run"):
            begun(tmp_path, resume=True)

    def test_damaged_splits_are_refused_before_the_training(self, tmp_path):
        begun(tmp_path)
        (tmp_path / "splits.json").write_text("{")
        with pytest.raises(storage.WrongFile, match=r"splits\.json"):
            begun(tmp_path, resume=True)

    def test_a_file_is_no_folder(self, tmp_path):
        (tmp_path / "out").write_text("")
        for place in (tmp_path / "out", tmp_path / "out" / "run"):
            with pytest.raises(NotADirectoryError, match=r"needs a folder, but .*out is a file; give another folder"):
                begun(place)

    def test_models_of_finished_seeds_cannot_be_saved_later(self, tmp_path):
        with_results(tmp_path, [0, 1])
        (tmp_path / "model-seed-0").mkdir()
        assert begun(tmp_path, seeds=[0, 2], resume=True, save=True) is not None
        with pytest.raises(ValueError, match="holds the finished seed 1 without its model"):
            begun(tmp_path, seeds=[0, 1], resume=True, save=True)

    def test_another_model_of_the_same_name_is_another_setting(self, tmp_path):
        begun(tmp_path, local={"teacher": "1" * 16})
        begun(tmp_path, local={"teacher": "1" * 16}, resume=True)
        with pytest.raises(ValueError, match=r"begun with another setting: teacher \(1+ there, 2+ now\)"):
            begun(tmp_path, local={"teacher": "2" * 16}, resume=True)

    def test_local_models_are_told_apart_by_their_weights(self, tmp_path):
        from dataclasses import replace

        source = _small_task(TASK, "train")
        made = plan.Plan("builtin:bert", None, None, "classification", "x", "accuracy", source, None, None, 0, None,
                         plan.Recipe(), "distillation")  # fmt: skip
        assert made.local_models() == {}
        found = []
        for name, values in (("a", 0.0), ("b", 1.0), ("c", 0.0)):
            (tmp_path / name / "model-seed-0").mkdir(parents=True)
            (tmp_path / name / "model-seed-0" / "model.safetensors").write_text(str(values))
            settings = {"teacher": str(tmp_path / name / "model-seed-0"), "weight": 0.5}
            found.append(replace(made, settings=settings).local_models())
        assert found[0].keys() == {"teacher"}
        assert found[0] == found[2] != found[1]

    def test_further_seeds_begin_with_the_same_weights(self, tmp_path):
        """The name of a model on the Hub may come to mean other weights."""
        finetune("builtin:bert", **QUICK, max_steps=1, out=tmp_path)
        before = json.loads((tmp_path / "results.json").read_text())
        before["fingerprints"]["backbone"] = "0" * 16
        (tmp_path / "results.json").write_text(json.dumps(before))
        with pytest.raises(ValueError, match=r"finished seeds began with other weights of builtin:bert \(0+ there"):
            finetune("builtin:bert", **QUICK, max_steps=1, seeds=[0, 1], out=tmp_path, resume=True)


def test_the_folder_of_a_run_is_no_model(tmp_path):
    (tmp_path / "model-seed-3").mkdir()
    with pytest.raises(FileNotFoundError, match=r"is the folder of a run; give a model in it, such as .*model-seed-3"):
        fs.load_model(tmp_path)


def test_forgetting_is_measured_on_the_device_of_the_run(monkeypatch):
    asked = []

    def note(*_, device, **__):
        asked.append(device)
        raise ValueError("noted")

    monkeypatch.setattr(training, "pretraining_loss", note)
    with pytest.raises(ValueError, match="noted"):
        finetune("builtin:bert", **QUICK, measure_forgetting="builtin:docs", device="cpu")
    assert asked == ["cpu"]


def test_forgetting_needs_something_to_score(monkeypatch):
    from fisherscope.finetune import forgetting

    monkeypatch.setattr(forgetting, "load_batches", lambda *args, **settings: [])
    with pytest.raises(ValueError, match="something to score, but those of short have none"):
        forgetting.pretraining_loss("builtin:bert", "short", device="cpu")


def test_an_exception_ends_the_progress_bar(monkeypatch):
    """So that the message is on a line of its own."""
    ended = []

    class Bar:
        def close(self):
            ended.append(True)

    class Fails(fs.Regularizer):
        def penalty(self, model, batch, predictions):
            raise RuntimeError("in the middle")

    monkeypatch.setattr(trainer, "progress_bar", lambda *_, **__: Bar())
    with pytest.raises(RuntimeError, match="in the middle"):
        finetune("builtin:bert", **QUICK, method=Fails())
    assert ended


def test_checkpoints_are_silent(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(trainer, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    finetune("builtin:bert", **QUICK, max_steps=3, out=tmp_path)
    said = capfd.readouterr()
    assert "shards" not in said.out + said.err
    assert "mtime" not in said.out + said.err


class TestBest:
    def best(self, metric, values):
        rows = [{"step": i, "epoch": i, metric: value} for i, value in enumerate(values)]
        return fs.finetune.results.SeedResult(0, "finished", rows, [], False, 0.1, 1, 1).value(metric, "best")

    def test_the_lowest_loss_of_a_task_is_the_best(self):
        assert self.best("rte.loss", [0.5, 0.3, 0.9]) == 0.3

    def test_the_highest_of_any_other_metric_is_the_best(self):
        assert self.best("rte.accuracy", [0.5, 0.3, 0.9]) == 0.9

    def test_an_epoch_that_is_no_number_is_never_the_best(self):
        assert self.best("loss", [float("nan"), 0.3]) == 0.3
        assert self.best("accuracy", [float("nan"), 0.3]) == 0.3


def test_every_logged_step_has_its_loss():
    """Also where an epoch ends, which Trainer's own logging would leave out."""
    results = finetune("builtin:bert", **QUICK, epochs=2)
    assert [row["step"] for row in results.runs[0].losses] == [1, 2, 3, 4, 5, 6]


def test_files_with_other_classes_mean_the_same_by_them(tmp_path):
    """The validation file lacks a class, so that it numbers the others differently on its own."""
    rows = {"apple": "this is red", "banana": "that was yellow", "cherry": "we are dark"}
    for name, classes in (("train", list(rows)), ("validation", ["banana", "cherry"])):
        lines = [f"{rows[label]}\t{label}" for label in classes * 12]
        (tmp_path / f"{name}.tsv").write_text("\n".join(["text\tlabel", *lines]))
    results = finetune(
        "builtin:bert", data=tmp_path / "train.tsv", validation_data=tmp_path / "validation.tsv",
        objective="classification", max_steps=12, learning_rate=2e-3, progress=False,
    )  # fmt: skip
    assert results.runs[0].value("accuracy") == 1.0


def test_validation_on_the_training_examples_is_told(tmp_path, caplog):
    (tmp_path / "data.tsv").write_text("text\tlabel\n" + "this is red\ta\nthat was dark\tb\n" * 8)
    both = {"data": tmp_path / "data.tsv", "validation_data": tmp_path / "data.tsv", "objective": "classification"}
    finetune("builtin:bert", **both, max_steps=1, progress=False)
    assert "The validation data are the training data: they say nothing about other examples." in caplog.messages


def test_another_run_is_not_taken_for_this_one(tmp_path):
    """The settings of a method, its defaults too, and what masks hold are part of the run."""
    model, _ = fs.load_model("builtin:bert")
    masks = [fs.random_fraction(model, 0.1, seed=seed) for seed in (0, 0, 1)]
    masks[2] = fs.Mask(masks[2].tensors, masks[0].provenance)  # says the same of itself
    settings = QUICK | {"max_steps": 1, "method": "fixed-mask", "out": tmp_path / "run"}
    finetune("builtin:bert", **settings, mask=masks[0])
    finetune("builtin:bert", **settings, mask=masks[1], resume=True)
    with pytest.raises(ValueError, match="begun with another setting: mask"):
        finetune("builtin:bert", **settings, mask=masks[2], resume=True)


def test_more_seeds_later(tmp_path):
    """A finished run goes on with further seeds; the ones that are there are kept."""
    first = finetune("builtin:bert", **QUICK, max_steps=2, seeds=[0], out=tmp_path / "run")
    both = finetune("builtin:bert", **QUICK, max_steps=2, seeds=[0, 1], out=tmp_path / "run", resume=True)
    assert both.runs[0] == first.runs[0]
    assert [run.seed for run in Results.load(tmp_path / "run").runs] == [0, 1]
    assert not (tmp_path / "run" / "results.json.part").exists()


def test_a_refused_method_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError, match="keep"):
        finetune("builtin:bert", **QUICK, method="fish-mask", settings={"num_samples": 8}, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_seeds_in_a_row_share_no_order():
    """The sampler of epoch e of seed s is seeded with s + e."""
    assert len({trainer.order_seed(seed) + epoch for seed in range(20) for epoch in range(20)}) == 400


def test_a_training_that_diverges_says_so():
    results = finetune("builtin:bert", **(QUICK | {"learning_rate": 1e30, "max_steps": 4}))
    assert results.runs[0].status == "diverged"
    assert "diverged" in str(results)


@pytest.mark.slow
def test_two_methods_at_once(tmp_path):
    """The mask freezes, and the rates are those of guided dropout."""
    model, tokenizer = fs.load_model("builtin:bert")
    batches = fs.load_batches("builtin:docs", tokenizer, objective="mlm", num_examples=16)
    scores = fs.estimate_fisher(model, batches, progress=False)
    mask = fs.top_fraction(scores, 0.1)
    finetune("builtin:bert", **QUICK, method="guided-dropout+fixed-mask", scores=scores, mask=mask, max_steps=3,
             settings={"highest": 0.5}, out=tmp_path / "both", save_model=True)  # fmt: skip
    finetune("builtin:bert", **QUICK, method="fixed-mask", mask=mask, max_steps=3, out=tmp_path / "one",
             save_model=True)  # fmt: skip
    trained = weights(tmp_path / "both" / "model-seed-0")
    start = dict(model.named_parameters())
    for name, selected in mask.items():
        if name in trained and name.startswith("bert."):
            assert torch.equal(trained[name][~selected], start[name].detach()[~selected]), name
    assert not same(tmp_path / "both" / "model-seed-0", tmp_path / "one" / "model-seed-0")


@pytest.mark.parametrize("name", ["bert", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "t5"))])
def test_scores_of_a_language_model_guide_a_classifier(name, tmp_path, capsys):
    """From the command line: scores by the model's own head, then a classifier with the same backbone."""
    from fisherscope.cli import main
    from fisherscope.finetune.methods.guided_dropout import guided_rates

    model, scores, out = f"builtin:{name}", str(tmp_path / "scores.h5"), tmp_path / "out"
    data = ["--data", "builtin:docs", "--num-examples", "8", "--max-length", "32"]
    assert main(["fisher", "--model", model, *data, "--out", scores]) == 0
    task = ["--task", TASK, "--train-size", "8", "--max-steps", "1", "--max-length", "16", "--strict"]
    flags = ["--method", "guided-dropout", "--scores", scores, "--out", str(out)]
    assert main(["finetune", "--model", model, *task, *flags]) == 0
    assert "guided-dropout on builtin:acceptability" in capsys.readouterr().out
    classifier, _ = fs.load_model(model, objective="classification", num_labels=2)
    sites = guided_rates(fs.FisherScores.load(scores), classifier)
    assert [site.name for site in sites] == [site.name for site in dropout_sites(classifier)]
    assert min(site.rate for site in sites) == 0.0 and max(site.rate for site in sites) == 0.099


def test_the_command_line(tmp_path, capsys, monkeypatch):
    from fisherscope.cli import main

    flags = ["--model", "builtin:bert", "--task", TASK, "--train-size", "16", "--max-steps", "2", "--out"]
    assert main(["finetune", *flags, str(tmp_path / "a"), "--method", "guided-dropout", "--highest", "0.2"]) == 0
    assert "guided-dropout on builtin:acceptability, matthews" in capsys.readouterr().out
    results = Results.load(tmp_path / "a")
    assert results.settings["settings"] == {"guided-dropout": {"highest": 0.2, "lowest": 0.0, "by": "rank"}}
    assert main(["finetune", *flags, str(tmp_path / "b"), "--highest", "0.2"]) == 1
    assert "vanilla has no setting 'highest'" in capsys.readouterr().err
