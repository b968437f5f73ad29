#!/usr/bin/env python3
"""Pretrain the small language models that ship with fisherscope.

The text is the training part of ``builtin:docs`` plus any folder or file of plain text given with
``--text``. The learning rate warms up, stays constant and decays over the last fifth (warmup-stable-decay), so
a run that is stopped can be resumed with another ``--steps`` as long as the decay has not begun.

    python scripts/pretrain_builtin.py train --model bert --text books/ --out runs/bert --bf16 \\
        --steps 8500 --early-steps 1500
    python scripts/pretrain_builtin.py train --model gpt2 --text books/ --out runs/gpt2 --from-bert --bf16 \\
        --steps 2800 --early-steps 0
    python scripts/pretrain_builtin.py train --model t5 --text books/ --out runs/t5 --from-bert --bf16 \\
        --steps 9000 --early-steps 3000
    python scripts/pretrain_builtin.py export --run runs/gpt2 --out fisherscope/builtin/gpt2 \\
        --record figures/data/gpt2_pretraining --held-out-text books/valid.txt
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
from typing import Any

import numpy as np
import torch
from builtin_card import draw_curve, held_out_loss, write_card
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint, set_seed

from fisherscope.builtin import docs
from fisherscope.data.corruption import IGNORED, corrupt_spans, example_generator, mask_tokens
from fisherscope.objectives import example_losses

logger = logging.getLogger("pretrain")

SENTINELS = [f"<extra_id_{i}>" for i in range(100)]
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "</s>", *SENTINELS]
MAX_LENGTH = 128
WINDOW_LENGTHS = (32, 64, 128)
DOCS_SHARE = 0.3
SNAPSHOTS_AFTER = (0, 64, 256, 1024, 2048, 4096)  # steps of the objective itself
BUILTIN_BERT = Path(__file__).parent.parent / "fisherscope" / "builtin" / "bert"

Example = dict[str, np.ndarray]
Encode = Callable[[np.ndarray, np.random.Generator, PreTrainedTokenizerFast], Example]


def read_text(path: Path) -> list[str]:
    """The paragraphs of a text file, or of every .txt file in a folder but those kept for validation (valid*.txt)."""
    files = sorted(p for p in path.glob("**/*.txt") if not p.name.startswith("valid")) if path.is_dir() else [path]
    return [" ".join(p.split()) for f in files for p in f.read_text(encoding="utf-8").split("\n\n") if p.strip()]


def train_vocabulary(texts: list[str], size: int) -> Tokenizer:
    """A lower-casing WordPiece vocabulary."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=size, special_tokens=SPECIAL_TOKENS, show_progress=False)
    )
    return tokenizer


def bert_tokenizer(vocabulary: Tokenizer) -> PreTrainedTokenizerFast:
    ends = [(t, vocabulary.token_to_id(t)) for t in ("[CLS]", "[SEP]")]
    vocabulary.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=vocabulary,
        model_max_length=MAX_LENGTH,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def gpt2_tokenizer(vocabulary: Tokenizer) -> PreTrainedTokenizerFast:
    vocabulary.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    return _plain_tokenizer(vocabulary, bos_token="</s>")


def t5_tokenizer(vocabulary: Tokenizer) -> PreTrainedTokenizerFast:
    ends = [("</s>", vocabulary.token_to_id("</s>"))]
    vocabulary.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=ends
    )
    return _plain_tokenizer(vocabulary, extra_special_tokens=SENTINELS)


def _plain_tokenizer(vocabulary: Tokenizer, **tokens: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=vocabulary,
        model_max_length=MAX_LENGTH,
        model_input_names=["input_ids", "attention_mask"],
        pad_token="[PAD]",
        unk_token="[UNK]",
        eos_token="</s>",
        **tokens,
    )


def masked(window: np.ndarray, draw: np.random.Generator, tokenizer: PreTrainedTokenizerFast) -> Example:
    tokens = np.concatenate([[tokenizer.cls_token_id], window[2:], [tokenizer.sep_token_id]])
    special = frozenset(tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS))
    corrupted, labels = mask_tokens(
        tokens, draw, mask_id=tokenizer.mask_token_id, special_ids=special, vocabulary_size=len(tokenizer)
    )
    return {"input_ids": corrupted, "labels": labels}


def next_tokens_by_encoder(
    window: np.ndarray, draw: np.random.Generator, tokenizer: PreTrainedTokenizerFast
) -> Example:
    """The next token as the label of every position, which sees only what is left of it."""
    tokens = np.concatenate([[tokenizer.cls_token_id], window[2:], [tokenizer.sep_token_id]])
    visible = np.tri(len(tokens), dtype=bool)[None]
    return {"input_ids": tokens, "attention_mask": visible, "labels": np.append(tokens[1:], IGNORED)}


