"""Masks: laws of selection and of set algebra, files, and which models a mask fits."""

import contextlib
import itertools
import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import reference
import torch
from conftest import Case, batched, built, case
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fisherscope import storage
from fisherscope.fisher import estimate_fisher
from fisherscope.masks import Mask, MaskMismatch, bottom_fraction, random_fraction, sharma2024, top_fraction
from fisherscope.models import layer_of
from fisherscope.scores import FisherScores

COLUMNS = ["h.1.joint.weight"]
SHAPES = {
    "embeddings.weight": (5, 3),
    "h.0.dense.weight": (2, 4),
    "h.0.dense.bias": (2,),
    "h.1.joint.weight": (4, 3),
    "h.1.scale": (),
    "head.weight": (2, 3, 2),
}
GROUPS: dict[str, Callable[[str], str]] = {"model": lambda name: "", "layer": layer_of, "parameter": str}
CHOICES = list(itertools.product(GROUPS, ("entry", "row", "parameter")))
SIZE = sum(torch.Size(shape).numel() for shape in SHAPES.values())

fractions = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(0, 1))
"""Also those that round to halves."""


def scores_of(values: list[int]) -> FisherScores:
    """Small whole numbers, so that there are ties and every mean is exact."""
    flat = iter(values)
    tensors = {
        name: torch.tensor([float(next(flat)) for _ in range(torch.Size(shape).numel())]).view(shape)
        for name, shape in SHAPES.items()
    }
    model = {"name": "m", "prefix": "", "transposed": COLUMNS, "backbone_fingerprint": "0"}
    return FisherScores(tensors, num_examples=1, provenance={"model": model, "data": {"source": "text"}})


scores_with_ties = st.lists(st.integers(0, 3).map(lambda n: 12 * n), min_size=SIZE, max_size=SIZE).map(scores_of)


def masks() -> st.SearchStrategy[Mask]:
    return st.lists(st.booleans(), min_size=SIZE, max_size=SIZE).map(
        lambda bits: Mask({name: score != 0 for name, score in scores_of([int(bit) for bit in bits]).items()})
    )


