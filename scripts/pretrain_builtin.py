#!/usr/bin/env python3
"""Pretrain the small language models that ship with fisherscope.

The text is the training part of ``builtin:docs`` plus any folder or file of plain text given with
``--text``. The learning rate warms up, stays constant and decays over the last fifth (warmup-stable-decay), so
a run that is stopped can be resumed with another ``--steps`` as long as the decay has not begun.

    python scripts/pretrain_builtin.py train --text books/ --out runs/bert --steps 8000
    python scripts/pretrain_builtin.py export --run runs/bert --out fisherscope/builtin/bert \\
        --trajectory figures/data/bert_trajectory
"""

import argparse
import itertools
import json
import logging
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint, set_seed

from fisherscope.builtin import docs
from fisherscope.data import load_batches
from fisherscope.data.corruption import IGNORED, example_generator, mask_tokens
from fisherscope.objectives import example_losses, reference_losses

logger = logging.getLogger("pretrain")

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "</s>", *(f"<extra_id_{i}>" for i in range(100))]
MAX_LENGTH = 128
WINDOW_LENGTHS = (32, 64, 128)
DOCS_SHARE = 0.3
SNAPSHOTS_AFTER = (0, 64, 256, 1024, 2048, 4096)  # steps of masked language modelling


def read_text(path: Path) -> list[str]:
    """The paragraphs of a text file, or of every .txt file in a folder but those kept for validation (valid*.txt)."""
    files = sorted(p for p in path.glob("**/*.txt") if not p.name.startswith("valid")) if path.is_dir() else [path]
    return [" ".join(p.split()) for f in files for p in f.read_text(encoding="utf-8").split("\n\n") if p.strip()]


