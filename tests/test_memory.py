"""The memory plan against what a run really holds, the choice of a batch size, and runs that memory stops."""

import argparse
import json
import resource
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import Case, batched, built, causal_example, classified_example, masked_example, untouched
from torch import Tensor, nn

import fisherscope as fs
from fisherscope.cli import main
from fisherscope.fisher import halving, hooks_engine, memory
from fisherscope.fisher.activations import LiveBytes
from fisherscope.fisher.halving import within_memory
from fisherscope.fisher.memory import MemoryPlan, choose_batch_size, plan_memory

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 8192, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_8B_ENTRIES = 8_030_261_248

_WIDE: dict[str, object] = {"hidden_size": 256, "intermediate_size": 1024, "vocab_size": 4000}
WIDER: dict[str, dict[str, object]] = {
    "bert": {**_WIDE, "max_position_embeddings": 128},
    "gpt2": {"n_embd": 256, "vocab_size": 4000, "n_positions": 64},
    "t5": {"d_model": 256, "d_ff": 1024, "d_kv": 64, "vocab_size": 4000},
    "llama": {**_WIDE, "max_position_embeddings": 64},
    "bert-classifier": {**_WIDE, "max_position_embeddings": 64},
}
OBJECTIVES = {"bert": "mlm", "gpt2": "causal-lm", "t5": "seq2seq-lm", "llama": "causal-lm",
              "bert-classifier": "classification"}  # fmt: skip


def wider(name: str, **settings: object) -> nn.Module:
    return built(name, **WIDER[name] | settings).float()


def inputs_for(name: str, size: int, length: int) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    make = {"mlm": masked_example, "classification": classified_example}.get(OBJECTIVES[name], causal_example)
    examples = [make(n, draw) for n in (length, *(length - 1 for _ in range(size - 1)))]
    for example in examples if name == "bert" else ():  # as few labels as the plan takes for granted
        example["labels"][torch.rand(len(example["labels"]), generator=draw) > 0.15] = -100
        example["labels"][:2] = 1
    return batched(examples, size)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("bert", {"attn_implementation": "sdpa"}),
        ("bert", {"attn_implementation": "eager"}),
        ("gpt2", {}),
        ("t5", {}),
        ("llama", {}),
        ("bert-classifier", {}),
    ],
)
@pytest.mark.parametrize("size", [1, pytest.param(16, marks=pytest.mark.slow)])
def test_a_run_holds_what_was_planned(name: str, settings: dict[str, object], size: int):
    model, batches = wider(name, **settings), inputs_for(name, size, 64)
    plan = plan_memory(model, batch_size=size, length=64, objective=OBJECTIVES[name])
    with LiveBytes() as live:
        fs.estimate_fisher(model, batches, objective=OBJECTIVES[name], progress=False)
    planned = plan.accumulators + max(plan.activations + plan.scratch, plan.check, plan.scores)
    assert planned == pytest.approx(live.peak, rel=0.2)
    assert plan.needed["cpu"] == plan.weights + plan.accumulators + max(
        plan.activations + plan.gaps + plan.scratch, plan.check, plan.scores
    )


def test_sums_and_weights_are_counted_once_by_bytes():
    model = built("bert").float()  # its head is tied to its embeddings
    model.bert.embeddings.requires_grad_(False)
    scored = sum(p.numel() for p in model.parameters() if p.requires_grad)
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    with untouched(model):
        plans = [plan_memory(model, batch_size=1, length=8, objective="mlm", halves=halves) for halves in (True, False)]
    assert scored < sum(p.numel() for p in model.parameters())
    assert plans[0].weights == 4 * sum(p.numel() for p in model.parameters()) + buffers
    assert [p.entries for p in plans] == [scored, scored]
    assert [p.accumulators for p in plans] == [8 * scored, 4 * scored]
    assert [p.scores for p in plans] == [6 * scored, 4 * scored]


def test_scratch_is_for_the_largest_matrix_that_is_multiplied():
    model = built("gpt2", tie_word_embeddings=False, n_inner=999).float()
    assert plan_memory(model, batch_size=1, length=8, objective="causal-lm").scratch == 4 * 32 * 999
    assert plan_memory(model.double(), batch_size=1, length=8, objective="causal-lm").scratch == 8 * 32 * 999


