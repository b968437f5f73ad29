"""Training a part of a model: which entries move, that all others keep every bit, and how the part is chosen."""

import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from architectures import entry
from conftest import Case, Interrupted, batched, built, case, untouched
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from fisherscope.data import Batches
from fisherscope.finetune.contract import check_regularizer
from fisherscope.finetune.methods.bitfit import BitFit
from fisherscope.finetune.methods.child_tuning import ChildTuningD, ChildTuningF
from fisherscope.finetune.methods.fish_mask import FishMask
from fisherscope.finetune.methods.fixed_mask import SubnetworkUpdate, backbone_names, new_names
from fisherscope.finetune.methods.random_mask import RandomMask
from fisherscope.finetune.methods.top_k_layers import TopKLayers, numbered_layers
from fisherscope.finetune.plan import check_method
from fisherscope.finetune.regularizer import Regularizer
from fisherscope.finetune.run import Run
from fisherscope.fisher import estimate_fisher
from fisherscope.masks import Mask, MaskMismatch, random_fraction, random_like, top_fraction
from fisherscope.models import load_model
from fisherscope.objectives import example_losses
from fisherscope.scores import FisherScores

KINDS = ("BERT", "GPT-2", "T5")
STEPS = 8


@pytest.fixture(params=KINDS)
def classifier(request: pytest.FixtureRequest) -> Case:
    return entry(request.param, "classification")


@pytest.fixture
def encoder() -> Case:
    return entry("BERT", "classification")


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def loss_of(model: nn.Module, chosen: Case, batch: dict[str, Tensor]) -> Tensor:
    return example_losses(model, batch, chosen.objective).mean.mean()


def adam(model: nn.Module, decay: float = 0.1) -> AdamW:
    return AdamW(model.parameters(), lr=1e-2, weight_decay=decay)


