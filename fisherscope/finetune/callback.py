"""A regularizer in the Trainer of Hugging Face; the only module that knows Trainer's events."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .. import distributed, storage
from .regularizer import Applied, Regularizer

STATE_FILE = "regularizer.safetensors"


class RegularizerCallback(TrainerCallback):
    """Applies a regularizer from the beginning of a training to its end, and through its checkpoints.

    ``Trainer(..., callbacks=[RegularizerCallback(GuidedDropout(scores))])``. With several ranks some methods leave
    parameters without a gradient; give ``TrainingArguments(ddp_find_unused_parameters=True)``.

    Raises:
        TypeError: If it is no regularizer, or adds a term to the loss, which a callback cannot do; use
            :func:`fisherscope.finetune`, or add :meth:`Regularizer.penalty` in a training loop of your own.
    """

    adds_penalty: ClassVar[bool] = False

    def __init__(self, regularizer: Regularizer) -> None:
        """Not applied yet."""
        if not isinstance(regularizer, Regularizer):
            found = regularizer.__name__ if isinstance(regularizer, type) else f"a {type(regularizer).__name__}"
            raise TypeError(f"RegularizerCallback takes a regularizer, such as GuidedDropout(scores), got {found}.")
        if regularizer.has_penalty and not self.adds_penalty:
            raise TypeError(
                f"{type(regularizer).__name__} adds a term to the loss, which a callback of Trainer cannot do; use "
                "fisherscope.finetune, or add regularizer.penalty(...) to the loss in a training loop of your own."
            )
        self.regularizer = regularizer
        self._stack, self._applied = ExitStack(), Applied()

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **facts: Any) -> None:
        """Let it add its parameters, so that the optimizer and checkpoints have them."""
        del args, state, control
        self.regularizer.extend(facts["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **facts: Any
    ) -> None:
        """Apply it; in a resumed training, go on from the checkpoint."""
        del control
        path = _checkpoint(args, state) / STATE_FILE
        if state.global_step and not path.is_file():
            raise FileNotFoundError(
                f"{path.parent} is no complete checkpoint of a training with {type(self.regularizer).__name__}; "
                "resume from one in the output folder that has the file regularizer.safetensors."
            )
        with ExitStack() as stack:
            self._applied = stack.enter_context(self.regularizer.applied_to(facts["model"], facts["optimizer"]))
            if state.global_step:
                self._applied.load_state_dict(load_file(path))
            self._stack = stack.pop_all()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **facts: Any) -> None:
        """Put the state beside the checkpoint; it is the last file, so a checkpoint that has it is complete."""
        del control, facts
        if distributed.is_first():
            contents = {name: t.detach().cpu().contiguous() for name, t in self._applied.state_dict().items()}
            with storage.atomic(_checkpoint(args, state) / STATE_FILE) as temporary:
                save_file(contents, temporary)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **facts: Any) -> None:
        """Take it off again."""
        del args, state, control, facts
        self.close()

    def close(self) -> None:
        """Take it off; needed only after a training that raised, which Trainer does not tell."""
        self._stack.close()


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a training that was written to its end; None if there is none."""
    found = [file.parent for file in folder.glob(f"checkpoint-*/{STATE_FILE}")]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