def test_activations_follow_batch_length_and_attention():
    def activations(size: int, length: int, kind: str = "sdpa") -> int:
        model = wider("bert", attn_implementation=kind)
        return plan_memory(model, batch_size=size, length=length, objective="mlm").activations

    assert activations(32, 16) == pytest.approx(2 * activations(16, 16), rel=0.05)
    eager, fused = ([activations(2, length, kind) for length in (64, 128)] for kind in ("eager", "sdpa"))
    assert eager[1] > 2 * eager[0]  # the probabilities of attention grow with the square of the length
    assert fused[1] < 2 * fused[0] and fused[1] < eager[1]


def test_targets_have_a_length_of_their_own():
    model = wider("t5")
    short, same, long = (
        plan_memory(model, batch_size=4, length=32, objective="seq2seq-lm", target_length=target).activations
        for target in (4, None, 64)
    )
    assert short < same < long


def test_a_model_without_values_plans_the_same(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "_free_on_host", lambda: 10**9)
    real = wider("llama")
    with torch.device("meta"):
        empty = type(real)(real.config)
    plans = [plan_memory(m, batch_size=4, length=32, objective="causal-lm", device="cpu") for m in (real, empty)]
    assert {**vars(plans[0]), "free": None} == {**vars(plans[1]), "free": None}
    assert plans[0].free["cpu"] - plans[1].free["cpu"] == plans[0].weights  # those are there already


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_model_of_eight_billion_parameters_is_planned_without_weights(attention: str):
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {key: value for key, value in LLAMA_8B.items() if key not in ("architectures", "model_type")}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**settings, attn_implementation=attention)).eval()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    plan = plan_memory(model, batch_size=1, length=128, objective="causal-lm", halves=False, device="cpu")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19  # KiB
    assert plan.entries == LLAMA_8B_ENTRIES
    assert plan.weights // 4 == pytest.approx(LLAMA_8B_ENTRIES, rel=1e-6)
    assert plan.accumulators == plan.scores == 4 * LLAMA_8B_ENTRIES
    assert plan.scratch == 4 * 128256 * 4096
    # every layer must keep at least the inputs of its seven projections
    assert plan.activations > 32 * 128 * (4 * 4096 + 14336) * 4


def test_a_head_that_looks_for_values_does_not_matter():
    from transformers import BartConfig, BartForSequenceClassification

    config = BartConfig(vocab_size=99, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=64,
                        decoder_ffn_dim=64, encoder_attention_heads=4, decoder_attention_heads=4)  # fmt: skip
    model = BartForSequenceClassification(config).eval()
    assert plan_memory(model, batch_size=2, length=8, objective="classification").activations > 0


PLAN = MemoryPlan(
    device="cuda:0", batch_size=8, length=128, entries=5, weights=2**20, accumulators=2**21, activations=2**30,
    gaps=0, scratch=2**19, check=2**18, scores=3 * 2**33, offload=False, free={"cuda:0": 2**30, "cpu": 2**35},
)  # fmt: skip


def test_a_plan_prints_what_goes_where():
    assert str(PLAN).splitlines() == [
        "                      cuda:0         cpu",
        "weights              1.0 MiB            ",
        "accumulators         2.0 MiB            ",
        "activations      1,024.0 MiB            ",
        "allocator gaps       0.0 MiB            ",
        "scratch              0.5 MiB            ",
        "check of rules       0.2 MiB            ",
        "finished scores                 24.0 GiB",
        "most at once     1,027.5 MiB    24.0 GiB",
        "free             1,024.0 MiB    32.0 GiB",
        "fits                      NO         yes",
    ]


def test_offloaded_sums_are_on_the_host():
    offloaded = MemoryPlan(**{**vars(PLAN), "offload": True})
    assert PLAN.needed["cuda:0"] - offloaded.needed["cuda:0"] == PLAN.accumulators
    assert offloaded.needed["cpu"] - PLAN.needed["cpu"] == PLAN.accumulators
    assert plan_memory(wider("bert"), batch_size=1, length=8, objective="mlm", offload=True).offload is False


def test_a_plan_fits_where_every_device_has_room():
    def with_free(**free: int) -> MemoryPlan:
        return MemoryPlan(**{**vars(PLAN), "free": {name.replace("_", ":"): size for name, size in free.items()}})

    roomy = with_free(cuda_0=2**31, cpu=2**35)
    assert not PLAN.fits() and roomy.fits()
    assert not roomy.fits(0.5) and not with_free(cuda_0=2**31, cpu=2**34).fits()
    assert with_free().fits() and "unknown" in str(with_free())


