"""Multiple-choice questions put to a policy, by the log-probs of its choices, or of their letters in several orders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from actors.driver.evaluate import judging
from actors.machine.handles import Group
from actors.roles.choices import ChoiceScorer
from beaver_ray import experience
from beaver_ray.data.readers import Reader
from beaver_ray.errors import UserError
from beaver_ray.evaluation import share_interval
from beaver_ray.models.letters import LetterReader
from beaver_ray.models.loading import load_tokenizer
from beaver_ray.multiple_choice import LETTERS, Ask, Question, chance, figure, listed, over_orders, rotations
from beaver_ray.stage import TemplatedStage

CHUNK = 256
"""Sequences of one call."""
Row = dict[str, Any]


class Asking:
    """A policy that is asked in a run of ``stage``: ``ask`` and ``orders`` are the stage's options."""

    def __init__(self, stage: TemplatedStage, policy: str, ask: Ask | Literal["auto"], orders: int) -> None:
        self.stage, self.policy, self.ask, self.orders = stage, policy, ask, orders

    def answer_all(self, files: dict[str, list[Question]]) -> tuple[dict[str, Row], list[Row]]:
        """(figures by name and figure, what became of each question) of all files."""
        figures: dict[str, Row] = {}
        rows: list[Row] = []
        with judging(self.stage, self.stage.roles()) as roles:
            group = roles.scorers["policy"]
            for name, questions in files.items():
                asked = questions[0].ask if self.ask == "auto" else self.ask
                scored = (self._listed if asked == "listed" else self._apart)(questions, group)
                found = [{"file": name, "asked": asked, **row} for row in scored]
                figures |= _figures(name, found, questions)
                rows += found
        return figures, rows

    def _apart(self, questions: Sequence[Question], group: Group) -> list[Row]:
        """Each choice is an answer of its own, and its score the sum of its tokens' log-probs."""
        reader = Reader(load_tokenizer(self.policy, self.stage.trusts_code), self.stage.prompt_template)
        written: list[tuple[list[int], list[int]]] = []
        places = []
        for question in questions:
            prompt = reader.prompt([question.text])
            of_text = {}
            for text in dict.fromkeys(text for choices in question.sets.values() for text in choices.texts):
                of_text[text] = len(written)
                written.append((prompt, reader.answer(text, ended=False)))
            places.append(of_text)
        self._check(max(len(prompt) + len(answer) for prompt, answer in written))
        chunks = [experience.finished(written[n : n + CHUNK], n) for n in range(0, len(written), CHUNK)]
        asked = [group.next().call(ChoiceScorer.answers, chunk) for chunk in chunks]
        scores = np.concatenate(group.wait(asked, "scoring choices"))
        return [
            _row(question, {name: [scores[of_text[text]] for text in c.texts] for name, c in question.sets.items()}, {})
            for question, of_text in zip(questions, places, strict=True)
        ]

    def _listed(self, questions: Sequence[Question], group: Group) -> list[Row]:
        """The choices stand under letters, in several orders; a choice's score is its letters' mean log-prob."""
        most = max(len(choices.texts) for question in questions for choices in question.sets.values())
        if most > len(LETTERS):
            raise UserError(f"a question has {most} choices, more than there are letters; set ask: apart")
        letters, template = LETTERS[:most], self.stage.prompt_template
        reader = LetterReader(self.policy, letters, template, self.stage.trusts_code, mend="set ask: apart")
        texts: list[str] = []
        parts = []
        for question in questions:
            for name, choices in question.sets.items():
                orders = rotations(len(choices.texts), self.orders)
                parts.append((name, len(choices.texts), len(texts), orders))
                texts += [listed(question.text, [choices.texts[i] for i in order]) for order in orders]
        tokens = [reader.question(text) for text in texts]
        self._check(max(map(len, tokens)))
        ids = np.arange(len(tokens))
        chunks = [
            experience.make_batch({"sample_id": ids[n : n + CHUNK], "prompt_tokens": tokens[n : n + CHUNK]})
            for n in range(0, len(tokens), CHUNK)
        ]
        asked = [group.next().call(ChoiceScorer.letters, chunk, reader.tokens) for chunk in chunks]
        logprobs_XL = np.concatenate(group.wait(asked, "scoring letters"))
        rows, left = [], iter(parts)
        for question in questions:
            scores, more = {}, {}
            for _ in question.sets:
                name, count, start, orders = next(left)
                found, same, first = over_orders(logprobs_XL[start : start + len(orders), :count], orders)
                scores[name] = found.tolist()
                more[name] = {"orders": len(orders), "same": same, "first_place": first}
            rows.append(_row(question, scores, more))
        return rows

    def _check(self, longest: int) -> None:
        if longest > self.stage.lengths().longest:
            raise UserError(f"a question makes {longest} tokens with its choices; raise max_tokens")


def _row(question: Question, scores: dict[str, list[float]], more: dict[str, Row]) -> Row:
    sets = {
        name: {"choices": list(c.texts), "right": list(c.right), "scores": [float(s) for s in scores[name]]}
        | {"value": figure(name, scores[name], c), **more.get(name, {})}
        for name, c in question.sets.items()
    }
    return {"question": question.text, "sets": sets}


def _figures(name: str, rows: Sequence[Row], questions: Sequence[Question]) -> dict[str, Row]:
    """Each figure of a file, with 95 % intervals by question: Wilson's at the effective number of questions."""
    found: dict[str, Row] = {}
    for kind in dict.fromkeys(kind for question in questions for kind in question.sets):
        some = [row["sets"][kind] for row in rows if kind in row["sets"]]
        ids = np.arange(len(some))
        by_chance = [chance(question.sets[kind]) for question in questions if kind in question.sets]
        values = np.array([row["value"] for row in some])
        figures = share_interval(values, ids) | {"chance": float(np.mean(by_chance))}
        if "same" in some[0]:
            figures["same_in_all_orders"] = share_interval(np.array([row["same"] for row in some]), ids)
            first = np.array([row["first_place"] / row["orders"] for row in some])
            figures["chose_first_place"] = share_interval(first, ids)
        found[f"{name}/{kind}"] = figures
    return found