def train(
    chosen: Case,
    optimizer: torch.optim.Optimizer,
    steps: int = STEPS,
    *,
    clip: float = 0.1,
    size: int = 4,
    after_backward: Callable[[], None] = lambda: None,
) -> None:
    """Optimizer steps with the model's dropout; every step sees the first four examples, in micro-batches."""
    batches = batched(chosen.examples[:4], size)
    for step in range(steps):
        torch.manual_seed(step)
        for batch in batches:
            (loss_of(chosen.model, chosen, batch) / len(batches)).backward()
        after_backward()
        nn.utils.clip_grad_norm_(chosen.model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()


def train_with(chosen: Case, regularizer: Regularizer, *, decay: float = 0.1, **settings: Any) -> dict[str, Tensor]:
    """The parameters after a training with a regularizer, with a fresh optimizer."""
    chosen.model.train()
    optimizer = adam(chosen.model, decay)
    with regularizer.applied_to(chosen.model, optimizer):
        train(chosen, optimizer, **settings)
    return parameters_of(chosen.model)


def half_of(model: nn.Module, seed: int = 0) -> Mask:
    """Random halves of most parameters of the backbone, nothing of the first and all of the last."""
    names = backbone_names(model)
    mask = random_fraction(model, 0.5, seed=seed)
    ends = {names[0]: torch.zeros_like(mask[names[0]]), names[-1]: torch.ones_like(mask[names[-1]])}
    return Mask({name: ends.get(name, mask[name]) for name in names}, mask.provenance)


def everything(model: nn.Module) -> Mask:
    return random_fraction(model, 1.0, seed=0)


def random_scores(model: nn.Module, names: Sequence[str] | None = None, seed: int = 0) -> FisherScores:
    draw = torch.Generator().manual_seed(seed)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    return FisherScores({name: torch.rand(shapes[name], generator=draw) for name in names or shapes}, num_examples=1)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit, for values without NaN and -0."""
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def moved_names(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def run_of(chosen: Case, batch_size: int = 2, **settings: Any) -> Run:
    examples = [{name: value.numpy() for name, value in example.items()} for example in chosen.examples]
    batches = Batches(examples, {"labels": -100}, batch_size, chosen.objective, "tiny", "0", None, {})
    model: Any = chosen.model
    return Run(model, batches, chosen.objective, total_steps=STEPS, **settings)


# a fixed mask


def test_unselected_entries_keep_every_bit_under_decay_momentum_and_clipping(classifier: Case):
    model, mask = classifier.model, half_of(classifier.model)
    model.train()
    optimizer = adam(model, decay=0.1)
    train(classifier, optimizer, 2)  # so that there is momentum from before
    before = parameters_of(model)
    with SubnetworkUpdate(mask).applied_to(model, optimizer):
        train(classifier, optimizer)
    after = parameters_of(model)
    for name, selected in mask.items():
        assert torch.equal(after[name][~selected], before[name][~selected]), name


def test_selected_entries_and_the_head_move(classifier: Case):
    model, mask = classifier.model, half_of(classifier.model)
    before = parameters_of(model)
    after = train_with(classifier, SubnetworkUpdate(mask))
    for name, value in before.items():
        selected = mask.get(name, torch.ones_like(value, dtype=torch.bool))
        assert (after[name][selected] != value[selected]).all(), name  # by weight decay, if nothing else


def test_a_mask_of_everything_is_plain_training_bit_for_bit_with_dropout():
    plain = train_with(entry("BERT", "classification"), Regularizer())
    chosen = entry("BERT", "classification")
    assert same(train_with(chosen, SubnetworkUpdate(everything(chosen.model))), plain)


def test_clipping_sees_only_the_gradients_that_are_used(encoder: Case):
    """The reference masks by hand: gradients before they are clipped, and values after every step."""
    mask = half_of(encoder.model)
    ours = train_with(encoder, SubnetworkUpdate(mask), decay=0.0)
    other = entry("BERT", "classification")
    parameters: dict[str, Any] = dict(other.model.named_parameters())

    def zero() -> None:
        for name, selected in mask.items():
            parameters[name].grad.mul_(selected)

    other.model.train()
    train(other, adam(other.model, decay=0.0), after_backward=zero)
    assert same(ours, parameters_of(other.model))


def test_an_infinite_gradient_of_an_unselected_entry_harms_nothing():
    model = nn.Linear(2, 1, bias=False)
    optimizer = adam(model)
    mask = Mask({"weight": torch.tensor([[True, False]])})
    with SubnetworkUpdate(mask).applied_to(model, optimizer):
        model(torch.tensor([[1.0, torch.inf]])).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert torch.isfinite(model.weight).all()


def test_parameters_with_nothing_selected_get_no_gradient_and_no_state(encoder: Case):
    model, mask = encoder.model, half_of(encoder.model)
    frozen = model.get_parameter(backbone_names(model)[0])
    optimizer = adam(model)
    with SubnetworkUpdate(mask).applied_to(model, optimizer):
        loss_of(model, encoder, batched(encoder.examples, 4)[0]).backward()
        assert frozen.grad is None
        optimizer.step()
    assert frozen not in optimizer.state
    assert len(optimizer.state) == len(list(model.parameters())) - 1


def test_four_micro_batches_are_one_batch(encoder: Case):
    model_one, model_four = encoder, entry("BERT", "classification")
    trained = []
    for chosen, size in ((model_one, 4), (model_four, 1)):
        chosen.model.eval()  # dropout would differ
        optimizer = SGD(chosen.model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        with SubnetworkUpdate(half_of(chosen.model)).applied_to(chosen.model, optimizer):
            train(chosen, optimizer, size=size)
        trained.append(parameters_of(chosen.model))
    for name in trained[0]:
        torch.testing.assert_close(trained[0][name], trained[1][name], rtol=1e-9, atol=1e-11)


def test_a_mask_of_another_head_leaves_this_head_free(encoder: Case, caplog: pytest.LogCaptureFixture):
    pretrained = entry("BERT", "masked LM").model
    mask = random_fraction(pretrained, 0.0, seed=0)
    before = parameters_of(encoder.model)
    with caplog.at_level(logging.INFO, "fisherscope"):
        after = train_with(encoder, SubnetworkUpdate(Mask(mask.tensors, {"model": {"prefix": "bert."}})))
    assert moved_names(before, after) == set(before) - set(backbone_names(encoder.model))
    assert "4 parameters that the mask lacks are trained, the first is 'bert.pooler.dense.weight'." in caplog.messages


def test_the_log_counts_entries_and_the_optimizer_state_that_is_saved(caplog: pytest.LogCaptureFixture):
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    mask = Mask({name: torch.full(p.shape, name.startswith("1.")) for name, p in model.named_parameters()})
    with caplog.at_level(logging.INFO, "fisherscope"), SubnetworkUpdate(mask).applied_to(model, adam(model)):
        pass
    assert caplog.messages == [
        "Training 3 of 11 entries; 2 parameters are frozen, which saves 64 bytes of Adam's two moments."
    ]


def test_a_mask_that_selects_nothing_where_there_is_no_head_is_refused():
    model = nn.Sequential(nn.Linear(3, 2))
    mask = Mask({name: torch.zeros(p.shape, dtype=torch.bool) for name, p in model.named_parameters()})
    message = "needs at least one entry to train, but none of 8 is selected; take a larger mask"
    with pytest.raises(ValueError, match=message), SubnetworkUpdate(mask).applied_to(model, adam(model)):
        pass


def test_a_mask_of_another_model_is_refused(encoder: Case):
    mask = everything(entry("GPT-2", "classification").model)
    with pytest.raises(MaskMismatch), SubnetworkUpdate(mask).applied_to(encoder.model, adam(encoder.model)):
        pass


def test_the_block_restores_the_model_when_training_raises(encoder: Case):
    hooks = [p._post_accumulate_grad_hooks for p in encoder.model.parameters()]
    optimizer = adam(encoder.model)
    with (
        untouched(encoder.model),
        pytest.raises(Interrupted),
        SubnetworkUpdate(half_of(encoder.model)).applied_to(encoder.model, optimizer),
    ):
        raise Interrupted
    assert not optimizer._optimizer_step_post_hooks
    assert not any(p._post_accumulate_grad_hooks for p in encoder.model.parameters())
    assert not any(hooks)


def test_a_run_without_a_mask_selects_the_share_of_the_backbone_with_the_highest_scores(encoder: Case):
    regularizer = SubnetworkUpdate.for_run(run_of(encoder), fraction=0.25)
    scores = estimate_fisher(encoder.model, batched(encoder.examples, 2), progress=False)
    flat = torch.cat([scores[name].flatten() for name in backbone_names(encoder.model)])
    least = flat.sort(descending=True).values[round(0.25 * len(flat)) - 1]
    assert list(regularizer.mask) == backbone_names(encoder.model)
    assert regularizer.mask.num_selected == round(0.25 * len(flat))
    assert all((scores[name][selected] >= least).all() for name, selected in regularizer.mask.items())


def test_a_run_takes_the_mask_that_it_was_given(encoder: Case):
    mask = half_of(encoder.model)
    taken = SubnetworkUpdate.for_run(run_of(encoder, mask=mask)).mask
    assert same(dict(taken), dict(mask))


@pytest.mark.parametrize(
    ("method", "setting", "given"),
    [("fixed-mask", "fraction", "mask"), ("random-mask", "fraction", "mask"), ("fish-mask", "num_samples", "scores")],
)
def test_settings_that_what_is_given_takes_the_place_of_are_refused(method: str, setting: str, given: str):
    check_method(method, {setting: 0.5})
    with pytest.raises(ValueError, match=f"{method} has no use for the setting '{setting}' beside {given}"):
        check_method(method, {setting: 0.5}, [given])


def test_a_run_that_is_resumed_with_trained_weights_warns_of_nothing(encoder: Case, caplog: pytest.LogCaptureFixture):
    regularizer = SubnetworkUpdate.for_run(run_of(encoder, mask=half_of(encoder.model)))
    train_with(encoder, Regularizer(), steps=1)
    with regularizer.applied_to(encoder.model, adam(encoder.model)):
        pass
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


# random, biases, top layers


def test_a_random_mask_trains_the_same_share_of_every_parameter_and_the_head(classifier: Case):
    before = parameters_of(classifier.model)
    after = train_with(classifier, RandomMask(0.3, seed=1))
    inside = backbone_names(classifier.model)
    for name, value in before.items():
        share = 0.3 if name in inside else 1.0
        assert int((after[name] != value).sum()) == round(share * value.numel()), name


def test_a_random_mask_depends_on_the_seed_and_not_on_the_head():
    def moved_by(seed: int, head: str) -> dict[str, Tensor]:
        chosen = entry("BERT", head)
        before = parameters_of(chosen.model)
        after = train_with(chosen, RandomMask(0.3, seed=seed), steps=1)
        return {name: after[name] != before[name] for name in backbone_names(chosen.model)}

    assert same(moved_by(0, "classification"), moved_by(0, "masked LM"))
    assert not same(moved_by(0, "classification"), moved_by(1, "classification"))


def test_a_run_draws_the_random_mask_from_its_seed(encoder: Case):
    assert RandomMask.for_run(run_of(encoder, seed=7), fraction=0.2) == RandomMask(0.2, seed=7)


def test_the_control_of_a_mask_trains_as_many_others_of_every_parameter(classifier: Case):
    mask, before = half_of(classifier.model), parameters_of(classifier.model)
    after = train_with(classifier, RandomMask.for_run(run_of(classifier, mask=mask, seed=3)))
    moved = {name: after[name] != before[name] for name in before}
    for name, changed in moved.items():
        assert int(changed.sum()) == (int(mask[name].sum()) if name in mask else changed.numel()), name
    assert any(not torch.equal(moved[name], mask[name]) for name in mask)


def test_a_random_mask_like_another_one_depends_on_the_seed(encoder: Case):
    mask = half_of(encoder.model)
    assert same(dict(random_like(mask, seed=1)), dict(random_like(mask, seed=1)))
    assert not same(dict(random_like(mask, seed=1)), dict(random_like(mask, seed=2)))


@pytest.mark.parametrize("kind", ["BERT", "GPT-2", "XLNet", "DeBERTa"])
def test_bitfit_trains_biases_and_the_head_and_nothing_else(kind: str):
    chosen = entry(kind, "classification")
    before = parameters_of(chosen.model)
    after = train_with(chosen, BitFit())
    biases = {name for name in before if name.endswith("bias")}
    head = {name for name in before if name.split(".")[0] not in ("bert", "transformer", "deberta")}
    assert moved_names(before, after) == biases | head


def test_bitfit_leaves_a_pooler_that_came_with_the_checkpoint(encoder: Case):
    before = parameters_of(encoder.model)
    assert "bert.pooler.dense.weight" not in moved_names(before, train_with(encoder, BitFit()))


def test_bitfit_trains_a_pooler_that_is_drawn_at_random():
    model, _ = load_model("builtin:bert", objective="classification", num_labels=2, device="cpu")
    assert "bert.pooler.dense.weight" in new_names(model)
    with BitFit().applied_to(model, adam(model)):
        assert model.get_parameter("bert.pooler.dense.weight").requires_grad


def test_bitfit_refuses_a_model_without_biases():
    model = entry("T5", "classification").model
    message = (
        "^BitFit trains biases, but a T5ForSequenceClassification has none outside its head; take another method.$"
    )
    with pytest.raises(ValueError, match=message), BitFit().applied_to(model, adam(model)):
        pass


TOP_LAYERS = {
    ("BERT", 0): (),
    ("BERT", 1): ("bert.encoder.layer.1.",),
    ("BERT", 2): ("bert.encoder.layer.",),
    ("GPT-2", 1): ("transformer.h.1.", "transformer.ln_f."),
    ("T5", 1): ("transformer.decoder.block.1.", "transformer.decoder.final_layer_norm."),
    ("T5", 2): ("transformer.decoder.",),
    ("T5", 3): ("transformer.decoder.", "transformer.encoder.block.1.", "transformer.encoder.final_layer_norm."),
    ("T5", 4): ("transformer.decoder.", "transformer.encoder."),
    ("BART", 1): ("model.decoder.layers.1.",),
    ("BART", 4): ("model.decoder.layers.", "model.encoder.layers."),
    ("DeBERTa-v2", 2): ("deberta.encoder.layer.",),
    ("ALBERT", 1): ("albert.encoder.albert_layer_groups.",),
}
"""The backbone's parameters that are trained, by what their names begin with."""


@pytest.mark.parametrize(("kind", "layers"), TOP_LAYERS)
def test_the_top_layers_pooler_and_head_are_trained_and_nothing_else(kind: str, layers: int):
    chosen = entry(kind, "classification")
    before = parameters_of(chosen.model)
    after = train_with(chosen, TopKLayers(layers))
    inside = backbone_names(chosen.model)
    trained = {name for name in before if name not in inside or name.startswith(TOP_LAYERS[kind, layers])}
    assert moved_names(before, after) == trained


def test_frozen_layers_get_no_gradient_at_all(classifier: Case):
    model = classifier.model
    with TopKLayers(1).applied_to(model, adam(model)):
        loss_of(model, classifier, batched(classifier.examples, 4)[0]).backward()
        assert {p.grad is None for p in model.parameters() if not p.requires_grad} == {True}
        assert not all(p.requires_grad for p in model.parameters())


def test_more_layers_than_the_model_has_are_refused(encoder: Case):
    message = "layers must be at most the 2 that a BertForSequenceClassification has, got 3"
    with pytest.raises(ValueError, match=message), TopKLayers(3).applied_to(encoder.model, adam(encoder.model)):
        pass


def test_a_numbered_block_inside_another_one_is_a_part_of_it():
    layers = numbered_layers(entry("T5", "classification").model)
    stacks = ("transformer.encoder.block", "transformer.decoder.block")
    assert list(layers) == [f"{stack}.{n}" for stack in stacks for n in range(2)]
    table = "transformer.encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert table in layers["transformer.encoder.block.0"]


# FISH mask


@pytest.mark.parametrize("keep", [0.17, 0.5, 0.999])
def test_a_fish_mask_trains_exactly_the_share_of_all_entries_head_included(keep: float, classifier: Case):
    before = parameters_of(classifier.model)
    after = train_with(classifier, FishMask(random_scores(classifier.model), keep))
    total = sum(value.numel() for value in before.values())
    assert sum(int((after[name] != before[name]).sum()) for name in before) == int(total * keep)


def test_a_fish_mask_selects_the_highest_scores_of_all_parameters_together(encoder: Case):
    scores = random_scores(encoder.model)
    masks = FishMask(scores, 0.2).masks(encoder.model)
    assert set(scores) - set(masks) == {"classifier.weight", "classifier.bias"}
    least = min(float(scores[name][mask].min()) for name, mask in masks.items() if mask.any())
    most = max(float(scores[name][~mask].max()) for name, mask in masks.items())
    assert least > most


def test_entries_outside_a_fish_mask_keep_every_bit_under_decay(classifier: Case):
    regularizer = FishMask(random_scores(classifier.model), 0.3)
    masks, before = regularizer.masks(classifier.model), parameters_of(classifier.model)
    after = train_with(classifier, regularizer, decay=0.1)
    for name, mask in masks.items():
        assert torch.equal(after[name][~mask], before[name][~mask]), name


def test_a_fish_mask_smaller_than_the_head_is_refused_and_the_smallest_that_works_works(encoder: Case):
    scores = random_scores(encoder.model)
    with pytest.raises(ValueError, match="beside the 51 entries of the head") as caught:
        FishMask(scores, 0.001).masks(encoder.model)
    smallest = float(str(caught.value).rpartition(" ")[2].rstrip("."))
    masks = FishMask(scores, smallest).masks(encoder.model)
    assert sum(int(mask.sum()) for mask in masks.values()) == 1


@pytest.mark.parametrize(("variant", "power"), [("squared", 2), ("absolute", 1)])
def test_fish_scores_are_the_mean_power_of_the_examples_gradients(variant: Any, power: int, encoder: Case):
    made = FishMask.for_run(run_of(encoder), variant=variant)
    parameters = dict(encoder.model.named_parameters())
    expected = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for batch in batched(encoder.examples, 1):
        gradients = torch.autograd.grad(loss_of(encoder.model, encoder, batch), list(parameters.values()))
        for name, gradient in zip(parameters, gradients, strict=True):
            expected[name] += gradient.abs() ** power / len(encoder.examples)
    for name in parameters:
        torch.testing.assert_close(made.scores[name], expected[name], rtol=1e-9, atol=1e-14)


def test_fish_scores_are_of_examples_drawn_with_the_seed_of_the_run(encoder: Case):
    chosen = [FishMask.for_run(run_of(encoder, seed=seed), num_samples=2).scores for seed in (0, 0, 1, 2, 3)]
    assert {scores.num_examples for scores in chosen} == {2}
    assert same(dict(chosen[0]), dict(chosen[1]))
    assert not all(same(dict(chosen[0]), dict(other)) for other in chosen[2:])  # two of five may be the same two


def test_a_fish_mask_takes_the_scores_that_the_user_gave(encoder: Case):
    scores = estimate_fisher(encoder.model, batched(encoder.examples, 2), estimator="exact", progress=False)
    assert FishMask.for_run(run_of(encoder, scores=scores), keep=0.3).scores.estimator == "exact"


def test_scores_of_another_model_are_refused(encoder: Case):
    scores = random_scores(encoder.model, [name for name in parameters_of(encoder.model) if "query" not in name])
    message = "they have nothing of the shape of 'bert.encoder.layer.0.attention.self.query.weight'"
    for regularizer in (FishMask(scores, 0.5), ChildTuningD(scores)):
        with pytest.raises(ValueError, match=message):
            regularizer.masks(encoder.model)


# Child-Tuning F


def test_keeping_everything_is_plain_adamw_bit_for_bit():
    plain = train_with(entry("BERT", "classification"), Regularizer())
    assert same(train_with(entry("BERT", "classification"), ChildTuningF(keep=1.0)), plain)


def test_the_masked_gradient_is_unbiased():
    """With a constant gradient of 1 and learning rate 1, SGD adds up the masks divided by p."""
    model = nn.Linear(40, 50, bias=False)
    nn.init.zeros_(model.weight)
    optimizer, steps, keep = SGD(model.parameters(), lr=1.0), 50, 0.3
    with ChildTuningF(keep, seed=3).applied_to(model, optimizer):
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.ones(1, 40)).sum().backward()
            optimizer.step()
    mean = -model.weight.detach() / steps
    error = ((1 - keep) / keep / steps) ** 0.5  # standard deviation of the mean of every entry
    assert abs(float(mean.mean()) - 1) < 4 * error / 2000**0.5
    assert float(mean.std()) == pytest.approx(error, rel=0.1)


