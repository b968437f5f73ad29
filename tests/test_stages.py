"""Stages before a fine-tuning: more pretraining, another task first, and random weights in place of pretrained ones."""

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import kill_when
from safetensors.torch import load_file

import fisherscope as fs
from fisherscope.cli import main
from fisherscope.data.encoding import load_batches
from fisherscope.data.pairs import FOLLOWS, RANDOM, next_sentence_pairs, sentences_of
from fisherscope.finetune import Applied, finetune, plan, stages, training
from fisherscope.finetune.callback import STATE_FILE
from fisherscope.models import (
    _has_next_sentence_head,
    has_next_sentence_head,
    load_model,
    new_parameters,
    saved_objective,
    take_backbone,
)
from fisherscope.objectives import predict

BERT = "builtin:bert"
TASK, FIRST = "builtin:similarity", "builtin:acceptability"
QUICK = {"batch_size": 8, "learning_rate": 1e-3, "warmup": 0.0, "max_steps": 2, "progress": False}


def small_task(name, split, **options):
    """24 examples of each split, to be quick."""
    source = fs.read_task(name, split, **options)
    return replace(source, texts=source.texts[:24], labels=source.labels[:24])


@pytest.fixture(autouse=True)
def small_tasks(monkeypatch):
    """Every task is small."""
    monkeypatch.setattr(plan, "read_task", small_task)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """16 documents of six sentences."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    words = ["list", "file", "string", "module", "value", "object", "class", "method", "key", "name"]
    documents = [
        " ".join(f"The {words[(d + s) % 10]} returns a {words[(d * s + 3) % 10]} number {s}." for s in range(6))
        for d in range(16)
    ]
    file.write_text("\n\n".join(documents))
    return file


class Notes(fs.Regularizer):
    """The values that a training starts from."""

    def __init__(self):
        self.start = {}

    @contextmanager
    def applied_to(self, model, optimizer):
        self.start = {name: p.detach().clone() for name, p in model.named_parameters()}
        yield Applied()


def start_of(**settings):
    notes = Notes()
    results = finetune(BERT, task=TASK, method=notes, **QUICK | settings)
    return notes.start, results


def backbone(values):
    return {name: v for name, v in values.items() if name.startswith("bert.") and ".pooler." not in name}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def adapted(text, tmp_path_factory):
    """A run after a stage of pretraining: where it started, its results, its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "read_task", small_task)
        folder = tmp_path_factory.mktemp("adapted") / "out"
        settings = {"pretrain_text": text, "pretrain_steps": 6, "out": folder, "save_model": True}
        return *start_of(**settings), folder


