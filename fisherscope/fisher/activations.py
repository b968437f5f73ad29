"""Bytes of activations, measured and not guessed, without weights and without computing anything.

One forward and backward pass runs on tensors that have shapes and no values, and the bytes that are alive are counted.
The pass holds what the engine holds: weights are frozen, inputs of modules with a scored parameter are kept until the
gradient of their output arrives, and gradients of a tied parameter until all its uses are in.
"""

import weakref
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..models import measuring
from ..objectives import Predictions, is_language_model, output_embeddings
from .estimand import Estimand


def measure_activations(model: nn.Module, *, batch_size: int, length: int, target_length: int, objective: str) -> int:
    """The most bytes that one forward and backward pass of the engine holds beside the weights.

    Args:
        model: The model, with or without values.
        batch_size: Examples.
        length: Tokens per example.
        target_length: Tokens per target of ``seq2seq-lm``.
        objective: What :func:`plan_memory` takes.

    Raises:
        ValueError: If the model's forward pass depends on values.
    """
    head_matters = is_language_model(objective)  # another head adds next to nothing, and may look for values
    part: nn.Module = model if head_matters else getattr(model, "base_model", model)
    with measuring(model), FakeTensorMode(allow_non_fake_inputs=True):
        tensors = (*part.named_parameters(), *part.named_buffers())
        state = {name: torch.empty(t.shape, dtype=t.dtype, device="cpu") for name, t in tensors}
        with LiveBytes() as live, _Held(part) as held:
            try:
                inputs = _inputs(model, batch_size, length, target_length if head_matters else length)
                width = _scored_tokens(objective, length, target_length) if head_matters else None
                predictions = _predictions(part, state, inputs, width)
                (loss,) = Estimand().terms(predictions, inputs)
                torch.autograd.grad(loss.sum(), held.leaves, allow_unused=True)
            except Exception as error:  # whatever the model's own code raises where it looks for values
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise ValueError(
                    f"The memory of {type(model).__name__} cannot be planned, because its forward pass does not run "
                    f"on tensors without values ({reason}); give a batch size and go on without a plan."
                ) from error
    return live.peak


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors made while it is on that are still alive; a view takes none.

    Attributes:
        now: Alive at the moment.
        peak: The most there ever was.
    """

    def __init__(self) -> None:
        """Nothing made yet."""
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and note new storages among its results."""
        result = function(*args, **(kwargs or {}))
        arguments = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in arguments:
                self._note(storage)
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._sizes:
            return
        self._sizes[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def _inputs(model: nn.Module, batch_size: int, length: int, target_length: int) -> dict[str, Tensor]:
    inputs = {
        "input_ids": torch.zeros(batch_size, length, dtype=torch.long),
        "attention_mask": torch.ones(batch_size, length, dtype=torch.long),
    }
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = torch.zeros(batch_size, target_length, dtype=torch.long)
    return inputs


def _predictions(
    model: nn.Module, state: dict[str, Tensor], inputs: dict[str, Tensor], width: int | None
) -> Predictions:
    """What the engine has after the forward pass: logits at ``width`` tokens per example, or some output if None."""
    if width is None:
        return _some_label(torch.func.functional_call(model, state, (), inputs)[0])
    head = output_embeddings(model)
    with ExitStack() as hooks:
        if head is not None:
            hooks.callback(head.register_forward_pre_hook(lambda _, args: (args[0][:, :width].clone(),)).remove)
        logits = torch.func.functional_call(model, state, (), inputs).logits
    logits = logits.float() if logits.element_size() < 4 else logits
    return Predictions("categorical", logits, torch.zeros(logits.shape[:-1], dtype=torch.long))


def _some_label(outputs: Tensor) -> Predictions:
    return Predictions("losses", outputs.flatten(1).sum(1, keepdim=True), torch.zeros(len(outputs), 1))


def _scored_tokens(objective: str, length: int, target_length: int) -> int:
    """Scored tokens of the example of a batch that has most: two standard deviations above the mean of 15 %."""
    if objective == "mlm":
        return min(length, round(0.15 * length + 2 * (0.15 * 0.85 * length) ** 0.5))
    return target_length if objective == "seq2seq-lm" else length


class _Held:
    """Holds what the engine holds: inputs of modules with a scored parameter, and gradients until all uses are in.

    Attributes:
        leaves: Where the backward pass may stop.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = {m: [p for p in m.parameters(recurse=False) if p.requires_grad] for m in model.modules()}
        self.leaves: list[Tensor] = []
        self.expected: Counter[int] = Counter()
        self.arrived: dict[int, list[Any]] = defaultdict(list)
        self.hooks = ExitStack()

    def __enter__(self) -> "_Held":
        for module, own in self.modules.items():
            if own:
                hook = self._after_forward([id(p) for p in own])
                self.hooks.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        return self

    def __exit__(self, *exception: Any) -> None:
        self.hooks.close()

    def _after_forward(self, own: list[int]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if not isinstance(output, Tensor) or not torch.is_grad_enabled():
                return output
            if not output.requires_grad:
                self.leaves.append(output.detach().requires_grad_())
                output = self.leaves[-1].clone()
            self.expected.update(own)
            waiting = [[value.detach() for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]]
            output.register_hook(lambda gradient: self._arrive(own, waiting.pop(), gradient))
            return output

        return hook

    def _arrive(self, own: list[int], inputs: list[Tensor], gradient: Tensor) -> None:
        for parameter in own:
            self.arrived[parameter].append((inputs, gradient))
            if len(self.arrived[parameter]) == self.expected[parameter]:
                del self.arrived[parameter]