def test_what_is_free_is_less_than_there_is():
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 0 < plan_memory(built("bert"), batch_size=1, length=8, objective="mlm").free["cpu"] <= total


class Asking(nn.Module):
    """Its forward pass depends on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table(input_ids) * float(self.table.weight.sum()))


def test_the_length_that_roberta_allows_leaves_out_rows_that_are_no_positions():
    config = transformers.RobertaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=18, pad_token_id=1,
    )  # fmt: skip
    model = transformers.RobertaForMaskedLM(config)
    assert plan_memory(model, batch_size=1, length=16, objective="mlm").length == 16
    with pytest.raises(ValueError, match="length must be at most 16"):
        plan_memory(model, batch_size=1, length=17, objective="mlm")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0."),
        ({"length": 0}, "length must be at least 1, got 0."),
        ({"length": 17}, "length must be at most 16, which is what the model allows; got 17."),
        ({"objective": "guessing"}, "guessing"),
        ({"device": "cuda"}, "The device cuda was asked for, but torch finds no CUDA here; leave out the device."),
    ],
)
def test_bad_settings_are_refused(changes: dict, message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    settings = {"batch_size": 1, "length": 8, "objective": "mlm"} | changes
    with pytest.raises(ValueError, match=message):
        plan_memory(built("bert"), **settings)


def test_a_model_that_asks_for_values_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match=r"^The memory of Asking cannot be planned, because .* without a plan\.$"):
        plan_memory(Asking(), batch_size=1, length=4, objective="causal-lm")


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets how much the host has left, the model's weights apart."""
    return lambda size: monkeypatch.setattr(memory, "_free_on_host", lambda: int(size))


def test_the_largest_batch_that_fits_is_chosen(free: Callable[[float], None]):
    model = wider("bert")

    def needed(size: int) -> int:
        plan = plan_memory(model, batch_size=size, length=32, objective="mlm")
        return plan.needed["cpu"] - plan.weights

    for size in (16, 32):
        free(needed(size) / 0.8 + plan_memory(model, batch_size=1, length=8, objective="mlm").weights)
        assert choose_batch_size(model, [8, 32, *[5] * 400], "mlm") == size
    free(1e12)
    assert choose_batch_size(model, [32] * 400, "mlm") == 256
    assert choose_batch_size(model, [32] * 100, "mlm") == 64
    assert choose_batch_size(model, [32], "mlm") == 1


def test_one_example_is_chosen_with_a_warning_where_none_fits(
    free: Callable[[float], None], caplog: pytest.LogCaptureFixture
):
    free(0)
    assert choose_batch_size(wider("bert"), [16] * 8, "mlm") == 1
    assert "Not even one example at a time is sure to fit in memory" in caplog.text


def test_a_choice_needs_examples():
    with pytest.raises(ValueError, match="at least one example, but there are none"):
        choose_batch_size(wider("bert"), [], "mlm")


def test_the_data_tell_how_long_examples_and_targets_are():
    model, tokenizer = fs.load_model("builtin:bert", device="cpu")
    batches = fs.load_batches("builtin:docs", tokenizer, objective="mlm", num_examples=5, max_length=32)
    lengths = [len(example["input_ids"]) for example in batches.examples]
    assert memory.longest(batches) == (lengths, None)
    assert choose_batch_size(model, batches, "mlm") == 4


def out_of_memory() -> RuntimeError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


class Limited:
    """An obvious engine that runs out of memory, with part of the batch added, above a number of examples."""

    def __init__(self, case: Case, room: int, before_adding: bool = False) -> None:
        self.case, self.room, self.before_adding = case, room, before_adding
        self.sizes: list[int] = []

    def __call__(self, batch: Mapping[str, Tensor], sums: Mapping[str, Tensor]) -> int:
        size = len(batch["input_ids"])
        self.sizes.append(size)
        if size > self.room and self.before_adding:
            raise out_of_memory()
        for n in range(size):
            example = {name: value[n : n + 1] for name, value in batch.items()}
            loss = fs.example_losses(self.case.model, example, self.case.objective).mean.sum()
            names, parameters = zip(*self.case.model.named_parameters(), strict=True)
            for name, gradient in zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
                if gradient is not None:
                    sums[name].add_(gradient.square())
                if size > self.room:
                    raise out_of_memory()
        return size


def empty_sums(case: Case) -> dict[str, Tensor]:
    return {name: torch.zeros_like(p) for name, p in case.model.named_parameters()}