class TestMorePretraining:
    def test_no_steps_are_vanilla(self, text):
        assert same(start_of(pretrain_text=text, pretrain_steps=0)[0], start_of()[0])

    def test_the_training_starts_from_the_adapted_backbone(self, adapted):
        """And so do anchors: what a run loads is what the stage came to, with its pooler."""
        start, _, folder = adapted
        saved = load_file(folder / "adapt-mlm-seed-0" / "model.safetensors")
        inside = {name: value for name, value in start.items() if name.startswith("bert.")}
        assert same(inside, {name: saved[name] for name in inside})

    def test_the_head_is_that_of_a_training_without_the_stage(self, adapted):
        start, plain = adapted[0], start_of()[0]
        assert torch.equal(start["classifier.weight"], plain["classifier.weight"])
        assert not torch.equal(start["bert.embeddings.LayerNorm.weight"], plain["bert.embeddings.LayerNorm.weight"])

    def test_results_say_what_was_done_and_from_which_weights(self, adapted):
        _, results, folder = adapted
        stage = results.settings["before"]
        assert (stage["stage"], stage["max_steps"], stage["objective"]) == ("adapt-mlm", 6, "mlm")
        model = load_model(folder / "adapt-mlm-seed-0", objective="mlm")[0]
        assert results.fingerprints["backbone"] == fs.models.describe(model)["backbone_fingerprint"]

    def test_the_loss_on_the_text_falls(self, text, adapted):
        tokenizer = load_model(BERT)[1]
        batches = load_batches(text, tokenizer, objective="mlm", seed=5)
        before, after = (
            _loss(load_model(name, objective="mlm")[0], batches) for name in (BERT, adapted[2] / "adapt-mlm-seed-0")
        )
        assert after < before - 0.1

    def test_the_adapted_folder_is_a_checkpoint_for_masked_tokens(self, adapted):
        assert saved_objective(adapted[2] / "adapt-mlm-seed-0") == "mlm"

    def test_what_a_stage_gave_is_not_new(self):
        """Anchors of proximity methods hold the values of a stage, where the checkpoint had none, too."""
        model = load_model(BERT, objective="classification", num_labels=2)[0]
        trained = load_model(BERT, objective="mlm", next_sentence=True, seed=3)[0]
        assert "bert.pooler.dense.weight" in new_parameters(model)
        take_backbone(model, trained)
        assert new_parameters(model) == ["classifier.bias", "classifier.weight"]
        assert torch.equal(model.bert.pooler.dense.weight, trained.bert.pooler.dense.weight)

    @pytest.mark.parametrize("name", ["builtin:gpt2", "builtin:t5"])
    def test_other_pretrainings_are_refused(self, name, text):
        with pytest.raises(ValueError, match=r"goes on with masked language modelling \(mlm\), but .* a head for"):
            finetune(name, task=TASK, pretrain_text=text, **QUICK)

    @pytest.mark.parametrize("family", ["Bart", "XLNet", "Electra"])
    def test_families_that_were_pretrained_otherwise_are_refused(self, family, tmp_path):
        """Their checkpoints name a head for sequences, for permuted tokens, or for replaced tokens."""
        heads = {"Bart": "ForConditionalGeneration", "XLNet": "LMHeadModel", "Electra": "ForPreTraining"}
        getattr(transformers, f"{family}Config")(architectures=[family + heads[family]]).save_pretrained(tmp_path)
        bare = _bare_plan(str(tmp_path))
        with pytest.raises(ValueError, match="goes on with masked language modelling"):
            stages.with_stages(bare, bare.recipe, "builtin:docs", 3, None, None)

    @pytest.mark.parametrize(
        "family",
        ["Roberta", *(pytest.param(name, marks=pytest.mark.slow) for name in ("Deberta", "DebertaV2", "DistilBert"))],
    )
    def test_models_without_a_head_for_pairs_learn_masked_tokens_only(self, family, text, tmp_path):
        _tiny(family, tmp_path / "model")
        results = finetune(
            tmp_path / "model", task=TASK, pretrain_text=text, pretrain_steps=2, out=tmp_path / "out", save_model=True,
            **QUICK,
        )  # fmt: skip
        assert results.settings["before"]["method"] == "vanilla"
        before, after = (
            load_file(folder / "model.safetensors")
            for folder in (tmp_path / "model", tmp_path / "out" / "adapt-mlm-seed-0")
        )
        assert sum(not torch.equal(before[name], after[name]) for name in after) > len(after) / 2


def _loss(model, batches):
    with torch.no_grad():
        losses = [predict(model, batch, "mlm").losses() for batch in batches]
    return float(sum(x.total.sum() for x in losses) / sum(x.count.sum() for x in losses))


def _bare_plan(model=BERT, **settings):
    source = fs.read_source("builtin:similarity", objective="regression")
    recipe = plan.Recipe(batch_size=8)
    return plan.Plan(
        model, None, "cpu", "regression", "x", "pearson", source, None, None, 0, None, recipe, "vanilla", **settings
    )