def test_every_entry_gets_its_gradient_divided_by_p_or_nothing():
    model = nn.Linear(40, 50, bias=False)
    before = model.weight.detach().clone()
    optimizer = SGD(model.parameters(), lr=1.0)
    with ChildTuningF(0.25).applied_to(model, optimizer):
        model(torch.ones(1, 40)).sum().backward()
        assert model.weight.grad is not None
        assert set(model.weight.grad.unique().tolist()) == {0.0, 1.0}  # what is clipped is not yet divided
        optimizer.step()
    assert set((before - model.weight).round(decimals=4).unique().tolist()) == {0.0, 4.0}


def test_the_micro_batches_of_a_step_share_a_mask_and_steps_do_not():
    model = nn.Linear(40, 50, bias=False)
    optimizer = SGD(model.parameters(), lr=0.0)
    seen = []
    with ChildTuningF(0.5).applied_to(model, optimizer):
        for step, micro in itertools.product(range(2), range(2)):
            model.weight.grad = None
            model(torch.ones(1, 40)).sum().backward()
            seen.append(model.weight.grad != 0)
            if micro:
                optimizer.step()
            assert len(seen) == 2 * step + micro + 1
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[2], seen[3])
    assert not torch.equal(seen[0], seen[2])


def test_the_draws_leave_torchs_generator_alone(encoder: Case):
    optimizer = adam(encoder.model)
    before = torch.get_rng_state()
    with ChildTuningF(0.5).applied_to(encoder.model, optimizer):
        optimizer.step()
        assert torch.equal(torch.get_rng_state(), before)