def same(a: Mask | dict[str, Tensor], b: Mask | dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


@contextlib.contextmanager
def logged() -> Iterator[list[str]]:
    """What the masks say meanwhile."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("fisherscope.masks")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


def selected_units(mask: Mask, granularity: str) -> dict[str, tuple[int, int]]:
    """Selected units and all units of every parameter; fails where a unit is selected in part."""
    counts = {}
    for name, tensor in mask.items():
        units = [tensor[index] for index in reference._units(tensor, granularity, name in COLUMNS)]
        assert all(unit.all() or not unit.any() for unit in units), name
        counts[name] = sum(bool(unit.all()) for unit in units), len(units)
    return counts


@pytest.mark.parametrize(("within", "granularity"), CHOICES)
@given(scores=scores_with_ties, fraction=fractions)
def test_top_is_the_global_sort(within: str, granularity: str, scores: FisherScores, fraction: float):
    mask = top_fraction(scores, fraction, within=within, granularity=granularity)
    assert same(mask, reference.select_top(scores, fraction, GROUPS[within], granularity, COLUMNS))


@pytest.mark.parametrize("select", ["top", "random"])
@pytest.mark.parametrize(("within", "granularity"), CHOICES)
@given(scores=scores_with_ties, fraction=fractions)
def test_exactly_the_rounded_share_of_every_group(
    select: str, within: str, granularity: str, scores: FisherScores, fraction: float
):
    if select == "top":
        mask = top_fraction(scores, fraction, within=within, granularity=granularity)
    else:
        mask = random_fraction(scores, fraction, seed=1, stratify=within, granularity=granularity)
    counts = selected_units(mask, granularity)
    for _, names in itertools.groupby(sorted(counts, key=GROUPS[within]), GROUPS[within]):
        chosen, units = (sum(column) for column in zip(*(counts[name] for name in names), strict=True))
        assert chosen == round(fraction * units)


@pytest.mark.parametrize(("within", "granularity"), CHOICES)
@given(scores=scores_with_ties, fraction=fractions)
def test_bottom_is_the_complement_of_top(within: str, granularity: str, scores: FisherScores, fraction: float):
    options = {"within": within, "granularity": granularity}
    assert same(bottom_fraction(scores, fraction, **options), ~top_fraction(scores, 1 - fraction, **options))


@given(scores=scores_with_ties, fraction=fractions)
def test_no_selected_score_is_below_one_left_out(scores: FisherScores, fraction: float):
    mask = top_fraction(scores, fraction)
    inside = [score[mask[name]] for name, score in scores.items()]
    outside = [score[~mask[name]] for name, score in scores.items()]
    assert min(torch.cat(inside).tolist(), default=99) >= max(torch.cat(outside).tolist(), default=0)


@given(scores=scores_with_ties, small=fractions, large=fractions)
def test_a_smaller_fraction_is_part_of_a_larger(scores: FisherScores, small: float, large: float):
    small, large = sorted((small, large))
    inner, outer = top_fraction(scores, small), top_fraction(scores, large)
    assert same(inner & outer, inner)


@given(fraction=fractions)
def test_ties_go_to_the_first_positions(fraction: float):
    flat = torch.cat([tensor.flatten() for tensor in top_fraction(scores_of([12] * SIZE), fraction).values()])
    count = round(fraction * SIZE)
    assert flat.tolist() == [True] * count + [False] * (SIZE - count)


@pytest.mark.parametrize(("within", "granularity"), CHOICES)
@pytest.mark.parametrize("choose", [top_fraction, bottom_fraction])
@given(scores=scores_with_ties, fraction=fractions)
def test_a_cut_among_zeros_is_told(
    choose: Callable[..., Mask], within: str, granularity: str, scores: FisherScores, fraction: float
):
    with logged() as lines:
        mask = choose(scores, fraction, within=within, granularity=granularity)
    groups: dict[str, list[tuple[bool, bool]]] = {}
    for name, score in scores.items():
        for index in reference._units(score, granularity, name in COLUMNS):
            unit = bool(score[index].any()), bool(mask[name][index].all())
            groups.setdefault(GROUPS[within](name), []).append(unit)
    taken = {group: [chosen for scored, chosen in units if not scored] for group, units in groups.items()}
    split = {len({*chosen}) == 2 for chosen in taken.values()}  # equal units, some chosen and some not
    assert len(lines) == (True in split)
    zeros = [chosen for group in taken.values() for chosen in group]
    assert all(f"there are {len(zeros)}, of which it takes {sum(zeros)} by their position" in line for line in lines)


def test_advice_where_the_cut_falls_among_zeros(caplog: pytest.LogCaptureFixture):
    scores = FisherScores({"a": torch.cat([torch.zeros(3000), torch.ones(1000)])}, 1)
    top_fraction(scores, 0.5)
    bottom_fraction(scores, 0.5)
    random_fraction(scores, 0.5, seed=0)
    sharma2024(scores)
    assert [record.message for record in caplog.records] == [
        f"The cut of this mask falls among entries of score 0: there are 3,000, of which it takes {taken} by their "
        f"position, which means nothing; estimate the scores from more examples, take a {size} fraction or exclude "
        "parameters."
        for taken, size in (("1,000", "smaller"), ("2,000", "larger"))
    ]


def test_rows_of_a_transposed_weight_are_columns():
    scores = scores_of([0] * SIZE)
    scores["h.1.joint.weight"][:, 1] = 12
    scores["h.0.dense.weight"][1] = 12
    mask = top_fraction(scores, 0.5, within="parameter", granularity="row")
    assert mask["h.1.joint.weight"].all(0).tolist() == [True, True, False]  # two of three: the best, and the first
    assert mask["h.0.dense.weight"].all(1).tolist() == [False, True]


def test_rows_of_a_model_with_transposed_weights():
    made = case("gpt2", lengths=(5, 4))
    scores = estimate_fisher(made.model, batched(made.examples, 2), progress=False)
    mask = top_fraction(scores, 0.3, within="parameter", granularity="row")
    joint, table = mask["transformer.h.0.attn.c_attn.weight"], mask["transformer.wte.weight"]
    assert joint.shape == (32, 96)
    assert torch.equal(joint.any(0), joint.all(0))
    assert joint.all(0).sum() == round(0.3 * 96)
    assert torch.equal(table.any(1), table.all(1))
    assert table.all(1).sum() == round(0.3 * 99)
    drawn = random_fraction(made.model, 0.3, seed=0, stratify="parameter", granularity="row")
    assert drawn["transformer.h.0.attn.c_attn.weight"].all(0).sum() == round(0.3 * 96)


@given(fraction=fractions, seed=st.integers(0, 2**31))
def test_random_depends_only_on_the_seed(fraction: float, seed: int):
    scores = scores_of([12] * SIZE)
    mask = random_fraction(scores, fraction, seed=seed)
    torch.rand(7)
    assert same(random_fraction(scores, fraction, seed=seed), mask)
    assert same(random_fraction(mask, fraction, seed=seed), mask)


def test_random_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    random_fraction(scores_of([12] * SIZE), 0.5, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_other_seeds_draw_other_masks():
    drawn = [random_fraction(scores_of([0] * SIZE), 0.5, seed=seed) for seed in range(5)]
    assert not any(same(a, b) for a, b in itertools.combinations(drawn, 2))


def test_every_entry_is_as_likely():
    model = nn.Linear(4, 5)
    total = sum(random_fraction(model, 0.5, seed=seed)["weight"].double() for seed in range(200)) / 200
    assert (total - 0.5).abs().max() < 0.21  # six standard deviations


@pytest.mark.parametrize("granularity", ["entry", "row", "parameter"])
def test_scores_and_model_draw_the_same(granularity: str):
    made = case("gpt2", lengths=(5, 4))
    scores = estimate_fisher(made.model, batched(made.examples, 2), progress=False)
    options = {"seed": 3, "granularity": granularity}
    assert same(random_fraction(scores, 0.4, **options), random_fraction(made.model, 0.4, **options))


@given(scores=scores_with_ties, fraction=fractions)
def test_patterns_choose_among_parameters(scores: FisherScores, fraction: float):
    options = {"include": ["h.*", "head.*"], "exclude": ["*.bias", "*.scale"]}
    kept = ["h.0.dense.weight", "h.1.joint.weight", "head.weight"]
    inside = top_fraction(FisherScores({name: scores[name] for name in kept}, 1), fraction)
    for mask in (top_fraction(scores, fraction, **options), ~bottom_fraction(scores, 1 - fraction, **options)):
        assert list(mask) == list(SHAPES)
        assert all(torch.equal(mask[name], inside[name]) for name in kept)
    drawn = random_fraction(scores, fraction, seed=0, **options)
    for mask in (top_fraction(scores, fraction, **options), drawn, bottom_fraction(scores, fraction, **options)):
        assert not any(mask[name].any() for name in SHAPES if name not in kept)
    assert drawn.num_selected == round(fraction * sum(scores[name].numel() for name in kept))


@given(a=masks(), b=masks(), c=masks())
def test_masks_are_a_boolean_algebra(a: Mask, b: Mask, c: Mask):
    assert same(~~a, a)
    assert same(a & b, b & a)
    assert same(a | b, b | a)
    assert same(~(a & b), ~a | ~b)
    assert same(~(a | b), ~a & ~b)
    assert same(a & (b | c), (a & b) | (a & c))
    assert same(a & (b & c), (a & b) & c)
    assert same(a & a, a)
    assert (a & ~a).num_selected == 0
    assert (a | ~a).density == 1
    assert (a & b).num_selected + (a | b).num_selected == a.num_selected + b.num_selected


@given(a=masks(), b=masks())
def test_and_selects_what_both_select(a: Mask, b: Mask):
    for name in SHAPES:
        assert (a & b)[name].flatten().tolist() == [
            x and y for x, y in zip(a[name].flatten().tolist(), b[name].flatten().tolist(), strict=True)
        ]


def test_numbers_of_a_mask():
    mask = Mask({"a": torch.tensor([True, False, True]), "b": torch.tensor([[False]])})
    assert (mask.num_selected, mask.num_entries, mask.density) == (2, 4, 0.5)
    assert repr(mask) == "Mask(2 of 4 entries selected, 50.00%)"
    assert len(mask) == 2
    assert Mask({}).density == 0


def test_operations_leave_their_operands_alone():
    a = Mask({"a": torch.tensor([True, False])})
    b = Mask({"a": torch.tensor([True, True])})
    for result in (~a, a & b, a | b):
        result["a"].zero_()
    assert a["a"].tolist() == [True, False]
    assert b["a"].tolist() == [True, True]


def test_rule_says_how_a_mask_was_made():
    scores = scores_of(list(range(SIZE)))
    top, drawn = top_fraction(scores, 0.5), random_fraction(scores, 0.1, seed=7, granularity="row")
    assert top.provenance["rule"] == "top 0.5 of entries within model"
    assert drawn.provenance["rule"] == "random 0.1 of rows within model, seed 7"
    assert (~top).provenance["rule"] == "~(top 0.5 of entries within model)"
    both = (top & drawn).provenance["rule"]
    assert both == "(top 0.5 of entries within model) & (random 0.1 of rows within model, seed 7)"
    assert top.provenance["scores"]["data"] == {"source": "text"}
    assert top.provenance["model"] == scores.provenance["model"]


@given(mask=masks())
def test_file_gives_back_the_same_mask(mask: Mask):
    mask = Mask(mask.tensors, {"rule": "by hand", "model": {"prefix": ""}})
    with tempfile.TemporaryDirectory() as folder:
        mask.save(Path(folder) / "mask.safetensors")
        loaded = Mask.load(Path(folder) / "mask.safetensors")
    assert dict(loaded.provenance) == dict(mask.provenance)
    assert set(loaded) == set(mask)
    assert all(torch.equal(loaded[name], mask[name]) for name in mask)


def test_file_keeps_the_order_of_parameters(tmp_path: Path):
    mask = top_fraction(scores_of([0] * SIZE), 0.5)
    mask.save(tmp_path / "mask.safetensors")
    assert list(Mask.load(tmp_path / "mask.safetensors")) == list(SHAPES)


def test_file_is_plain_safetensors(tmp_path: Path):
    mask = top_fraction(scores_of(list(range(SIZE))), 0.5)
    mask.save(tmp_path / "new" / "mask.safetensors")
    plain = load_file(tmp_path / "new" / "mask.safetensors")
    assert {name: tensor.dtype for name, tensor in plain.items()} == dict.fromkeys(SHAPES, torch.bool)
    assert all(torch.equal(plain[name], mask[name]) for name in SHAPES)
    with safe_open(tmp_path / "new" / "mask.safetensors", framework="np") as file:
        header = json.loads(file.metadata()["fisherscope"])
    assert (header["format"], header["format_version"]) == ("fisherscope.mask", 1)
    assert header["provenance"] == json.loads(json.dumps(mask.provenance))
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "mask.safetensors"]


def test_columns_selected_by_expansion_are_saved_whole(tmp_path: Path):
    mask = random_fraction(nn.Linear(3, 4), 0.5, seed=0, granularity="row")
    mask.save(tmp_path / "mask.safetensors")
    assert same(dict(sorted(Mask.load(tmp_path / "mask.safetensors").items())), dict(sorted(mask.items())))


HEADERS = {
    "none": None,
    "another format": {"format": "something", "format_version": 1, "provenance": {}},
    "another version": {"format": "fisherscope.mask", "format_version": 2, "provenance": {}},
    "no provenance": {"format": "fisherscope.mask", "format_version": 1},
    "a list": [],
    "no JSON": "{",
}


@pytest.mark.parametrize("kind", HEADERS)
def test_file_with_a_wrong_header_is_refused(kind: str, tmp_path: Path):
    path, header = tmp_path / "mask.safetensors", HEADERS[kind]
    text = header if isinstance(header, str) else json.dumps(header)
    save_file({"a": torch.ones(3, dtype=torch.bool)}, path, metadata=None if header is None else {"fisherscope": text})
    with pytest.raises(storage.WrongFile, match=r"mask\.safetensors") as error:
        Mask.load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_file_cut_short_is_refused(share: float, tmp_path: Path):
    path = tmp_path / "mask.safetensors"
    top_fraction(scores_of([0] * SIZE), 0.5).save(path)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(share * len(raw))])
    with pytest.raises(storage.WrongFile, match="cut short"):
        Mask.load(path)


def scored(made: Case) -> FisherScores:
    return estimate_fisher(made.model, batched(made.examples, 4), progress=False)


def test_mask_of_the_same_backbone_with_another_head(bert: Case):
    mask = top_fraction(scored(bert), 0.3)
    classifier = built("bert-classifier")
    found = mask.for_model(classifier)
    backbone = [name for name, _ in bert.model.named_parameters() if name.startswith("bert.")]
    assert list(found) == backbone
    assert all(torch.equal(found[name], mask[name]) for name in backbone)
    assert set(dict(classifier.named_parameters())) - set(found) == {
        "bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"
    }  # fmt: skip


def test_mask_of_a_model_with_a_head_fits_its_bare_backbone(bert: Case):
    mask = top_fraction(scored(bert), 0.3)
    found = mask.for_model(bert.model.bert)
    assert found
    assert all(torch.equal(tensor, mask[f"bert.{name}"]) for name, tensor in found.items())
    back = Mask(found, {"model": mask.provenance["model"] | {"prefix": ""}}).for_model(bert.model)
    assert all(torch.equal(tensor, mask[name]) for name, tensor in back.items())


def test_mask_covers_the_head_it_was_made_with(bert: Case):
    mask = top_fraction(scored(bert), 0.3)
    assert same(mask.for_model(bert.model), mask)


def test_mask_survives_the_way_through_a_file_to_another_head(bert: Case, tmp_path: Path):
    top_fraction(scored(bert), 0.3).save(tmp_path / "mask.safetensors")
    loaded = Mask.load(tmp_path / "mask.safetensors")
    assert loaded.for_model(built("bert-classifier"))


@pytest.mark.parametrize(
    ("settings", "difference"),
    [
        ({"hidden_size": 16}, "'embeddings.word_embeddings.weight' has shape (99, 32) there but (99, 16) in the model"),
        (
            {"num_hidden_layers": 3},
            "it has nothing for the model's parameter 'encoder.layer.2.attention.self.query.weight'",
        ),
        ({"num_hidden_layers": 1}, "the model has no parameter 'encoder.layer.1.attention.self.query.weight'"),
        ({"vocab_size": 98}, "'embeddings.word_embeddings.weight' has shape (99, 32) there but (98, 32) in the model"),
    ],
)
def test_mask_of_another_model_is_refused_naming_the_first_difference(settings: dict, difference: str, bert: Case):
    mask = top_fraction(scored(bert), 0.3)
    with pytest.raises(MaskMismatch) as error:
        mask.for_model(built("bert-classifier", **settings))
    assert str(error.value) == f"The mask does not fit this model: {difference}."


def test_mask_of_another_family_is_refused(bert: Case, gpt2: Case):
    with pytest.raises(MaskMismatch, match="wte"):
        top_fraction(scored(bert), 0.3).for_model(gpt2.model)


def test_mask_of_other_weights_warns_once_or_is_refused(bert: Case, caplog: pytest.LogCaptureFixture):
    mask = top_fraction(scored(bert), 0.3)
    mask.for_model(bert.model, strict=True)
    assert not caplog.records
    with torch.no_grad():
        next(bert.model.parameters())[0, 0] += 1
    assert same(mask.for_model(bert.model), mask)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    with pytest.raises(MaskMismatch, match="other weights"):
        mask.for_model(bert.model, strict=True)


def test_handmade_mask_needs_no_provenance():
    model = nn.Linear(2, 3)
    mask = Mask({name: torch.ones_like(p, dtype=torch.bool) for name, p in model.named_parameters()})
    assert same(mask.for_model(model, strict=True), mask)
    partial = Mask(mask.tensors, {"model": {"prefix": ""}})
    assert same(partial.for_model(model), mask)


def test_published_masks_are_halves_of_the_number_of_parameters():
    """Whole parameters by mean score, whatever their size; of an odd number the upper half has one more."""
    ranked = ["head.weight", "h.1.scale", "h.0.dense.bias", "embeddings.weight", "h.0.dense.weight"]
    tensors = {name: torch.full(SHAPES[name], 5.0 - place) for place, name in enumerate(ranked)}
    scores = FisherScores({name: tensors[name] for name in sorted(tensors)}, num_examples=1)
    top, bottom = sharma2024(scores), sharma2024(scores, "bottom")
    assert {name for name in top if top[name].all()} == set(ranked[:3])
    assert {name for name in bottom if bottom[name].all()} == set(ranked[3:])
    assert top.num_selected + bottom.num_selected == top.num_entries
    assert not (top & bottom).num_selected
    assert top.provenance["rule"] == "top half of the parameters by mean score (sharma2024)"


@pytest.mark.usefixtures("unchecked")
def test_published_masks_have_two_halves():
    with pytest.raises(ValueError, match="'top' or 'bottom' for the published masks, got 'random'"):
        sharma2024(scores_of([1] * SIZE), "random")