def _tiny(family, folder):
    """A small checkpoint for masked tokens, with the tokenizer of the built-in one."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    if family == "DistilBert":
        sizes = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}
    tokenizer = load_model(BERT)[1]
    config = getattr(transformers, f"{family}Config")(
        vocab_size=len(tokenizer), max_position_embeddings=140, pad_token_id=0, **sizes
    )
    getattr(transformers, f"{family}ForMaskedLM")(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class TestPairs:
    DOCUMENTS = tuple(tuple(f"d{d}s{s}." for s in range(9)) for d in range(30))

    def pairs(self, seed=0, room=4, documents=DOCUMENTS):
        lengths = [[1] * len(document) for document in documents]
        return next_sentence_pairs(documents, lengths, room, np.random.default_rng(seed))

    def test_sentences_end_in_marks(self):
        assert sentences_of(" A b. C d?  E 1.5 f!\nG ") == ["A b.", "C d?", "E 1.5 f!", "G"]

    def test_half_of_the_pairs_are_neighbours(self):
        """Within four standard deviations; 0 says that the second text follows, as in the heads of Hugging Face."""
        labels = np.array([label for seed in range(20) for *_, label in self.pairs(seed)])
        assert {FOLLOWS, RANDOM} == {0, 1}
        assert abs(labels.mean() - 0.5) < 4 * 0.5 / len(labels) ** 0.5

    def test_a_second_text_follows_or_is_of_another_document(self):
        for first, second, label in self.pairs():
            (document, last), (other, begin) = (_place(text) for text in (first.split()[-1], second.split()[0]))
            assert (other == document and begin == last + 1) if label == FOLLOWS else other != document

    def test_pairs_fill_the_room_and_no_more(self):
        sizes = [
            len(first.split()) + len(second.split()) for seed in range(5) for first, second, _ in self.pairs(seed, 5)
        ]
        assert max(sizes) == 5
        assert min(sizes) >= 2

    def test_a_sentence_longer_than_the_room_stays_whole(self):
        pairs = next_sentence_pairs([["a", "b"], ["c", "d"]], [[9, 9], [9, 9]], 4, np.random.default_rng(0))
        assert [len(first) for first, *_ in pairs] == [1, 1]

    def test_pairs_are_a_function_of_the_generator(self):
        assert self.pairs(3) == self.pairs(3) != self.pairs(4)

    @pytest.mark.parametrize("documents", [[["a", "b"]], [["a", "b"], ["c"]]])
    def test_documents_must_have_sentences_to_pair(self, documents):
        with pytest.raises(ValueError, match="two documents or more, and two sentences or more"):
            self.pairs(documents=documents)


def _place(sentence):
    return tuple(map(int, sentence.strip("d.").split("s")))


class TestNextSentence:
    def test_the_loss_is_that_of_the_head_for_both(self):
        """With as many masked tokens in every example, the sum of both means, as BertForPreTraining computes it."""
        model = load_model(BERT, objective="mlm", next_sentence=True)[0]
        draw = torch.Generator().manual_seed(0)
        tokens = torch.randint(5, 4000, (3, 12), generator=draw)
        labels = torch.full_like(tokens, -100)
        labels[:, 2:5] = tokens[:, 2:5]
        batch = {"input_ids": tokens, "labels": labels, "next_sentence_label": torch.tensor([0, 1, 1])}
        regularizer = stages.NextSentence()
        with torch.no_grad():
            expected = model(**batch).loss
            with regularizer.applied_to(model, torch.optim.SGD(model.parameters(), lr=0.1)):
                predictions = predict(model, batch, "mlm")
                penalty = regularizer.penalty(model, batch, predictions)
        assert penalty.shape == (3,)
        losses = predictions.losses()
        assert float((losses.total + penalty).sum() / losses.count.sum()) == pytest.approx(float(expected), rel=1e-5)
        assert not model._forward_hooks

    def test_which_classes_have_a_head_for_both(self):
        """BERT's pretraining has pairs; those of RoBERTa and the others have none (Liu et al. 2019)."""
        assert has_next_sentence_head(BERT)
        assert not has_next_sentence_head("builtin:t5")
        found = {name for name in ("Bert", "MegatronBert", "Roberta", "Electra", "DebertaV2", "Albert")
                 if _has_next_sentence_head(f"{name}ForPreTraining")}  # fmt: skip
        assert found == {"Bert", "MegatronBert"}

    def test_texts_of_one_sentence_are_masked_only(self, tmp_path):
        (tmp_path / "text.txt").write_text("one sentence.\n\nanother one.\n\na third.")
        bare = _bare_plan()
        made = stages.with_stages(bare, bare.recipe, tmp_path / "text.txt", 3, None, None).before
        assert made.method == "vanilla"

    def test_pairs_are_labelled_examples_of_two_texts(self, text):
        bare = _bare_plan()
        made = stages.with_stages(bare, bare.recipe, text, None, None, None).before
        batch = next(iter(stages.adaptation_batches(made, 0, load_model(BERT)[1])))
        assert set(batch["next_sentence_label"].tolist()) <= {0, 1}
        assert set(batch["token_type_ids"].unique().tolist()) == {0, 1}