def test_every_parameter_has_its_own_mask_and_the_seed_decides():
    def mask_of(seed: int) -> list[Tensor]:
        model = nn.Sequential(nn.Linear(20, 20, bias=False), nn.Linear(20, 20, bias=False))
        optimizer = SGD(model.parameters(), lr=0.0)
        with ChildTuningF(0.5, seed=seed).applied_to(model, optimizer):
            model(torch.rand(1, 20)).sum().backward()
        return [p.grad != 0 for p in model.parameters()]

    first, again, other = mask_of(0), mask_of(0), mask_of(1)
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], first[1])
    assert not any(map(torch.equal, first, other))


def test_a_resumed_training_draws_what_comes_next():
    model = nn.Linear(20, 20, bias=False)
    optimizer = SGD(model.parameters(), lr=0.0)

    def gradient() -> Tensor:
        model.weight.grad = None
        model(torch.ones(1, 20)).sum().backward()
        assert model.weight.grad is not None
        return torch.ne(model.weight.grad, 0)

    with ChildTuningF(0.5).applied_to(model, optimizer) as applied:
        first = gradient()
        for _ in range(3):
            optimizer.step()
        third, state = gradient(), applied.state_dict()
    with ChildTuningF(0.5).applied_to(model, optimizer) as applied:
        assert torch.equal(gradient(), first)
        applied.load_state_dict(state)
        assert torch.equal(gradient(), third)
    assert not torch.equal(first, third)