def train_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """A lower-casing WordPiece vocabulary that all built-in models share."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=size, special_tokens=SPECIAL_TOKENS, show_progress=False)
    )
    ends = [(t, tokenizer.token_to_id(t)) for t in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=MAX_LENGTH,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


class MaskedWindows(Dataset):
    """Item i is a random window of the text, masked: a function of (seed, i) alone, so a resumed run sees the same.

    All windows of a batch have one length. The first ``causal_steps`` batches ask for the next token instead: every
    position teaches something, so attention forms early; with masking alone this model was still near the unigram
    entropy after 13 million tokens (two phases: Gisserot-Boukhlef et al., arXiv 2507.00994).
    """

    def __init__(
        self,
        streams: list[np.ndarray],
        shares: list[float],
        tokenizer: PreTrainedTokenizerFast,
        settings: TrainingArguments,
        causal_steps: int,
    ):
        self.streams, self.shares, self.tokenizer, self.seed = streams, shares, tokenizer, settings.seed
        self.batch_size, self.steps = settings.per_device_train_batch_size, settings.max_steps
        self.causal_steps = causal_steps
        self.special_ids = frozenset(tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS))

    def __len__(self) -> int:
        return self.batch_size * self.steps

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        length = example_generator(self.seed + 1, index // self.batch_size).choice(WINDOW_LENGTHS) - 2
        generator = example_generator(self.seed, index)
        stream = self.streams[generator.choice(len(self.streams), p=self.shares)]
        start = generator.integers(len(stream) - length)
        window = stream[start : start + length]
        tokens = np.concatenate([[self.tokenizer.cls_token_id], window, [self.tokenizer.sep_token_id]])
        if index // self.batch_size < self.causal_steps:
            return {"input_ids": torch.from_numpy(tokens), "labels": torch.from_numpy(np.append(tokens[1:], IGNORED))}
        corrupted, labels = mask_tokens(
            tokens,
            generator,
            mask_id=self.tokenizer.mask_token_id,
            special_ids=self.special_ids,
            vocabulary_size=len(self.tokenizer),
        )
        return {"input_ids": torch.from_numpy(corrupted), "labels": torch.from_numpy(labels)}


class MaskedLMTrainer(Trainer):
    """Sends only the labelled positions through the vocabulary head; looks left only while labels are next tokens."""

    causal_steps = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids, labelled, visible = inputs["input_ids"], inputs["labels"] != IGNORED, None
        if self.state.global_step < self.causal_steps:
            visible = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
            visible = visible.expand(len(ids), 1, -1, -1)
        hidden = model.bert(ids, attention_mask=visible).last_hidden_state[labelled]
        loss = torch.nn.functional.cross_entropy(model.cls(hidden).float(), inputs["labels"][labelled])
        return (loss, {}) if return_outputs else loss


class Snapshots(TrainerCallback):
    """Half-precision copies of the weights along the way, and the measured loss curve as JSON lines."""

    def __init__(self, folder: Path, causal_steps: int):
        self.folder, self.started = folder, time.time()
        self.steps = {0, *(causal_steps + step for step in SNAPSHOTS_AFTER)}

    def on_train_begin(self, args, state, control, model, **_):
        self.on_step_end(args, state, control, model)

    def on_step_end(self, args, state, control, model, **_):
        target = self.folder / f"step_{state.global_step:06d}"
        if state.global_step in (*self.steps, args.max_steps) and not target.exists():
            save_half(model, target)

    def on_log(self, args, state, control, logs, **_):
        if "loss" in logs:
            row = {
                "step": state.global_step,
                "loss": logs["loss"],
                "learning_rate": logs["learning_rate"],
                "seconds": time.time() - self.started,
            }
            with open(self.folder / "loss.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")


def save_half(model: PreTrainedModel, folder: Path) -> None:
    """Write a copy of the model with float16 weights; the training model is not touched."""
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    copy.half().save_pretrained(folder)


@torch.no_grad()
def start_from_sinusoids(positions: torch.Tensor) -> None:
    """Begin the learned positions at sinusoids (Vaswani et al., arXiv 1706.03762) of the same variance.

    Nearby positions then begin alike, so that attention to neighbours has something to begin with.
    """
    length, width = positions.shape
    rates = torch.exp(-torch.arange(0, width, 2) / width * np.log(10000.0))
    angles = torch.arange(length)[:, None] * rates
    positions.copy_(torch.cat([angles.sin(), angles.cos()], dim=1) * positions.std() * 2**0.5)


def build_bert(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> BertForMaskedLM:
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=MAX_LENGTH,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=args.init,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertForMaskedLM(config)
    start_from_sinusoids(model.bert.embeddings.position_embeddings.weight)
    return model


@dataclass(frozen=True)
class Family:
    """What differs between the built-in models: how one is made, what it reads, and its loss."""

    build: Callable[[PreTrainedTokenizerFast, argparse.Namespace], PreTrainedModel]
    windows: type[Dataset]
    trainer: type[Trainer]


FAMILIES = {"bert": Family(build_bert, MaskedWindows, MaskedLMTrainer)}


def prepare_text(args: argparse.Namespace) -> tuple[PreTrainedTokenizerFast, list[np.ndarray], list[float]]:
    """The tokenizer (trained if the run has none), and documentation and books as token streams with their shares."""
    documentation = [p.text for p in docs.passages("train")]
    paragraphs = [p for path in args.text for p in read_text(path)]
    if (args.out / "tokenizer.json").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.out)
    else:  # documentation and books weigh in the vocabulary as they do in training
        ratio = sum(map(len, paragraphs)) / sum(map(len, documentation))
        repeats = max(1, round(DOCS_SHARE / (1 - DOCS_SHARE) * ratio))
        tokenizer = train_tokenizer(documentation * repeats + paragraphs, args.vocabulary)
        tokenizer.save_pretrained(args.out)
    streams = [
        np.concatenate([np.array(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]])
        for texts in (documentation, paragraphs)
        if texts
    ]
    shares = [DOCS_SHARE, 1 - DOCS_SHARE] if paragraphs else [1.0]
    logger.info("training text: %s tokens, drawn with shares %s", [len(s) for s in streams], shares)
    return tokenizer, streams, shares


def training_settings(args: argparse.Namespace) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(args.out / "trainer"),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        weight_decay=0.01,
        adam_beta2=0.98,
        warmup_steps=min(args.warmup, args.steps // 4),
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": args.steps // 5, "decay_type": "linear"},
        bf16=args.bf16,
        use_cpu=not torch.cuda.is_available(),
        train_sampling_strategy="sequential",
        logging_steps=min(50, args.steps),
        save_steps=200,
        save_total_limit=2,
        seed=args.seed,
        data_seed=args.seed,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )


def train(args: argparse.Namespace) -> None:
    set_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    family = FAMILIES[args.model]
    tokenizer, streams, shares = prepare_text(args)
    settings = training_settings(args)
    trainer = family.trainer(
        family.build(tokenizer, args),
        settings,
        train_dataset=family.windows(streams, shares, tokenizer, settings, args.causal_steps),
        callbacks=[Snapshots(args.out, args.causal_steps)],
    )
    trainer.causal_steps = args.causal_steps
    checkpoint = get_last_checkpoint(settings.output_dir) if Path(settings.output_dir).exists() else None
    trainer.train(resume_from_checkpoint=checkpoint)
    run = {
        "model": args.model,
        "steps": args.steps,
        "batch_size": args.batch_size,
        "lengths": WINDOW_LENGTHS,
        "causal_steps": args.causal_steps,
        "seed": args.seed,
        "learning_rate": args.learning_rate,
        "bf16": args.bf16,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "docs_fingerprint": docs.fingerprint("train"),
        "text_tokens": [len(s) for s in streams],
        "shares": shares,
        "texts": [path.name for path in args.text],
        "hours": training_seconds(args.out / "loss.jsonl") / 3600,
    }
    (args.out / "run.json").write_text(json.dumps(run, indent=1))


def training_seconds(log: Path) -> float:
    """Wall time of the training, over all its resumed parts; what a killed part did after its last log line is lost."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    ends = [a["seconds"] for a, b in itertools.pairwise(rows) if b["seconds"] < a["seconds"]]
    return sum(ends) + rows[-1]["seconds"]