class TestMasks:
    def examples(self, text, steps, seed=0):
        bare = _bare_plan()
        made = stages.with_stages(bare, bare.recipe, text, steps, None, None).before
        return stages.adaptation_batches(made, seed, load_model(BERT)[1]).examples

    def test_every_pass_has_masks_of_its_own(self, text):
        once = self.examples(text, None)
        more = self.examples(text, 20)
        assert len(more) > 2 * len(once)
        assert _masked(more[: len(once)]) == _masked(once) != _masked(more[len(once) : 2 * len(once)])

    def test_the_share_of_masked_tokens_is_15_percent(self, text):
        """Of tokens that are not special, within four standard deviations (Devlin et al. 2019)."""
        examples, special = self.examples(text, 100), load_model(BERT)[1].all_special_ids
        chosen = sum(int((e["labels"] != -100).sum()) for e in examples)
        total = sum(int((~np.isin(e["input_ids"], special) | (e["labels"] != -100)).sum()) for e in examples)
        assert abs(chosen / total - 0.15) < 4 * (0.15 * 0.85 / total) ** 0.5 + 0.01  # an example masks one at least

    def test_seeds_have_masks_of_their_own(self, text):
        assert _masked(self.examples(text, None, 0)) != _masked(self.examples(text, None, 1))

    def test_no_more_than_ten_passes_are_made(self, text):
        assert len(self.examples(text, 10_000)) < 11 * 1.5 * len(self.examples(text, None))


def _masked(examples):
    return [tuple(np.flatnonzero(e["labels"] != -100)) for e in examples]


class TestIntermediateTask:
    @pytest.mark.slow
    def test_it_is_the_fine_tuning_on_that_task(self, tmp_path):
        """The backbone that a training starts from is that of a model fine-tuned on the other task, bit for bit."""
        finetune(BERT, task=FIRST, out=tmp_path / "first", save_model=True, **QUICK)
        first = load_file(tmp_path / "first" / "model-seed-0" / "model.safetensors")
        start, results = start_of(intermediate_task=FIRST)
        assert same(backbone(start), backbone(first))
        assert torch.equal(start["bert.pooler.dense.weight"], first["bert.pooler.dense.weight"])
        assert results.settings["before"]["stage"] == "intermediate-task"

    def test_text_comes_before_it(self, text):
        bare = _bare_plan()
        made = stages.with_stages(bare, bare.recipe, text, 2, FIRST, None)
        assert (made.before.stage, made.before.before.stage) == ("intermediate-task", "adapt-mlm")

    def test_a_method_and_a_subset_are_for_the_training_alone(self):
        bare = replace(_bare_plan(), method="r-drop", settings={"weight": 3.0}, train_size=8)
        made = stages.with_stages(bare, bare.recipe, None, None, FIRST, None).before
        assert (made.method, dict(made.settings), made.train_size) == ("vanilla", {}, None)