def assert_same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert max(float(total.max()) for total in wanted.values()) > 0
    for name, total in wanted.items():
        torch.testing.assert_close(found[name], total, rtol=1e-12, atol=1e-300, msg=name)


@pytest.mark.parametrize("room", [1, *(pytest.param(room, marks=pytest.mark.slow) for room in (2, 3, 5))])
def test_a_rehearsed_run_that_memory_stops_gives_the_same_sums(bert: Case, room: int, caplog: pytest.LogCaptureFixture):
    batches = batched(bert.examples, 5)
    wanted, found = empty_sums(bert), empty_sums(bert)
    enough, limited = Limited(bert, 99), Limited(bert, room)
    add = within_memory(limited, rehearse=True)
    assert [add(b, found) for b in batches] == [enough(b, wanted) for b in batches]
    assert_same(found, wanted)
    largest = [5, *{1: [2, 1], 2: [2], 3: [2], 5: []}[room]]
    lines = [record.message.split("; ")[1] for record in caplog.records]
    assert lines == [f"going on with {size} at a time." for size in largest[1:]]
    assert limited.sizes[: len(largest)] == largest
    assert max(limited.sizes[len(largest) :]) == largest[-1]  # kept for good


def test_memory_that_runs_out_before_anything_is_added_needs_no_rehearsal(bert: Case):
    wanted, found = empty_sums(bert), empty_sums(bert)
    add = within_memory(limited := Limited(bert, 2, before_adding=True), rehearse=False)
    for batch in batched(bert.examples, 4):
        Limited(bert, 99)(batch, wanted)
        add(batch, found)
    assert_same(found, wanted)
    assert limited.sizes == [4, 2, 2, 2, 2]


def test_sums_that_hold_part_of_a_batch_are_not_gone_on_with(bert: Case):
    add = within_memory(Limited(bert, 2), rehearse=False)
    with pytest.raises(MemoryError, match=r"^Memory ran out in the middle of a batch of 4 examples, .* batch size\.$"):
        add(batched(bert.examples, 4)[0], empty_sums(bert))


def test_the_engine_itself_survives(gpt2: Case):
    """The model's forward pass runs out of memory, in the plan's trial runs or in earnest."""
    batches = batched(gpt2.examples, 8)
    wanted, found = empty_sums(gpt2), empty_sums(gpt2)
    plain = hooks_engine(gpt2.model, gpt2.objective)
    assert [plain(b, wanted) for b in batches] == [8]

    def refuse(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if len(args[0]) > 4:
            raise out_of_memory()

    with untouched(gpt2.model):
        handle = gpt2.model.transformer.h[1].register_forward_pre_hook(refuse)
        add = within_memory(hooks_engine(gpt2.model, gpt2.objective), rehearse=True)
        assert [add(b, found) for b in batches] == [8]
        handle.remove()
    assert_same(found, wanted)


def test_one_example_that_does_not_fit_is_the_end(bert: Case, caplog: pytest.LogCaptureFixture):
    sums = empty_sums(bert)
    add = within_memory(Limited(bert, 0), rehearse=True)
    with pytest.raises(MemoryError, match=r"^Even a single example of size 9 does not fit in memory .* more memory\.$"):
        add(batched(bert.examples, 4)[0], sums)
    assert len(caplog.records) == 2  # 4 to 2, 2 to 1
    assert all(not total.any() for total in sums.values())


def test_only_a_batch_larger_than_all_before_is_rehearsed(bert: Case):
    engine = Limited(bert, 99)
    add = within_memory(engine, rehearse=True)
    short, long = bert.examples[1], bert.examples[2]
    for examples, calls in [
        ([long] * 2, 2), ([short] * 2, 1), ([long], 1), ([short] * 3, 2), ([long, short], 1), ([long] * 3, 2)
    ]:  # fmt: skip
        engine.sizes.clear()
        add(batched(examples, len(examples))[0], empty_sums(bert))
        assert len(engine.sizes) == calls


def test_a_rehearsal_needs_the_memory_of_one_parameter(bert: Case):
    sums = empty_sums(bert)
    with LiveBytes() as live:
        throwaway = halving._throwaway(sums)
    largest = max(total.numel() for total in sums.values())
    assert live.peak == 8 * largest
    assert {name: t.shape for name, t in throwaway.items()} == {name: t.shape for name, t in sums.items()}


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes do not match"), ValueError("Every example needs a finite loss")]
)
def test_other_errors_pass(error: Exception):
    def fails(batch: Mapping[str, Tensor], sums: Mapping[str, Tensor]) -> int:
        raise error

    with pytest.raises(type(error), match=str(error)):
        within_memory(fails, rehearse=True)({"input_ids": torch.zeros(2, 3)}, {"weight": torch.zeros(1)})