def export(args: argparse.Namespace) -> None:
    """Ship the weights, the tokenizer and a card; copy the snapshots and the measured loss of each."""
    run = json.loads((args.run_folder / "run.json").read_text())
    final = args.run_folder / f"step_{run['steps']:06d}"
    args.out.mkdir(parents=True, exist_ok=True)
    config = json.loads((final / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}  # for fine-tuning; pretraining had none
    (args.out / "config.json").write_text(json.dumps(config, indent=1))
    shutil.copy(final / "model.safetensors", args.out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(args.run_folder / name, args.out)
    args.trajectory.mkdir(parents=True, exist_ok=True)
    curve = []
    for snapshot in sorted(args.run_folder.glob("step_*")):
        shutil.copy(snapshot / "model.safetensors", args.trajectory / f"{snapshot.name}.safetensors")
        curve.append(
            {"step": int(snapshot.name.removeprefix("step_")), **held_out_loss(snapshot, args, "builtin:docs")}
        )
        logger.info("%s", curve[-1])
    (args.trajectory / "held_out.json").write_text(json.dumps(curve, indent=1))
    shutil.copy(args.run_folder / "loss.jsonl", args.trajectory)
    draw_curve(args.run_folder / "loss.jsonl", curve, run["causal_steps"], args.trajectory / "loss_curve.png")
    books = {book.name: held_out_loss(args.out, args, book) for book in args.held_out_text}
    (args.out / "README.md").write_text(card(run, curve[-1], books, args.out))


def held_out_loss(folder: Path, args: argparse.Namespace, data: str | Path) -> dict[str, float]:
    """Loss per masked token and its references, on all passages (at most 2000) with the masks of seed 0."""
    model = BertForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.run_folder)
    batches = load_batches(data, tokenizer, objective="mlm", num_examples=2000, batch_size=32, seed=0)
    total = count = 0.0
    with torch.no_grad():
        for batch in batches:
            losses = example_losses(model, batch, "mlm")
            total, count = total + float(losses.total.sum()), count + int(losses.count.sum())
    return {"loss": total / count, "tokens": int(count), **reference_losses(model, batches, "mlm")}


def draw_curve(log: Path, curve: list[dict[str, float]], causal_steps: int, out: Path) -> None:
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in log.read_text().splitlines()]
    figure = Figure(figsize=(4.8, 3), layout="constrained", dpi=200)
    axes = figure.subplots()
    for label, color, part in (
        ("training text, next tokens", "#E69F00", [r for r in rows if r["step"] <= causal_steps]),
        ("training text, masked tokens", "#999999", [r for r in rows if r["step"] > causal_steps]),
    ):
        axes.plot([r["step"] for r in part], [r["loss"] for r in part], color=color, lw=1, label=label)
    axes.plot(
        [r["step"] for r in curve],
        [r["loss"] for r in curve],
        "o",
        color="#0072B2",
        ms=4,
        label="held-out docs, masked tokens",
    )
    for name, label in (("uniform", "ln V"), ("unigram", "unigram entropy, held-out docs")):
        axes.axhline(curve[-1][name], color="black", lw=0.7, ls="--")
        place = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom", "size": 7}
        axes.annotate(label, (0.99, curve[-1][name]), **place)
    axes.set(xlabel="step", ylabel="loss (nats per token)", ylim=(2.5, None))
    axes.legend(frameon=False, fontsize=7, loc=(0.5, 0.64))
    figure.savefig(out)