def next_tokens(window: np.ndarray, draw: np.random.Generator, tokenizer: PreTrainedTokenizerFast) -> Example:
    return {"input_ids": window, "labels": window}


def dropped_spans(
    window: np.ndarray,
    draw: np.random.Generator,
    tokenizer: PreTrainedTokenizerFast,
    density: float = 0.15,
    mean_span: float = 3.0,
) -> Example:
    sentinels = tokenizer.convert_tokens_to_ids(SENTINELS)
    inputs, targets = corrupt_spans(window[1:], draw, sentinels=sentinels, density=density, mean_span=mean_span)
    return {
        "input_ids": np.append(inputs, tokenizer.eos_token_id),
        "labels": np.append(targets, tokenizer.eos_token_id),
    }


def next_tokens_by_t5_encoder(
    window: np.ndarray, draw: np.random.Generator, tokenizer: PreTrainedTokenizerFast
) -> Example:
    """The next token for every position of the encoder, which sees only what is left of it."""
    hidden = np.where(np.tri(len(window), dtype=bool), 0.0, np.finfo(np.float32).min)[None]
    labels = np.append(window[1:], IGNORED)
    return {"input_ids": window, "attention_mask": hidden.astype(np.float32), "encoder_labels": labels}


def first_dropped_tokens(window: np.ndarray, draw: np.random.Generator, tokenizer: PreTrainedTokenizerFast) -> Example:
    """The first token of every dropped span, for the encoder at the span's sentinel; many short spans."""
    sentinels = tokenizer.convert_tokens_to_ids(SENTINELS)
    inputs, targets = corrupt_spans(window, draw, sentinels=sentinels, density=0.25, mean_span=1.5)
    labels = np.full_like(inputs, IGNORED)
    starts = np.isin(targets[:-1], sentinels)
    labels[np.isin(inputs, sentinels)] = targets[1:][starts]
    return {"input_ids": inputs, "encoder_labels": labels}


def dropped_halves(window: np.ndarray, draw: np.random.Generator, tokenizer: PreTrainedTokenizerFast) -> Example:
    """Half of the window in longer spans (one of the denoisers of Tay et al., arXiv 2205.05131)."""
    return dropped_spans(window, draw, tokenizer, density=0.5, mean_span=8.0)


@torch.no_grad()
def start_from_sinusoids(positions: torch.Tensor) -> None:
    """Begin the learned positions at sinusoids (Vaswani et al., arXiv 1706.03762) of the same variance.

    Nearby positions then begin alike, so that attention to neighbours has something to begin with.
    """
    length, width = positions.shape
    rates = torch.exp(-torch.arange(0, width, 2) / width * np.log(10000.0))
    angles = torch.arange(length)[:, None] * rates
    positions.copy_(torch.cat([angles.sin(), angles.cos()], dim=1) * positions.std() * 2**0.5)


@torch.no_grad()
def start_from_bert(embeddings: torch.Tensor) -> None:
    """Begin the token embeddings at those of ``builtin:bert``, which has the same vocabulary, at the same scale."""
    trained = load_file(BUILTIN_BERT / "model.safetensors")["bert.embeddings.word_embeddings.weight"].float()
    embeddings.copy_(trained * embeddings.std() / trained.std())


@torch.no_grad()
def start_from_neighbours(stack: PreTrainedModel, places: list[tuple[int, float]]) -> None:
    """Begin the relative positions of T5 so that head h looks around ``places[h]``: a distance, and how sharply.

    As with sinusoids, attention to neighbours then has something to begin with (linear in the distance as in Press
    et al., arXiv 2108.12409).
    """
    attention = stack.block[0].layer[0].SelfAttention
    distances = torch.arange(1 - MAX_LENGTH, MAX_LENGTH)
    buckets = attention._relative_position_bucket(
        distances,
        bidirectional=not attention.is_decoder,
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=attention.relative_attention_max_distance,
    )
    for head, (place, sharpness) in enumerate(places):
        for bucket in buckets.unique():
            away = (distances[buckets == bucket] - place).abs().float()
            attention.relative_attention_bias.weight[bucket, head] = -min(sharpness * float(away.min()), 8.0)


def build_bert(tokenizer: PreTrainedTokenizerFast) -> BertForMaskedLM:
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=MAX_LENGTH,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.05,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertForMaskedLM(config)
    start_from_sinusoids(model.bert.embeddings.position_embeddings.weight)
    return model


