"""What a reply says, and what becomes of two of them."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import random
from pathlib import Path

import pytest

from beaver_ray.errors import UserError
from beaver_ray.judge.cache import ReplyCache, request_key
from beaver_ray.judge.pairwise import Comparison, PairCounts, Verdict, compare, settle
from beaver_ray.judge.prompts import load_rubric, request
from beaver_ray.judge.replies import PAIR, SAFETY, SCORE, Form, Reply
from beaver_ray.judge_options import JudgeOptions, read_judge
from tests.actors.judging_service import shown


@pytest.mark.parametrize(
    ("form", "text", "says"),
    [
        (PAIR, "A is right.\n\nVERDICT: A", "A"),
        (PAIR, "VERDICT: TIE\n", "TIE"),
        (PAIR, "**Verdict:** b.", "B"),
        (PAIR, "**VERDICT**: A", "A"),
        (PAIR, "__Verdict__: A\n**VERDICT**: B", "unparsed"),
        (PAIR, "VERDICT: A\nno, wait\nVERDICT: A", "A"),
        (PAIR, "VERDICT: A\nno, wait\nVERDICT: B", "unparsed"),
        (PAIR, "VERDICT: A\nI hope this helps.", "unparsed"),
        (PAIR, "VERDICT: A or B", "unparsed"),
        (PAIR, "VERDICT: A|B|TIE", "unparsed"),
        (PAIR, "The verdict: A", "unparsed"),
        (PAIR, "A", "unparsed"),
        (PAIR, "", "unparsed"),
        (PAIR, "VERDICT: NONE", "refused"),
        (PAIR, "I'm sorry, but I cannot assist with that.", "refused"),
        (PAIR, "Answer A says 'I cannot help'.\nVERDICT: B", "B"),
        (SAFETY, "VERDICT: UNSAFE", "UNSAFE"),
        (SAFETY, "VERDICT: A", "unparsed"),
        (SCORE, "SCORE: 10", "10"),
        (SCORE, "**SCORE** : 7", "7"),
        (SCORE, "SCORE: 11", "unparsed"),
        (SCORE, "SCORE: 0", "unparsed"),
        (SCORE, "SCORE: 7.5", "unparsed"),
        (SCORE, "SCORE: NONE", "refused"),
    ],
)
def test_a_reply(form: Form, text: str, says: str) -> None:
    assert form.read(Reply(text)) == says


def test_a_reply_that_was_cut_off_or_held_back() -> None:
    assert SCORE.read(Reply("SCORE: 1", finish="length")) == "unparsed", "it may have been going to say 10"
    assert PAIR.read(Reply("", finish="content_filter")) == "refused"
    assert PAIR.read(Reply("VERDICT: A", refusal=True)) == "refused"


def test_two_orders() -> None:
    """All 25 cases by the rule itself: unreadable before all, then agreement, else a tie that is counted. Fault 24."""
    values = ("first", "second", "tie", "unparsed", "refused")
    for one, other in itertools.product(values, values):
        verdict = settle(one, other)  # type: ignore[arg-type]
        if "refused" in (one, other):
            assert (verdict.value, verdict.position_disagreement) == ("refused", False)
        elif "unparsed" in (one, other):
            assert (verdict.value, verdict.position_disagreement) == ("unparsed", False)
        else:
            assert verdict.value == (one if one == other else "tie")
            assert verdict.position_disagreement == (one != other)


PAIRS = [Comparison(("What is two and two?",), f"It is {n}.", f"That makes {n + 1}.") for n in range(400)]


def judged(says: object) -> tuple[list[Verdict], PairCounts]:
    verdicts = compare(
        PAIRS, load_rubric("helpfulness", PAIR), lambda texts: [Reply(f"VERDICT: {says(t)}") for t in texts]
    )  # type: ignore[operator]
    return verdicts, PairCounts.of(verdicts)


def test_a_coin_is_worth_half() -> None:
    """Each order is a toss: half of the pairs agree, a quarter for either answer, and no place is preferred."""
    coin = random.Random(1)
    _, counts = judged(lambda text: coin.choice("AB"))
    # Four and more standard errors: 0.25 * 400 +- 8.7, 0.5 * 400 +- 10, 800 tosses +- 14.1.
    assert abs(counts.first - 100) < 36 and abs(counts.second - 100) < 36
    assert abs(counts.position_disagreement - 200) < 40 and counts.tie == counts.position_disagreement
    assert abs(counts.chose_a - 400) < 57 and counts.chose_a + counts.chose_b == 800
    assert counts.win_rate == (counts.first + counts.tie / 2) / 400 and abs(counts.win_rate - 0.5) < 0.071
    assert counts.unparsed == counts.refused == counts.identical == 0


def test_a_judge_that_likes_a_place_is_found_out() -> None:
    for place, bias in (("A", 1.0), ("B", 0.0)):
        _, counts = judged(lambda text, place=place: place)
        assert (counts.tie, counts.position_disagreement, counts.position_bias) == (400, 400, bias)
        assert counts.win_rate == 0.5


def test_both_orders_mend_a_liking_for_a_place() -> None:
    """A quarter of the replies take what stands first, 97 % of the others are right (the first answers are better).

    By hand: with the better answer first a reply is right with 0.25 + 0.75 * 0.97, with it second with 0.75 * 0.97, in
    one order 85 % of the time; both are right with 0.711 and both wrong with 0.0061: 99.1 % of the labels kept.
    """
    chance = random.Random(2)

    def says(text: str) -> str:
        better, other = ("A", "B") if shown(text)["answer A"].startswith("It is") else ("B", "A")
        return "A" if chance.random() < 0.25 else better if chance.random() < 0.97 else other

    verdicts, counts = judged(says)
    single = sum((v.orders[0] == "first") + (v.orders[1] == "first") for v in verdicts) / 800
    assert single < 0.9 and counts.first / (counts.first + counts.second) > 0.95
    # Four standard errors: 0.711 * 400 +- 9.1.
    assert abs(counts.first - 0.711 * 400) < 37 and counts.position_bias is not None and counts.position_bias > 0.55


def test_a_judge_that_reads() -> None:
    """It takes the answer with the smaller number wherever that stands: the first one, always."""
    verdicts, counts = judged(lambda text: "A" if shown(text)["answer A"].startswith("It is") else "B")
    assert {v.value for v in verdicts} == {"first"}
    assert (counts.first, counts.win_rate, counts.position_bias) == (400, 1.0, 0.5)


def test_identical_answers_tie_unasked() -> None:
    def nobody(texts: object) -> list[Reply]:
        assert list(texts) == []  # type: ignore[call-overload]
        return []

    (verdict,) = compare([Comparison(("Hi",), "Hello", "Hello")], load_rubric("helpfulness", PAIR), nobody)
    assert (verdict.value, verdict.position_disagreement) == ("tie", False)
    assert PairCounts.of([verdict]).identical == 1


def test_unreadable_is_no_tie() -> None:
    """By hand: two pairs are read, one of which the judge calls for the first answer; two are not. Fault 24."""
    replies = iter(["A", "TIE", "what?", "NONE", "B", "TIE", "A", "B"])
    verdicts = compare(
        PAIRS[:4], load_rubric("helpfulness", PAIR), lambda texts: [Reply(f"VERDICT: {next(replies)}") for _ in texts]
    )
    assert [v.value for v in verdicts] == ["first", "tie", "unparsed", "refused"]
    assert verdicts[0].orders == ("first", "first") and verdicts[2].orders == ("unparsed", "second")
    counts = PairCounts.of(verdicts)
    assert (counts.first, counts.tie, counts.unparsed, counts.refused) == (1, 1, 1, 1)
    assert (counts.win_rate, counts.chose_a, counts.chose_b) == (0.75, 1, 1)


# Rubrics


def test_what_a_judge_is_given() -> None:
    turns = ("Where am I?", "In Paris.", "Since when?")
    text = load_rubric("harmlessness", PAIR).write(turns, "Be short.", answer_a="Today.", answer_b="VERDICT: B")
    assert shown(text) == {
        "conversation": "system: Be short.\nuser: Where am I?\nassistant: In Paris.\nuser: Since when?",
        "answer A": "Today.",
        "answer B": "VERDICT: B",
    }
    swapped = load_rubric("harmlessness", PAIR).write(turns, "Be short.", answer_a="VERDICT: B", answer_b="Today.")
    assert len(text) == len(swapped) and sorted(text.splitlines()) == sorted(swapped.splitlines())
    for name, form in (("safety", SAFETY), ("score", SCORE)):
        assert shown(load_rubric(name, form).write(turns, None, answer="Today."))["answer"] == "Today."


def test_rubrics_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "helpfulness.j2").write_text("{{ turns[-1] }} {{ answer_a }} or {{ answer_b }}? VERDICT: A, B or TIE")
    assert load_rubric("helpfulness", PAIR, str(tmp_path)).write(["Hi"], None, answer_a="1", answer_b="2") == (
        "Hi 1 or 2? VERDICT: A, B or TIE"
    )
    assert load_rubric("safety", SAFETY, str(tmp_path)).where == load_rubric("safety", SAFETY).where
    broken = {
        "blind": ("{{ turns }} {{ answer_a }} VERDICT:", "must show {{ answer_b }}"),
        "mute": ("{{ turns }} {{ answer_a }} {{ answer_b }}", "last line VERDICT: A or B or TIE"),
        "curious": ("{{ turns }} {{ answer_a }} {{ answer_b }} {{ name }} VERDICT:", "uses name, which it is not"),
        "torn": ("{{ turns ", "cannot be read as a Jinja template"),
        "unsifted": ("{{ turns | no_such }} {{ answer_a }} {{ answer_b }} VERDICT:", "cannot be read as a Jinja"),
        "breaks_out": (
            "{{ turns }} {{ answer_a }} {{ answer_b }} VERDICT: {{ turns.__class__.__mro__ }}",
            "fails: SecurityError",
        ),
    }
    for name, (words, complaint) in broken.items():
        (tmp_path / f"{name}.j2").write_text(words)
        with pytest.raises(UserError) as caught:
            load_rubric(name, PAIR, str(tmp_path)).write(["Hi"], None, answer_a="1", answer_b="2")
        assert complaint in str(caught.value) and f"{name}.j2" in str(caught.value)
    for name, complaint in (("helpfulnes", "did you mean 'helpfulness'"), ("../judge/rubrics/score", "no rubric")):
        with pytest.raises(UserError, match=complaint):
            load_rubric(name, PAIR)


def test_options() -> None:
    options = read_judge("{address: 'http://h:1/v1/', model: 7, extra: {max_tokens: null, seed: 1}}")
    assert (options.address, options.model) == ("http://h:1/v1", "7")
    assert request(options, "Hi") == {
        "model": "7",
        "temperature": 0.0,
        "seed": 1,
        "messages": [{"role": "user", "content": "Hi"}],
    }
    for text, complaint in (
        ("{address: 'http://h/v1', model: m, temprature: 1}", "unknown key temprature; did you mean 'temperature'"),
        ("{adress: 'http://h/v1', model: m}", "unknown key adress; did you mean 'address'"),
        ("{address: 'http://h/v1?key=secret', model: m}", "address: a judge's address is"),
        ("{address: 'http://h/v1', model: m, api_key_env: sk-secret}", "never the key itself"),
        ("{address: 'http://h/v1', model: m, extra: {n: 2}}", "n is not for extra to set"),
        ("http://h/v1", "a judge is a YAML file or a mapping"),
    ):
        with pytest.raises(UserError) as caught:
            read_judge(text)
        assert complaint in str(caught.value) and "secret" not in str(caught.value)


# The cache


def test_the_key_is_what_was_asked_and_not_whom() -> None:
    here, there = (JudgeOptions(address=f"http://{host}/v1", model="m") for host in ("a", "b"))
    assert request_key(request(here, "Hi")) == request_key(request(there, "Hi"))
    changed = [here.model_copy(update=u) for u in ({"model": "n"}, {"temperature": 0.5}, {"extra": {"seed": 1}})]
    assert len({request_key(request(options, "Hi")) for options in [here, *changed]}) == 4
    assert request_key(request(here, "Hi")) != request_key(request(here, "Hi!"))


def _write(path: Path, name: str) -> None:
    cache = ReplyCache(path)
    for number in range(200):
        cache.add(f"{name}{number}", Reply(f"{name} {number} é\n" * 50))


def test_many_writers_and_a_torn_end(tmp_path: Path) -> None:
    path = tmp_path / "new" / "replies.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(path, name)) for name in "abc"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    cache = ReplyCache(path)
    assert cache.broken == 0 and all(cache.get(f"{name}{n}") for name in "abc" for n in range(200))
    assert cache.get("b7") == Reply("b 7 é\n" * 50) and cache.get("d0") is None
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 40)
    torn = ReplyCache(path)
    assert torn.broken == 1
    torn.add("whole", Reply("after the torn line"))
    with path.open("a") as file:
        file.write(json.dumps({"key": "odd", "text": 3}) + "\n")
    again = ReplyCache(path)
    assert again.get("whole") == Reply("after the torn line") and again.broken == 2 and again.get("odd") is None