# Child-Tuning D


def test_the_share_that_is_kept_is_exact_over_all_numbered_layers_together(classifier: Case):
    scores = random_scores(classifier.model)
    ties = FisherScores({name: (4 * score).floor() for name, score in scores.items()}, num_examples=1)
    masks = ChildTuningD(ties, 0.3).masks(classifier.model)
    assert set(masks) == {name for names in numbered_layers(classifier.model).values() for name in names}
    assert sum(int(m.sum()) for m in masks.values()) == round(0.3 * sum(m.numel() for m in masks.values()))


def test_masked_entries_keep_every_bit_without_decay_and_with_a_fresh_optimizer(classifier: Case):
    regularizer = ChildTuningD(random_scores(classifier.model), 0.3)
    masks, before = regularizer.masks(classifier.model), parameters_of(classifier.model)
    after = train_with(classifier, regularizer, decay=0.0)
    for name, value in before.items():
        selected = masks.get(name, torch.ones_like(value, dtype=torch.bool))
        assert torch.equal(after[name][~selected], value[~selected]), name
        assert not selected.any() or not torch.equal(after[name][selected], value[selected]), name


def test_masked_entries_follow_the_product_of_the_decay_exactly(encoder: Case):
    regularizer = ChildTuningD(random_scores(encoder.model), 0.3)
    masks, expected = regularizer.masks(encoder.model), parameters_of(encoder.model)
    encoder.model.train()
    optimizer = adam(encoder.model, decay=0.1)
    with regularizer.applied_to(encoder.model, optimizer):
        for step in range(STEPS):
            optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
            train(encoder, optimizer, 1)
            for value in expected.values():
                value.mul_(1 - 1e-2 / (step + 1) * 0.1)
    for name, mask in masks.items():
        assert torch.equal(encoder.model.get_parameter(name)[~mask], expected[name][~mask]), name