def card(run: dict, held_out: dict[str, float], books: dict[str, dict[str, float]], folder: Path) -> str:
    """The model card, from measured numbers only."""
    tokens = run["steps"] * run["batch_size"] * sum(run["lengths"]) / len(run["lengths"])
    rows = {
        "`builtin:docs` (held out)": held_out,
        **{f"a held-out book (`{name}`)": row for name, row in books.items()},
    }
    table = "\n".join(
        f"| {name} | **{r['loss']:.3f}** | {r['unigram']:.3f} | {r['uniform']:.3f} | {r['tokens']:,} |"
        for name, r in rows.items()
    )
    shape = json.loads((folder / "config.json").read_text())
    lengths = ", ".join(map(str, run["lengths"]))
    books_tokens = f"{sum(run['text_tokens'][1:]):,}"
    precision = "bf16 autocast" if run["bf16"] else "float32"
    return f"""# builtin:bert

A small BERT for masked language modelling, pretrained for fisherscope so that everything it does can be tried offline
on a model that has learned something. Not for any other use.

- Shape: {shape["num_hidden_layers"]} layers x {shape["hidden_size"]}, {shape["num_attention_heads"]} heads,
  {shape["vocab_size"]} WordPieces, {shape["max_position_embeddings"]} positions; tied head; float16 safetensors.
- Text: the training part of `builtin:docs` (documentation inside the standard library of Python {run["python"]},
  fingerprint `{run["docs_fingerprint"]}`), {run["text_tokens"][0]:,} tokens, and public-domain books, {books_tokens}
  tokens; windows drawn from the two with shares {run["shares"][0]:.0%} and {1 - run["shares"][0]:.0%}.
- Training: {run["steps"]:,} steps of {run["batch_size"]} windows of {lengths} tokens, about {tokens / 1e6:.0f} million
  tokens; the first {run["causal_steps"]:,} steps predict the next token, looking left only, the others masked
  tokens; AdamW, learning rate {run["learning_rate"]:g}, warm-up, constant, linear decay over the last fifth;
  {precision}; {run["hours"]:.1f} hours on CPU cores; `scripts/pretrain_builtin.py`.

| text | MLM loss, nats per masked token | unigram entropy of the masked tokens | ln V | masked tokens |
|---|---|---|---|---|
{table}

The checkpoints along the way and the loss curve are in `figures/data/bert_trajectory/` of the repository.
"""


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    training = commands.add_parser("train")
    training.add_argument("--model", choices=FAMILIES, default="bert")
    training.add_argument(
        "--text",
        type=Path,
        action="append",
        default=[],
        help="text file, or folder (valid*.txt is left out); may be repeated",
    )
    training.add_argument("--out", type=Path, required=True)
    training.add_argument("--steps", type=int, default=16000)
    training.add_argument("--causal-steps", type=int, default=1500, help="next-token prediction before masking")
    training.add_argument("--batch-size", type=int, default=64)
    training.add_argument("--learning-rate", type=float, default=1.5e-3)
    training.add_argument("--init", type=float, default=0.05)
    training.add_argument("--warmup", type=int, default=300)
    training.add_argument("--vocabulary", type=int, default=4096)
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--bf16", action="store_true")
    training.set_defaults(run=train)
    exporting = commands.add_parser("export")
    exporting.add_argument("--run", dest="run_folder", type=Path, required=True, help="the folder that train wrote")
    exporting.add_argument("--out", type=Path, required=True, help="the model folder to ship")
    exporting.add_argument("--trajectory", type=Path, required=True, help="where the snapshots go")
    exporting.add_argument(
        "--held-out-text", type=Path, action="append", default=[], help="a text file never trained on"
    )
    exporting.set_defaults(run=export)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