def build_gpt2(tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=128,
        n_layer=4,
        n_head=4,
        n_positions=MAX_LENGTH,
        initializer_range=0.05,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )
    model = GPT2LMHeadModel(config)
    start_from_sinusoids(model.transformer.wpe.weight)
    return model


def build_t5(tokenizer: PreTrainedTokenizerFast) -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=128,
        d_kv=32,
        d_ff=512,
        num_layers=3,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=tokenizer.pad_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        use_cache=False,
    )
    model = T5ForConditionalGeneration(config)
    start_from_neighbours(model.encoder, [(-1, 2.0), (1, 2.0), (0, 0.5), (0, 0.0)])
    start_from_neighbours(model.decoder, [(-1, 2.0), (-2, 2.0), (0, 0.5), (0, 0.0)])
    for block in model.decoder.block:  # a token begins by looking at its like in the input: sentinels at theirs
        cross = block.layer[1].EncDecAttention
        torch.nn.init.normal_(cross.q.weight, std=0.035)
        cross.k.weight.data.copy_(cross.q.weight)
    return model


@dataclass(frozen=True)
class Family:
    """What differs between the built-in models.

    ``encode`` is what they learn, by turns if there are several: for T5 half of the batches teach the decoder more.
    ``early`` is what they learn first, one after the other for as many steps: there every position teaches something,
    so attention forms early (two phases: Gisserot-Boukhlef et al., arXiv 2507.00994).
    """

    objective: str
    tokenizer: Callable[[Tokenizer], PreTrainedTokenizerFast]
    build: Callable[[PreTrainedTokenizerFast], PreTrainedModel]
    encode: tuple[Encode, ...]
    early: tuple[Encode, ...]
    dropout: dict[str, float]  # of the configuration that ships, for fine-tuning; pretraining has none


