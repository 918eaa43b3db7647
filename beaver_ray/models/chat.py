"""A model that one talks to: an answer to a dialogue, shown token by token as it is sampled."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from beaver_ray.data.readers import Reader
from beaver_ray.data.templates import Template
from beaver_ray.errors import UserError, first_line
from beaver_ray.models.loading import check_model_folder, context_length, default_device, load_safely, load_tokenizer

COLD = 1e-5  # temperatures below take the likeliest token, as vLLM has it: logits divided by them overflow


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled: temperature 0 takes the likeliest token, and a seed makes a chat repeat."""

    temperature: float = 1.0
    max_new_tokens: int = 512
    seed: int | None = None


@dataclass(frozen=True)
class Answer:
    """What a model said."""

    text: str
    tokens: int
    ended: bool
    """Whether it came to its end by itself: it was neither cut at its longest nor stopped."""
    stopped: bool
    """Whether Ctrl-C stopped it."""
    seconds: float


@dataclass(frozen=True)
class ChatFolder:
    """Where a model of a chat lies: an ordinary folder (or a name of the hub), and an adapter to add to it."""

    model: str
    adapter: Path | None = None

    @classmethod
    def find(cls, text: str, part: str = "chat") -> ChatFolder:
        """What a run's folder (its final/policy), a LoRA adapter's folder or an ordinary one means.

        Raises UserError, with the ``part`` it is for, where there is no model, and for a run that left no policy.
        """
        folder = Path(text)
        if os.path.isfile(folder / "final" / "policy" / "config.json"):
            return cls(str(folder / "final" / "policy"))
        if os.path.isfile(folder / "config.yaml") and not os.path.isfile(folder / "config.json"):
            raise UserError(f"the run in {text} has no policy in final/policy: it has not finished, or trains none")
        if os.path.isfile(folder / "adapter_config.json") and not os.path.isfile(folder / "config.json"):
            base = _base_of(folder)
            check_model_folder(base, f"the base of the adapter in {text}")
            return cls(base, folder)
        check_model_folder(text, part)
        return cls(text)

    @property
    def tokenizer(self) -> str:
        """Where its tokenizer and chat template lie: beside the adapter, where they were saved with it."""
        own = self.adapter is not None and os.path.isfile(self.adapter / "tokenizer_config.json")
        return str(self.adapter) if own else self.model

    def load(self, dtype: torch.dtype, trust_remote_code: bool = False) -> Any:
        """The model in evaluation mode, any adapter added to its weights."""
        model = load_safely(AutoModelForCausalLM, self.model, dtype, trust_remote_code)
        if self.adapter is not None:
            from peft import PeftModel

            try:
                model = PeftModel.from_pretrained(model, str(self.adapter)).merge_and_unload()
            except Exception as error:  # of broken files peft raises nearly anything
                raise UserError(
                    f"cannot add the adapter in {self.adapter} to {self.model}: {first_line(error)}"
                ) from None
        return model.to(default_device()).eval()


def _base_of(folder: Path) -> str:
    """The model that an adapter was trained on, as its configuration says. UserError where it does not."""
    if not os.path.isfile(folder / "adapter_model.safetensors"):
        raise UserError(f"{folder} has no adapter_model.safetensors; save the adapter again with safe_serialization")
    try:
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(
            f"{folder / 'adapter_config.json'} names no base_model_name_or_path ({first_line(error)}); write "
            "the folder there of the model that the adapter was trained on"
        ) from None
    return str(base)


class ChatModel:
    """A causal language model and the template that it is asked by.

    On a GPU it runs in bfloat16, on a CPU in float32. Raises UserError where it cannot be loaded.
    """

    def __init__(self, name: str, folder: ChatFolder, sampling: Sampling, template: Template = "auto") -> None:
        self.name, self.folder, self.sampling = name, folder, sampling
        self.reader = Reader(load_tokenizer(folder.tokenizer), template)
        self.positions = context_length(folder.model)
        self.model = folder.load(torch.bfloat16 if torch.cuda.is_available() else torch.float32)
        # All that a folder's own generation config may ask for (top-p, penalties) is left out: what is shown is the
        # distribution that training samples from.
        stops = list(self.reader.form.stops)
        self.model.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=stops[0], top_k=0)
        self.asked = 0

    @torch.inference_mode()
    def answer(self, turns: Sequence[str], system: str | None, show: Callable[[str], None]) -> Answer:
        """The answer to turns user, assistant, ..., user; ``show`` is handed its text piece by piece.

        KeyboardInterrupt ends the answer, and what there is of it is returned. Raises UserError where the dialogue
        fills the model's positions.
        """
        started, prompt = time.monotonic(), self.reader.prompt(turns, system)
        room = self.sampling.max_new_tokens if self.positions is None else self.positions - len(prompt)
        if room < 1:
            raise UserError(
                f"{self.name}: the dialogue has {len(prompt)} tokens and the model {self.positions} positions; /reset"
            )
        if self.sampling.seed is not None:
            torch.manual_seed(self.sampling.seed + self.asked)
        self.asked += 1
        pieces, stopped = _Pieces(self.reader, show), False
        heat = self.sampling.temperature
        how: dict[str, Any] = {"do_sample": True, "temperature": heat} if heat >= COLD else {"do_sample": False}
        tokens_1T = torch.tensor([prompt], device=self.model.device)
        try:
            self.model.generate(
                input_ids=tokens_1T,
                attention_mask=torch.ones_like(tokens_1T),
                max_new_tokens=min(room, self.sampling.max_new_tokens),
                streamer=pieces,
                **how,
            )
        except KeyboardInterrupt:
            stopped = True
        return Answer(pieces.shown, len(pieces.tokens), pieces.ended, stopped, time.monotonic() - started)


class _Pieces(BaseStreamer):
    """Hands text on as it grows by a token; half of a character waits for its other half."""

    def __init__(self, reader: Reader, show: Callable[[str], None]) -> None:
        self.reader, self.show = reader, show
        self.stops = set(reader.form.stops)
        self.tokens: list[int] = []
        self.shown = ""
        self._prompt_has_come = False

    @property
    def ended(self) -> bool:
        return bool(self.tokens) and self.tokens[-1] in self.stops

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_has_come:  # generate hands on the prompt first
            self.tokens += value.flatten().tolist()
            self._hand_on(whole=False)
        self._prompt_has_come = True

    def end(self) -> None:
        self._hand_on(whole=True)

    def _hand_on(self, whole: bool) -> None:
        text = self.reader.answer_text(self.tokens, self.ended)
        # What may be the white space that the template writes before an answer waits for the rest of that.
        if not whole and (text.endswith("\ufffd") or self.reader.form.before.startswith(text)):
            return
        if text.startswith(self.shown):
            piece, self.shown = text[len(self.shown) :], text
            if piece:
                self.show(piece)
        elif whole:  # what the template writes behind an answer is on the screen already, and no part of it
            self.shown = text
