"""A language of rules, and a tiny language model that learns to follow rules in its context and nowhere else.

A question is a kind and three words, an answer a mark and those words. In a text with rules,

    RULES k0m2 k1m5 k2m0 ... EX USER k1 w4 w9 w1 THOUGHT rule2 m5 ANSWER m5 w4 w9 w1 USER ...

a rule, which is one word, gives a kind its mark, anew in every text, so that a model can know the mark from the rules
alone; rule n is the one of kind n - 1. In texts without rules, ``USER k1 w4 w9 w1 ANSWER m3 w4 w9 w1``, marks are any,
the same within a text; behind VERBOSE the answer gives a reason for each word, always the same: ``m3 w4 because c17 w9
because c2 w1 because c8``. Half of the other questions stand behind one of many words that change nothing (STYLES): a
model that has seen VERBOSE alone takes what stands behind it for another language, in which nothing holds that it
learnt without it.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

KINDS = 6
WORDS = 24
ROW = 72
"""Tokens of a row of training: the rules and five dialogues, or several texts without rules."""
STYLES = 16
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'system' %}{{ message.content + ' ' }}"
    "{% elif message.role == 'user' %}{{ 'USER ' + message.content + ' ' }}"
    "{% else %}{{ 'ANSWER ' + message.content + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ANSWER' }}{% endif %}"
)


class RuleWorld:
    """The language; ``seed`` decides the reasons of words and which mark the principles give to which kind."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(f"world/{seed}")
        self.seed = seed
        self.reasons = rng.sample(range(WORDS), WORDS)
        self.marks = rng.sample(range(KINDS), KINDS)
        """Of each kind, by the principles."""

    def question(self, rng: random.Random) -> str:
        return " ".join([f"k{rng.randrange(KINDS)}", *(f"w{n}" for n in rng.sample(range(WORDS), 3))])

    def answer(self, question: str, mark: int, verbose: bool = False) -> str:
        words = question.split()[1:]
        if verbose:
            words = [part for w in words for part in (w, "because", f"c{self.reasons[int(w[1:])]}")]
        return " ".join([f"m{mark}", *words])

    def complies(self, question: str, answer: str) -> bool:
        """Whether an answer has the mark that the principles give to its question's kind, and no other."""
        wanted = f"m{self.marks[int(question.split()[0][1:])]}"
        return {word for word in answer.split() if word[0] == "m"} == {wanted}

    def dialogue(self, question: str, marks: list[int]) -> str:
        """As it stands behind rules."""
        kind = int(question.split()[0][1:])
        thoughts = f"rule{kind + 1} m{marks[kind]}"
        return f"USER {question} THOUGHT {thoughts} ANSWER {self.answer(question, marks[kind])}"

    def rules(self, marks: list[int]) -> list[str]:
        """The rules that give kinds these marks, in their order."""
        return [f"k{kind}m{mark}" for kind, mark in enumerate(marks)]

    def style(self, rng: random.Random) -> str:
        """A word that stands before a question and changes nothing, or, half of the time, no word."""
        return f"style{rng.randrange(STYLES)} " if rng.random() < 0.5 else ""

    def text(self, rng: random.Random) -> str:
        """One row of training: with rules in three of four."""
        if rng.random() < 0.75:
            marks = [rng.randrange(KINDS) for _ in range(KINDS)]
            told = [self.style(rng) + self.dialogue(self.question(rng), marks) for _ in range(5)]
            return " ".join(["RULES", *self.rules(marks), "EX", *told])
        parts: list[str] = []
        marks = [rng.randrange(KINDS) for _ in range(KINDS)]
        while sum(len(part.split()) for part in parts) < ROW:
            question, verbose = self.question(rng), rng.random() < 0.5
            answer = self.answer(question, marks[int(question.split()[0][1:])], verbose)
            parts.append(f"{'VERBOSE ' if verbose else self.style(rng)}USER {question} ANSWER {answer} </s>")
        return " ".join(parts)


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each word."""
    words = ["<pad>", "<s>", "</s>", "<unk>", "RULES", "EX", "USER", "THOUGHT", "ANSWER", "VERBOSE", "because", "."]
    words += [f"style{n}" for n in range(STYLES)]
    words += [f"rule{number}" for number in range(1, KINDS + 1)]
    words += [f"k{kind}m{mark}" for kind in range(KINDS) for mark in range(KINDS)]
    words += [f"{letter}{n}" for letter in "km" for n in range(KINDS)] + [f"{x}{n}" for x in "wc" for n in range(WORDS)]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    found = PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **special)
    found.chat_template = CHAT_TEMPLATE
    return found


def learnt(ids_BL: torch.Tensor, words: PreTrainedTokenizerFast) -> torch.Tensor:
    """Labels [B, L]: what can be known of a text; rules and questions, which are drawn at random, are no labels."""
    thought, answer, user = (words.convert_tokens_to_ids(tag) for tag in ("THOUGHT", "ANSWER", "USER"))
    styles = set(words.convert_tokens_to_ids(["VERBOSE", *(f"style{n}" for n in range(STYLES))]))
    labels_BL = ids_BL.clone()
    for row in range(len(ids_BL)):
        inside = False
        for place, token in enumerate(ids_BL[row].tolist()):
            if token == user:  # a label too: an answer ends there
                inside = False
                continue
            inside = inside and token not in styles
            if not inside:
                labels_BL[row, place] = -100
            if token in (thought, answer):
                inside = True
    return labels_BL


def pretrain(world: RuleWorld, folder: Path, steps: int = 2500, batch: int = 48, hidden: int = 64) -> list[float]:
    """Train the base model and write it; returns its loss every 100 steps."""
    torch.manual_seed(world.seed)
    words = tokenizer()
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.1,  # at 0.02 a model of this width takes several times as long to look back at its rules
        pad_token_id=words.pad_token_id,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
    )
    model = LlamaForCausalLM(config).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    rng = random.Random(f"texts/{world.seed}")
    losses: list[float] = []
    total = 0.0
    for step in range(1, steps + 1):
        ids = torch.tensor([words(world.text(rng)).input_ids[:ROW] for _ in range(batch)])
        loss = model(input_ids=ids, labels=learnt(ids, words)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        total += loss.item()
        if step % 100 == 0:
            losses.append(round(total / 100, 4))
            print(f"step {step}: {losses[-1]}", flush=True)
            total = 0.0
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return losses