FAMILIES = {
    "bert": Family(
        "mlm",
        bert_tokenizer,
        build_bert,
        (masked,),
        (next_tokens_by_encoder,),
        {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
    ),
    "gpt2": Family(
        "causal-lm",
        gpt2_tokenizer,
        build_gpt2,
        (next_tokens,),
        (next_tokens,),
        {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1},
    ),
    "t5": Family(
        "seq2seq-lm",
        t5_tokenizer,
        build_t5,
        (dropped_spans, dropped_halves),
        (next_tokens_by_t5_encoder, first_dropped_tokens, dropped_spans),
        {"dropout_rate": 0.1},
    ),
}


class Windows(Dataset):
    """Item i is a random window of the text: a function of (seed, i) alone, so a resumed run sees the same.

    All windows of a batch have one length.
    """

    def __init__(
        self,
        streams: list[np.ndarray],
        shares: list[float],
        tokenizer: PreTrainedTokenizerFast,
        family: Family,
        settings: TrainingArguments,
        early_steps: int,
    ):
        self.streams, self.shares, self.tokenizer, self.family = streams, shares, tokenizer, family
        self.seed, self.batch_size = settings.seed, settings.per_device_train_batch_size
        self.steps, self.early_steps = settings.max_steps, early_steps

    def __len__(self) -> int:
        return self.batch_size * self.steps

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        step = index // self.batch_size
        length = example_generator(self.seed + 1, step).choice(WINDOW_LENGTHS)
        draw = example_generator(self.seed, index)
        stream = self.streams[draw.choice(len(self.streams), p=self.shares)]
        start = draw.integers(len(stream) - length)
        late, early = self.family.encode, self.family.early
        is_early = step < self.early_steps
        encode = early[step * len(early) // self.early_steps] if is_early else late[step % len(late)]
        example = encode(stream[start : start + length], draw, self.tokenizer)
        return {name: torch.from_numpy(array) for name, array in example.items()}


def encoder_loss(model: PreTrainedModel, encoder_labels: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
    """What the encoder alone predicts by the head of the decoder."""
    labelled = encoder_labels != IGNORED
    states = model.encoder(**inputs).last_hidden_state[labelled]
    logits = model.lm_head(states * model.config.d_model**-0.5)
    return torch.nn.functional.cross_entropy(logits.float(), encoder_labels[labelled])


class LanguageModelTrainer(Trainer):
    """The mean loss of the labelled tokens, as fisherscope computes it."""

    objective = ""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if "encoder_labels" in inputs:
            loss = encoder_loss(model, **inputs)
        else:
            losses = example_losses(model, inputs, self.objective)
            loss = losses.total.sum() / losses.count.sum()
        return (loss, {}) if return_outputs else loss


class Snapshots(TrainerCallback):
    """Half-precision copies of the weights along the way, and the measured loss curve as JSON lines."""

    def __init__(self, folder: Path, early_steps: int):
        self.folder, self.started = folder, time.time()
        self.steps = {0, *(early_steps + step for step in SNAPSHOTS_AFTER)}

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


def prepare_text(args: argparse.Namespace) -> tuple[PreTrainedTokenizerFast, list[np.ndarray], list[float]]:
    """The tokenizer, and documentation and books as token streams with their shares.

    The vocabulary is that of ``builtin:bert``, or trained on the text.
    """
    documentation = [p.text for p in docs.passages("train")]
    paragraphs = [p for path in args.text for p in read_text(path)]
    if (args.out / "tokenizer.json").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.out)
    else:
        if args.from_bert:
            vocabulary = Tokenizer.from_file(str(BUILTIN_BERT / "tokenizer.json"))
        else:  # documentation and books weigh in the vocabulary as they do in training
            ratio = sum(map(len, paragraphs)) / sum(map(len, documentation))
            repeats = max(1, round(DOCS_SHARE / (1 - DOCS_SHARE) * ratio))
            vocabulary = train_vocabulary(documentation * repeats + paragraphs, args.vocabulary)
        tokenizer = FAMILIES[args.model].tokenizer(vocabulary)
        tokenizer.save_pretrained(args.out)
    end = [tokenizer.eos_token_id] if args.model == "gpt2" else []  # BERT and T5 end every window themselves
    streams = [
        np.concatenate([np.array([*ids, *end]) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]])
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
    model = family.build(tokenizer)
    if args.from_bert:
        start_from_bert(model.get_input_embeddings().weight)
    trainer = LanguageModelTrainer(
        model,
        settings,
        train_dataset=Windows(streams, shares, tokenizer, family, settings, args.early_steps),
        callbacks=[Snapshots(args.out, args.early_steps)],
    )
    trainer.objective = family.objective
    checkpoint = get_last_checkpoint(settings.output_dir) if Path(settings.output_dir).exists() else None
    trainer.train(resume_from_checkpoint=checkpoint)
    run = {
        "model": args.model,
        "objective": family.objective,
        "steps": args.steps,
        "batch_size": args.batch_size,
        "lengths": WINDOW_LENGTHS,
        "early_steps": args.early_steps,
        "from_bert": args.from_bert,
        "seed": args.seed,
        "learning_rate": args.learning_rate,
        "bf16": args.bf16,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU cores",
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
    """Ship the weights, the tokenizer and a card; keep the curve of the losses, and the snapshots if asked to."""
    run = json.loads((args.run_folder / "run.json").read_text())
    final = args.run_folder / f"step_{run['steps']:06d}"
    for folder in (args.out, args.record):
        folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((final / "config.json").read_text()) | FAMILIES[run["model"]].dropout
    (args.out / "config.json").write_text(json.dumps(config, indent=1))
    shutil.copy(final / "model.safetensors", args.out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(args.run_folder / name, args.out)
    curve = []
    for snapshot in sorted(args.run_folder.glob("step_*")):
        if args.snapshots:
            shutil.copy(snapshot / "model.safetensors", args.record / f"{snapshot.name}.safetensors")
        loss = held_out_loss(snapshot, args.out, run["objective"], "builtin:docs")
        curve.append({"step": int(snapshot.name.removeprefix("step_")), **loss})
        logger.info("%s", curve[-1])
    for name in ("loss.jsonl", "run.json"):
        shutil.copy(args.run_folder / name, args.record)
    (args.record / "held_out.json").write_text(json.dumps(curve, indent=1))
    draw_curve(args.record)
    write_card(args.out, args.record, args.held_out_text)


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
    training.add_argument("--early-steps", type=int, default=1500, help="what a family learns before its objective")
    training.add_argument("--batch-size", type=int, default=64)
    training.add_argument("--learning-rate", type=float, default=1.5e-3)
    training.add_argument("--warmup", type=int, default=300)
    words = training.add_mutually_exclusive_group()
    words.add_argument("--vocabulary", type=int, default=4096, help="size of the vocabulary to train")
    words.add_argument(
        "--from-bert", action="store_true", help="begin with the vocabulary and token embeddings of builtin:bert"
    )
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--bf16", action="store_true")
    training.set_defaults(run=train)
    exporting = commands.add_parser("export")
    exporting.add_argument("--run", dest="run_folder", type=Path, required=True, help="the folder that train wrote")
    exporting.add_argument("--out", type=Path, required=True, help="the model folder to ship")
    exporting.add_argument("--record", type=Path, required=True, help="where the losses and their curve go")
    exporting.add_argument("--snapshots", action="store_true", help="keep the weights along the way there too")
    exporting.add_argument(
        "--held-out-text", type=Path, action="append", default=[], help="a text file never trained on"
    )
    exporting.set_defaults(run=export)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