def test_the_host_running_out_of_memory_is_understood():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert halving._ran_out(caught.value)
    assert halving._ran_out(out_of_memory()) and not halving._ran_out(RuntimeError("shapes do not match"))


def test_live_bytes_counts_storages_while_they_live():
    before = torch.ones(1000)
    with LiveBytes() as live:
        first = torch.zeros(100)
        second = first[10:].view(2, 45)
        before.add_(1)
        assert live.now == live.peak == 400
        third = second + 1
        assert live.now == live.peak == 400 + 360
        del first, third
        assert live.now == 400  # the view still holds it
        del second
        torch.zeros(10)
    assert (live.now, live.peak) == (0, 760)


def printed(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert main([str(word) for word in ("plan", *words, "--debug")]) == 0
    return capsys.readouterr().out


def test_the_command_plans_a_built_in_model(capsys: pytest.CaptureFixture[str]):
    text = printed(capsys, "--model", "builtin:bert", "--batch-size", 4, "--max-length", 64, "--device", "cpu")
    model, _ = fs.load_model("builtin:bert", device="cpu")
    plan = plan_memory(model, batch_size=4, length=64, objective="mlm")
    heading, *table = text.splitlines()
    assert heading == f"builtin:bert, mlm: {plan.entries:,} entries scored, 4 examples of 64 tokens at a time"
    assert table[:8] == str(plan).splitlines()[:8]


def test_the_command_plans_a_large_model_from_its_configuration(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(LLAMA_8B))
    text = printed(capsys, "--model", file, "--dtype", "bfloat16", "--batch-size", 1, "--device", "cpu")
    assert f"{file}, causal-lm: {LLAMA_8B_ENTRIES:,} entries scored, 1 example of 128 tokens at a time\n" in text
    sizes = dict(line.rsplit("  ", 1) for line in text.splitlines()[2:])
    assert {name.strip(): size.strip() for name, size in sizes.items()}.items() >= {
        ("weights", "15.0 GiB"), ("accumulators", "29.9 GiB"), ("finished scores", "29.9 GiB"),
    }  # fmt: skip


def test_the_command_chooses_the_batch_size(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, free: Callable[[float], None]
):
    free(2**36)
    flags = ("--model", "builtin:bert", "--objective", "regression", "--batch-size", "auto", "--device", "cpu")
    assert "builtin:bert, regression: " in (text := printed(capsys, *flags)) and " 256 examples of 128 " in text


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--model", "builtin:ant"], 1, "There is no built-in model 'builtin:ant'"),
        (["--model", "builtin:bert", "--batch-size", "0"], 1, "batch_size must be at least 1, got 0."),
        (["--model", "builtin:bert", "--objective", "seq2seq-lm"], 1, "has no head for seq2seq-lm"),
        (["--model", "builtin:bert", "--batch-size", "many"], 2, "must be a number of examples, or auto; got 'many'"),
    ],
)
def test_the_command_refuses_in_one_line(
    words: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
):
    try:
        found = main(["plan", *words])
    except SystemExit as end:
        found = end.code
    error = capsys.readouterr().err
    assert found == status and message in error and error.count("\n") == 1


def test_a_run_is_planned_by_its_data(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    from fisherscope.cli.plan import chosen, show_plan

    model, tokenizer = fs.load_model("builtin:bert", device="cpu")
    batches = fs.load_batches("builtin:docs", tokenizer, objective="mlm", num_examples=5, max_length=32, batch_size=3)
    flags = argparse.Namespace(batch_size="auto", halves=True, offload=False, out=tmp_path / "scores.h5")
    assert chosen(model, batches, "mlm", flags).batch_size == 4
    fs.estimate_fisher(model, batches, progress=False, checkpoint=tmp_path / "scores.h5.part")
    assert chosen(model, batches, "mlm", flags).batch_size == 3  # a run goes on as it was begun
    flags.batch_size = 2
    assert chosen(model, batches, "mlm", flags) is batches
    show_plan(model, batches.with_batch_size(16), "mlm", flags)
    longest = max(memory.longest(batches)[0])
    assert f" entries scored, 5 examples of {longest} tokens at a time\n" in capsys.readouterr().out