class TestRandomWeights:
    def test_nothing_is_from_the_checkpoint(self):
        random, pretrained = (load_model(BERT, init=init)[0] for init in ("random", "pretrained"))
        names = [name for name, p in random.named_parameters() if p.ndim == 2]
        assert not any(torch.equal(random.get_parameter(n), pretrained.get_parameter(n)) for n in names)
        assert {n: p.shape for n, p in random.named_parameters()} == {
            n: p.shape for n, p in pretrained.named_parameters()
        }
        assert set(new_parameters(random)) == {name for name, _ in random.named_parameters()}
        spread = float(random.get_parameter("bert.encoder.layer.0.output.dense.weight").detach().std())
        assert spread == pytest.approx(random.config.initializer_range, rel=0.02)

    def test_the_seed_draws_them(self):
        torch.rand(3)
        one, again, other = (
            fs.models.weights_fingerprint(load_model(BERT, init="random", seed=s)[0]) for s in (1, 1, 2)
        )
        assert one == again != other

    def test_results_say_so(self):
        start, results = start_of(init="random")
        assert results.settings["init"] == "random"
        assert not same(backbone(start), backbone(start_of()[0]))

    def test_a_run_without_it_says_nothing(self):
        """So that folders of earlier runs can be resumed."""
        assert not {"init", "stage", "before", "sampling_exponent"} & set(_bare_plan().resolved())


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"pretrain_steps": 3}, "pretrain_steps goes with pretrain_text only"),
        ({"pretrain_text": "builtin:docs", "pretrain_steps": -1}, "pretrain_steps must not be negative, got -1"),
        ({"intermediate_task": "x"}, "The task must be one of"),
        ({"init": "x"}, "init must be pretrained or random; got 'x'"),
        ({"init": "random", "measure_forgetting": "builtin:docs"}, "Random weights have nothing to forget"),
    ],
)
def test_refusals(settings, match, monkeypatch):
    monkeypatch.setattr(plan, "read_task", fs.read_task)
    with pytest.raises(ValueError, match=match):
        finetune(BERT, task=TASK, **QUICK | settings)


def _staged(out, text, **options):
    settings = QUICK | {"max_steps": 6}
    return finetune(
        BERT, task=TASK, pretrain_text=text, pretrain_steps=8, out=out, save_model=True, **settings | options
    )


SCRIPT = """
import sys
import test_stages
test_stages.plan.read_task = test_stages.small_task
from fisherscope.finetune import trainer
trainer.SECONDS_BETWEEN_CHECKPOINTS = 0.0
test_stages._staged(sys.argv[1], sys.argv[2])
"""


@pytest.mark.slow
def test_a_run_killed_in_a_stage_goes_on_to_the_same_weights(text, tmp_path):
    _staged(tmp_path / "whole", text)
    killed = tmp_path / "killed"
    kill_when(
        lambda: any((killed / "seed-0.part" / "adapt-mlm").glob(f"checkpoint-[3-7]/{STATE_FILE}")), SCRIPT, killed, text
    )
    _staged(killed, text, resume=True)
    for folder in ("adapt-mlm-seed-0", "model-seed-0"):
        assert same(*(load_file(out / folder / "model.safetensors") for out in (tmp_path / "whole", killed)))
    assert not (killed / "seed-0.part").exists()


@pytest.mark.slow
def test_a_stage_that_is_done_is_not_done_again(text, tmp_path, monkeypatch):
    """An interruption after the stage: what it came to is read."""
    made, make = [], training.make_trainer

    def interrupted(plan, *arguments):
        made.append(plan.stage)
        if plan.stage is None and made.count(None) == 1:
            raise KeyboardInterrupt
        return make(plan, *arguments)

    monkeypatch.setattr(training, "make_trainer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _staged(tmp_path, text)
    _staged(tmp_path, text, resume=True)
    assert made == ["adapt-mlm", None, None]


def test_flags(text, tmp_path, monkeypatch):
    """Every flag reaches the plan."""
    found = []

    def note(plan, *_):
        found.append(plan)
        raise ValueError("noted")

    monkeypatch.setattr(training, "_run_all", note)
    words = f"finetune --model {BERT} --task {TASK} --init random --pretrain-text {text} --pretrain-steps 5"
    assert main([*words.split(), "--intermediate-task", FIRST, "--out", str(tmp_path / "out")]) != 0
    (made,) = found
    assert made.init == made.before.init == "random"
    assert (made.before.stage, made.before.name) == ("intermediate-task", FIRST)
    assert (made.before.before.stage, made.before.before.recipe.max_steps) == ("adapt-mlm", 5)