def test_keeping_all_of_the_layers_is_plain_training_bit_for_bit(encoder: Case):
    plain = train_with(entry("BERT", "classification"), Regularizer())
    assert same(train_with(encoder, ChildTuningD(random_scores(encoder.model), 1.0)), plain)


def test_a_model_without_numbered_layers_is_refused():
    model = nn.ModuleDict({"only": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match="masks numbered layers, but a ModuleDict has none"):
        ChildTuningD(random_scores(model)).masks(model)


def test_the_exact_variant_ranks_by_the_mean_square_of_the_examples_gradients(encoder: Case):
    made = ChildTuningD.for_run(run_of(encoder), keep=0.2)
    scores = estimate_fisher(encoder.model, batched(encoder.examples, 2), engine="loop", progress=False)
    expected = top_fraction(scores, 0.2, include=["bert.encoder.layer.*"])
    assert all(torch.equal(mask, expected[name]) for name, mask in made.masks(encoder.model).items())


@pytest.mark.parametrize("limit", [0.05, 1e9])
def test_the_published_variant_squares_clipped_batch_means_in_train_mode(limit: float, encoder: Case):
    run = run_of(encoder, seed=5, settings={"max_grad_norm": limit})
    made = ChildTuningD.for_run(run, variant="published")
    model = encoder.model.train()
    named: dict[str, Any] = {name: p for name, p in model.named_parameters() if ".layer." in name}
    expected = {name: torch.zeros_like(p) for name, p in named.items()}
    torch.manual_seed(5)
    for batch in run.batches:
        model.zero_grad()
        loss_of(model, encoder, batch).backward()
        for name, parameter in named.items():
            nn.utils.clip_grad_norm_([parameter], limit)
            expected[name] += parameter.grad.square() / len(run.batches)
    assert set(made.scores) == set(expected)
    for name in expected:
        torch.testing.assert_close(made.scores[name], expected[name].detach(), rtol=1e-10, atol=1e-16)


def test_the_published_variant_leaves_the_model_and_torchs_generator_as_they_were(encoder: Case):
    before = torch.get_rng_state()
    with untouched(encoder.model):
        ChildTuningD.for_run(run_of(encoder), variant="published")
    assert torch.equal(torch.get_rng_state(), before)


def test_the_mean_square_of_a_batch_mean_is_that_of_an_example_over_b_and_a_rest():
    """E[(mean of B)^2] = E[g^2]/B + (1 - 1/B) (E g)^2 for independent examples: over all pairs of three."""
    chosen = case("bert-classifier", lengths=(5, 5, 5))
    parameters = dict(chosen.model.named_parameters())
    gradients = [
        torch.autograd.grad(loss_of(chosen.model, chosen, batch), list(parameters.values()))
        for batch in batched(chosen.examples, 1)
    ]
    pairs = [batched(pair, 2)[0] for pair in itertools.product(chosen.examples, repeat=2)]
    of_pairs = estimate_fisher(chosen.model, pairs, estimator="squared-batch-mean", progress=False)
    of_examples = estimate_fisher(chosen.model, batched(chosen.examples, 1), progress=False)
    for name, *each in zip(parameters, *gradients, strict=True):
        mean = torch.stack(each).mean(0)
        torch.testing.assert_close(of_pairs[name], of_examples[name] / 2 + mean.square() / 2, rtol=1e-9, atol=1e-14)


# all of them

METHODS: dict[str, Callable[[nn.Module], tuple[Regularizer, Regularizer | None]]] = {
    "fixed mask": lambda m: (SubnetworkUpdate(half_of(m)), SubnetworkUpdate(everything(m))),
    "random mask": lambda m: (RandomMask(0.4), RandomMask(1.0)),
    "BitFit": lambda m: (BitFit(), None),
    "FISH mask": lambda m: (FishMask(random_scores(m), 0.2), FishMask(random_scores(m), 1.0)),
    "Child-Tuning F": lambda m: (ChildTuningF(0.3), ChildTuningF(1.0)),
    "Child-Tuning D": lambda m: (ChildTuningD(random_scores(m)), ChildTuningD(random_scores(m), 1.0)),
    "top layers": lambda m: (TopKLayers(1), None),
}


PAIRS = [(method, kind) for method in METHODS for kind in KINDS if (method, kind) != ("BitFit", "T5")]  # no biases


@pytest.mark.parametrize(("method", "kind"), PAIRS)
def test_what_every_method_promises_holds(method: str, kind: str):
    classifier = entry(kind, "classification")
    changing, neutral = METHODS[method](classifier.model)
    check_regularizer(
        changing,
        classifier.model,
        batched(classifier.examples, 2),
        objective=classifier.objective,
        neutral=neutral,
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomMask(0.0), "fraction must be above 0 and at most 1, got 0"),
        (lambda: RandomMask(1.5), "fraction must be above 0 and at most 1, got 1.5"),
        (lambda: FishMask(random_scores(nn.Linear(1, 1)), 0.0), "keep must be above 0 and at most 1, got 0"),
        (lambda: ChildTuningF(0.0), "keep must be above 0 and at most 1, got 0"),
        (lambda: ChildTuningD(random_scores(nn.Linear(1, 1)), 2.0), "keep must be above 0 and at most 1, got 2"),
        (lambda: TopKLayers(-1), "layers must be at least 0, got -1"),
    ],
)
def test_settings_out_of_range_are_refused(make: Callable[[], object], message: str):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (FishMask, {"variant": "cubed"}, "variant must be 'squared' or 'absolute', got 'cubed'"),
        (FishMask, {"num_samples": 0}, "num_samples must be at least 1, got 0"),
        (ChildTuningD, {"variant": "cubed"}, "variant must be 'exact' or 'published', got 'cubed'"),
    ],
)
def test_unknown_settings_of_a_run_are_refused(
    method: type[Regularizer], settings: dict[str, Any], message: str, encoder: Case, unchecked: None
):
    with pytest.raises(ValueError, match=message):
        method.for_run(run_of(encoder), **settings)


def test_the_settings_of_the_methods_are_those_of_the_papers():
    methods: list[type[Regularizer]] = [
        SubnetworkUpdate, RandomMask, BitFit, FishMask, ChildTuningF, ChildTuningD, TopKLayers,
    ]  # fmt: skip
    assert {method.name: {n: p.default for n, p in method.settings().items()} for method in methods} == {
        "fixed-mask": {"fraction": 0.5},
        "random-mask": {"fraction": 0.5},
        "bitfit": {},
        "fish-mask": {"keep": 0.005, "variant": "squared", "num_samples": 1024},
        "child-tuning-f": {"keep": 0.3},
        "child-tuning-d": {"keep": 0.3, "variant": "exact"},
        "top-k-layers": {"layers": TopKLayers.settings()["layers"].empty},
    }


def test_an_already_frozen_parameter_stays_frozen():
    model = built("bert-classifier")
    frozen = model.get_parameter("classifier.weight").requires_grad_(False)
    with SubnetworkUpdate(half_of(model)).applied_to(model, adam(model)):
        assert not frozen.requires_grad
    assert not frozen.requires_grad
