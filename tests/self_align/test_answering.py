"""The context, thoughts to rules, and each filter of answers by hand."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from beaver_ray.errors import UserError
from beaver_ray.self_align.answering import (
    Answered,
    Sieve,
    apart,
    behind_system_texts,
    histograms,
    identity_rows,
    question,
    repeats_a_clause,
    rules_of,
    write_context,
)
from beaver_ray.self_align.options import AnswerFilters, Tags
from beaver_ray.self_align.principles import read_principles
from beaver_ray.self_align.seeds import Exemplar, read_exemplars, read_system_texts

TAGS = Tags()
OPENING = AnswerFilters().opening
LONG = (
    "Tides are caused by the pull of the Moon, and to a lesser part by that of the Sun. Water on the near side is "
    "pulled more strongly than the Earth as a whole, that on the far side less, which raises both."
)


def reply(answer: str, thoughts: str = "The facts come first (rule 8).") -> str:
    return f"{OPENING} {thoughts}\n{TAGS.answer}\n{answer}"


def sieve(**filters: object) -> Sieve:
    return Sieve(AnswerFilters.model_validate(filters), TAGS, read_exemplars(), 16)


@pytest.mark.parametrize(
    ("thoughts", "rules", "unknown"),
    [
        ("This needs care (rule 3).", (3,), 0),
        ("See rules 2, 5 and 11, and Rule 5 again.", (2, 5, 11), 0),
        ("rule #7, or rules 1 & 4", (7, 1, 4), 0),
        ("By rules 6, and 14 it goes.", (6, 14), 0),
        ("It has 12 legs. Overrule 4? rule17 says so.", (), 1),
        ("No rule applies.", (), 0),
        ("k3 rule2 m5", (2,), 0),
        (f"Rules 3 and {'1' * 5000}.", (3,), 1),
    ],
)
def test_thoughts_to_rules(thoughts: str, rules: tuple[int, ...], unknown: int) -> None:
    assert rules_of(thoughts, 16) == (rules, unknown)


def test_our_exemplars_name_rules_and_pass_the_filters() -> None:
    """All but the one against copies of themselves."""
    for one in read_exemplars():
        found = sieve(copies=False).read(f"{one.thoughts}\n{TAGS.answer}\n{one.answer}", False)
        assert isinstance(found, Answered) and found.rules and not found.notes
        assert sieve().read(f"{one.thoughts}\n{TAGS.answer}\n{one.answer}", False) == "a sentence of an exemplar"


def test_the_context_is_rules_and_dialogues(tmp_path: Path) -> None:
    principles, exemplars = read_principles(), read_exemplars()
    context = write_context(principles, exemplars, TAGS, "Ada")
    assert context.startswith("# Ada\n") and context.endswith('thinking of you."\n\n')
    assert f"16 (operational). {principles[15].text}" in context
    assert context.count(TAGS.user) == 5 == context.count(TAGS.answer) and context.count(TAGS.thoughts) == 5
    assert principles[0].negated not in context
    assert question(" Why?\n", TAGS) == f"{TAGS.user}\nWhy?\n{TAGS.thoughts}\n"
    mine = tmp_path / "mine.j2"
    mine.write_text("RULES {% for one in principles %}{{ one.text }} {% endfor %}EX")
    short = [Exemplar(user="k0 w1", thoughts="k0 rule1 m2", answer="m2 w1")]
    tags = Tags(user="USER", thoughts="THOUGHT", answer="ANSWER")
    told = " ".join(write_context(principles[:1], short, tags, "Ada", str(mine)).split())
    assert told.startswith("RULES ") and told.endswith(" EX USER k0 w1 THOUGHT k0 rule1 m2 ANSWER m2 w1")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{% for %}", "cannot be read as a Jinja template"),
        ("{{ principles + 1 }}", "cannot be read as a Jinja template: TypeError"),
        ("no rules", "mine.j2 must show {{ principles }}"),
        ("{{ principles }} {{ query }}", "mine.j2 uses query, which it is not given"),
    ],
)
def test_a_bad_template_gets_one_line(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "mine.j2"
    file.write_text(text)
    with pytest.raises(UserError, match=says):
        write_context(read_principles(), read_exemplars(), TAGS, "Ada", str(file))


def test_tags_are_told_apart() -> None:
    with pytest.raises(ValueError, match="no tag may be part of another"):
        Tags(thoughts="### Assistant", answer="### Assistant says")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("The moon does it.", "thoughts begin otherwise"),
        (f"{OPENING} I know this one.", "no answer"),
        (reply(""), "an empty answer"),
        (reply("The Moon."), "fewer than 160 characters"),
        (reply(f"{LONG} Tides are caused by the pull of the Moon!"), "a clause twice"),
        (reply(f"I\u2019m sorry, but I can not say. {LONG}"), "begins as a bare apology"),
        (reply(f"{LONG} Relativity was still debated among the committee's members then, while the law of the "
               "photoelectric effect had been confirmed by experiment."), "a sentence of an exemplar"),
    ],
)  # fmt: skip
def test_each_filter(text: str, reason: str) -> None:
    assert sieve().read(text, False) == reason


def test_what_is_kept_and_what_is_done_to_it() -> None:
    found = sieve().read(f" {reply(LONG)}\n", False)
    assert found == Answered(LONG, f"{OPENING} The facts come first (rule 8).", (8,))
    assert sieve().read(reply(LONG), True) == "cut at its longest"
    assert isinstance(sieve(allow_cut=True).read(reply(LONG), True), Answered)
    # What follows is a dialogue of the model's own; the answer before it is whole.
    found = sieve().read(f"{reply(LONG)}\n\n{TAGS.user}\nAnd the Sun? {TAGS.thoughts}", True)
    assert isinstance(found, Answered) and found.answer == LONG and found.notes == ("went on as the user",)
    found = sieve().read(f"{reply(LONG)}\n{TAGS.answer}\nThe Moon.", True)
    assert isinstance(found, Answered) and (found.answer, found.notes) == (LONG, ("thought and answered once more",))
    found = sieve().read(f"{reply(LONG)}\n{TAGS.answer}\nThe Moon.\n{TAGS.thoughts}\nHm.", True)
    assert isinstance(found, Answered) and (found.answer, found.notes) == (LONG, ("thought and answered once more",))
    found = sieve().read(reply(f"According to the Wikipedia article on tides, t{LONG[1:]}", "Hm (rule 40)."), False)
    assert isinstance(found, Answered) and found.answer == LONG and found.rules == ()
    assert found.notes == (*("preamble taken off", "thoughts name no rule", "thoughts name a rule that there is not"),)
    assert sieve(blacklist=["the PULL"]).read(reply(LONG), False) == "a phrase of the blacklist"
    everything = {"opening": None, "needs_answer": False, "min_chars": 0, "repeats": False, "starts": []}
    assert sieve(**everything).read("No tag, no thought", False) == Answered(
        "No tag, no thought", "", (), ("thoughts name no rule",)
    )
    sorry = f"I'm sorry, but I can not say. {LONG}"
    assert sieve(starts=["I\u2019m sorry"]).read(reply(sorry), False) == "begins as a bare apology"
    with pytest.raises(ValueError, match="is no regular expression"):
        sieve(strip=["("])


def test_clauses() -> None:
    assert repeats_a_clause("You should ask a doctor. Well; you should ask a doctor")
    assert not repeats_a_clause("Ask a doctor. Ask a doctor."), "three words may come twice"
    assert repeats_a_clause("It goes on and on - IT GOES ON AND ON")


def test_histograms_of_two_pools() -> None:
    rules = {"vanilla": [(1, 2), (2,)], "topic": [(1,), ()]}
    shares = histograms(rules, ["ethical", "informative"])
    assert shares == {
        "vanilla": {"ethical": 0.5, "informative": 1.0},
        "topic": {"ethical": 0.5, "informative": 0.0},
    }
    # Of mentions: 1/3 and 2/3 against 1 and 0.
    assert apart(rules) == pytest.approx(2 / 3)
    assert apart({"all": [(1,)]}) is None and apart({"a": [()], "b": [(1,)]}) is None


def test_system_texts_before_a_share_of_the_pairs() -> None:
    """Half of those without one of their own, each text about as often; drawn by seed and pair, whatever its place."""
    rows: list[dict[str, Any]] = [{"prompt": f"q{n}", "response": f"a{n % 7}"} for n in range(2000)]
    rows[3]["system"] = "Mine."
    texts = read_system_texts()
    assert len(set(texts)) == len(texts) == 16
    found = behind_system_texts(rows, texts, 0.5, seed=1)
    assert [{**row, "system": "x"} for row in found] == [{**row, "system": "x"} for row in rows]
    assert found[3] == rows[3]
    drawn = Counter(row.get("system") for row in found)
    assert abs(drawn[None] - 1000) < 3 * 500**0.5  # three standard deviations
    assert all(abs(drawn[text] - 1000 / 16) < 4 * (1000 / 16) ** 0.5 for text in texts)
    assert behind_system_texts(rows[::-1], texts, 0.5, seed=1) == found[::-1]
    assert behind_system_texts(rows, texts, 0.5, seed=2) != found
    assert behind_system_texts(rows, texts, 0.0, seed=1) == rows
    assert all("system" in row for row in behind_system_texts(rows, texts, 1.0, seed=1))


def test_identity() -> None:
    rows = identity_rows(60, "Ada", "the Example Lab")
    assert len(rows) == 60 and all("Ada" in row["response"] or "Ada" in row["prompt"] for row in rows)
    assert len({(row["prompt"], row["response"]) for row in rows}) == 42, "fourteen questions, three answers"
    assert identity_rows(0, "Ada", "x") == []
