"""What is read out of replies, each filter by hand, and what a pool covers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from beaver_ray.errors import UserError
from beaver_ray.self_align.coverage import coverage, verb_and_noun
from beaver_ray.self_align.options import InstructionFilters
from beaver_ray.self_align.pool import TOPIC, VANILLA, Pool
from beaver_ray.self_align.principles import read_principles
from beaver_ray.self_align.requests import (
    Hint,
    Written,
    ask_for_questions,
    ask_for_tasks,
    ask_for_topics,
    read_tasks_of,
    read_topics_of,
)
from beaver_ray.self_align.seeds import (
    Exemplar,
    QuestionType,
    Task,
    annotation_lines,
    read_exemplars,
    read_system_texts,
    read_tasks,
    read_types,
)

SEED = Task(instruction="Name the largest lake in Europe.")
KIND = QuestionType(name="law", about="It asks for legal advice.", topic="Tenancy", question="May he evict my parrot?")


def pool(**filters: object) -> Pool:
    return Pool(InstructionFilters.model_validate(filters), [SEED], [KIND])


def test_a_model_goes_on_with_a_list_of_tasks() -> None:
    request = ask_for_tasks([SEED, Task(instruction="Sort these.", input="b, a")], 3)
    assert request.endswith("### Task 2\nInstruction: Sort these.\nInput: b, a\n\n### Task 3\nInstruction:")
    reply = (
        " Write a poem\nabout rain.\nInput: None\n\n### Task 4\nInstruction: Translate this.\nInput: Guten Tag\n\n"
        "### Task 5\nA task without its word\n### Task 6\nInput: 3\n### Task 7\nInstruction: Cut o"
    )
    assert read_tasks_of(reply, 3) == [
        Written("Write a poem\nabout rain.", "", 3),
        Written("Translate this.", "Guten Tag", 4),
        Written("A task without its word", "", 5),
        Written("", "3", 6),
        Written("Cut o", "", 7),
    ]
    assert Written("Translate this.", "Guten Tag").prompt == "Translate this.\n\nGuten Tag"


@pytest.mark.parametrize(
    "head", ["", "### Task 3\n", "Instruction:", "Instructions:", "**Instruction:** ", "###Task 3:\nInstruction: "]
)
def test_a_tuned_model_may_write_the_head_again(head: str) -> None:
    told = f"{head} Find a rhyme for night.\nInput: n/a\nOutput: light"
    assert read_tasks_of(told, 3)[-1] == Written("Find a rhyme for night.", "", 3)


def test_what_stands_before_the_head_is_no_task() -> None:
    told = "Sure, here they are:\n\n### Task 3\nInstruction: Name a lake in Asia.\n### Task 4\nSort b, a."
    assert [one.instruction for one in read_tasks_of(told, 3)] == ["Name a lake in Asia.", "Sort b, a."]


def test_other_headings_end_a_task_and_are_none() -> None:
    told = (
        " Name a lake.\n\n### Response:\nLake Baikal is one.\n\n### Task 4\nSort b, a.\n### Output\na, b"
        "\n### Instruction:\nName a river.\n### Notes\nThat is all of them.\n### Task " + "9" * 5000 + "\nName a hill."
    )
    assert [(one.number, one.instruction) for one in read_tasks_of(told, 3)] == [
        *((3, "Name a lake."), (4, "Sort b, a."), (None, "Name a river."), (999999, "Name a hill.")),
    ]
    told = "Sure, here they are:\n### Further tasks\n### Task 3\nName a lake in Asia."
    assert [one.instruction for one in read_tasks_of(told, 3)][-1] == "Name a lake in Asia."


def test_a_second_list_does_not_undo_the_first() -> None:
    """A completion that no token ends may begin anew with a task of the number that was open."""
    told = " Name a lake.\n### Task 4\nSort b, a.\n### Task 1\nAdd 2 and 3.\n### Task 3\nName a hill."
    found = read_tasks_of(told, 3)
    assert [one.instruction for one in found] == ["Name a lake.", "Sort b, a.", "Add 2 and 3.", "Name a hill."]


def test_questions_are_asked_by_hints_and_read_by_their_numbers() -> None:
    request = ask_for_questions([KIND], [Hint("law", "Wills"), Hint("crime", "Theft")])
    assert "2. Wills (law); 3. Theft (crime)" in request
    assert request.endswith("### Question 2\nKind: law\nTopic: Wills\nQuestion:")
    reply = " Who inherits?\n\n### Question 3\nKind: crime\nTopic: Theft\nQuestion: Is it theft?\n### Question 4\nKind:"
    found = read_tasks_of(reply, 2)
    assert [(one.number, one.instruction) for one in found] == [(2, "Who inherits?"), (3, "Is it theft?"), (4, "")]


def test_topics_end_where_the_list_does() -> None:
    assert ask_for_topics(KIND, ["Tenancy"], 10).endswith("1. Tenancy\n2.")
    assert read_topics_of(" Wills\n3. Divorce\n(4) Speed limits\n- Taxes\nThat is all.\n5. Not this") == [
        *("Wills", "Divorce", "Speed limits", "Taxes"),
    ]
    assert read_topics_of("") == []
    assert read_topics_of("Here they are:\n\n2. Wills\n\n3. Divorce\n\nThat is all.") == [
        *("Here they are:", "Wills", "Divorce"),
    ]


@pytest.mark.parametrize(
    ("instruction", "given", "reason"),
    [
        ("", "", "no instruction"),
        ("Name a lake.", "", "fewer than 4 words"),
        ("Name all lakes again.", "water " * 147, "more than 150 words"),
        ("Describe what this image shows.", "", "a word of the blacklist"),
        ("«Traduis» le mot suivant maintenant", "", "begins with no ASCII character"),
        ("- Name a lake in Asia", "", "begins with punctuation"),
        ("name the largest lake in europe.", "", "the very words of another"),
        # Five of the seed's six words in order: 2 * 5 / (6 + 6) = 0.83.
        ("Name the largest lake in Africa.", "", "ROUGE-L above 0.7 with another"),
        ("May he evict my old parrot?", "", "ROUGE-L above 0.7 with another"),
    ],
)
def test_each_filter(instruction: str, given: str, reason: str) -> None:
    found = pool()
    assert not found.offer(Written(instruction, given), VANILLA, 1)
    assert found.counts == {VANILLA: Counter({"written": 1, reason: 1})}


def test_entries_of_the_blacklist_may_be_phrases_or_have_signs() -> None:
    found = pool(blacklist=["pie chart", "e-mail", "C++", "图片", "child's", " "], any_script=True)
    for text in (
        *("Make a Pie  chart of it", "Write him an e-mail now.", "Sort them in C++ please", "请描述这张图片"),
        "Draw a child\u2019s face for me",
        *("Describe pie charts to me", "Bake a pie, chart it", "Sort them in C please"),
    ):
        found.offer(Written(text), VANILLA, 1)
    assert found.counts == {VANILLA: Counter({"written": 8, "a word of the blacklist": 5, "kept": 3})}


def test_what_passes_and_what_is_cut() -> None:
    found = pool()
    assert found.offer(Written("Name a big lake."), VANILLA, 1)  # ROUGE-L with the seed: 2 * 2 / 10
    assert found.offer(Written("Imagine a graphical interface."), VANILLA, 1), "no word of the blacklist in full"
    assert found.offer(Written("Name all lakes again.", "water " * 146), VANILLA, 2), "150 words"
    assert not found.offer(Written("Why do lakes freeze from the top?"), VANILLA, 2, cut=True)
    assert not found.offer(Written("Name one big lake."), VANILLA, 2), "held against what was kept, too: 2 * 3 / 8"
    assert found.offer(Written("Who pays for damp walls?"), TOPIC, 1, Hint("law", "Tenancy"))
    assert [row["round"] for row in found.rows] == [1, 1, 2, 1]
    assert found.rows[-1] == {
        **{"prompt": "Who pays for damp walls?", "instruction": "Who pays for damp walls?", "input": ""},
        **{"pool": "topic", "round": 1, "category": "law", "topic": "Tenancy"},
    }
    assert found.counts[VANILLA]["kept"] == 3 == found.kept(VANILLA) and found.kept(TOPIC) == 1


def test_other_scripts_pass_where_they_may() -> None:
    found = pool(any_script=True)
    assert found.offer(Written("请写一首关于秋天的诗"), VANILLA, 1)
    assert not found.offer(Written("请写一首关于冬天的诗"), VANILLA, 1), "9 of 10 characters"
    assert found.offer_topic("法律", "law", 5) and found.offer_topic("wills", "law", 5)
    assert not pool().offer(Written("请写一首关于秋天的诗"), VANILLA, 1)


@pytest.mark.parametrize(
    ("topic", "reason"),
    [
        ("", "no topic"),
        ("Rights of old tenants", "more than 3 words"),
        ("wills", "no capital letter at its beginning"),
        ("Wills.", "punctuation at its end"),
        ("TENANCY", "a topic that is there"),
    ],
)
def test_each_filter_of_topics(topic: str, reason: str) -> None:
    found = pool()
    assert not found.offer_topic(topic, "law", 5)
    assert found.counts == {"topics": Counter({"written": 1, reason: 1})}


def test_kinds_are_kept_even() -> None:
    found = Pool(InstructionFilters(), [SEED], [KIND, KIND.model_copy(update={"name": "crime", "topic": "Theft"})])
    assert found.offer_topic("Wills", "law", 2) and not found.offer_topic("Taxes", "law", 2)
    assert found.counts["topics"]["beyond topics of its kind"] == 1
    found.offer(Written("Who pays for damp walls?"), TOPIC, 1, Hint("law", "Tenancy"))
    # Theft and Wills are about nothing yet; Tenancy comes last. One of each kind in turn.
    assert [hint.topic for hint in found.open_topics()] == ["Theft", "Wills", "Tenancy"]


def test_verbs_and_nouns() -> None:
    said = {
        "Write a short story about a fox.": ("write", "story"),
        "Please explain the water cycle to me": ("explain", "cycle"),
        "What is the capital of Peru?": ("what", "capital"),
        "Sort.": ("sort", ""),
        "Translate: Guten Tag": ("translate", ""),
    }
    assert {text: verb_and_noun(text) for text in said} == said
    assert verb_and_noun("12 + 5 = ?") is None
    rows = [{"instruction": text} for text in said] + [{"instruction": "Write a poem on ice.", "category": "law"}]
    found = coverage(rows, {"law": ["Tenancy", "Wills"]})
    assert found["types"] == {"law": {"topics": 2, "instructions": 1}}
    assert found["verbs"]["write"] == {"instructions": 2, "nouns": {"story": 1, "poem": 1}}
    assert found["distinct_verbs"] == 5 and found["distinct_verb_noun"] == 1.0


def test_our_seeds_and_the_lines_that_people_have_written() -> None:
    tasks, types, principles, exemplars = read_tasks(), read_types(), read_principles(), read_exemplars()
    assert (len(tasks), len(types), len(principles), len(exemplars)) == (175, 20, 16, 5)
    assert Task(instruction="Shorten it.", input="A | b") == read_tasks_like("Shorten it. | A | b")
    lines = annotation_lines(tasks, types, principles, exemplars)
    assert lines["all"] == 175 + 20 + 16 + 15 < 300, "each exemplar is three lines"
    assert annotation_lines(system_texts=["a", "b"])["all"] == 2
    several = Exemplar(user="One", thoughts="Two\n\nThree", answer="Four\nFive")
    assert annotation_lines(exemplars=[several])["exemplars"] == 5
    # Every seed passes the filters but for those words that images and the like bring, and is unlike the others.
    found = Pool(InstructionFilters(), [], types)
    left = [task.instruction for task in tasks if not found.offer(Written(task.instruction, task.input), VANILLA, 1)]
    assert found.kept(VANILLA) > 160, left


def read_tasks_like(text: str) -> Task:
    """One task as a file has it."""
    from beaver_ray.self_align.seeds import _Tasks

    return _Tasks.model_validate({"tasks": [text]}).tasks[0]


@pytest.mark.parametrize(
    ("reads", "text", "says"),
    [
        (read_tasks, "tasks: [{instruction: ''}]", "tasks.0.instruction"),
        (read_tasks, "seeds: []", "unknown key seeds"),
        (read_types, "types: [{name: a, about: b, topic: c}]", "question"),
        (read_types, "types: [" + ", ".join(["{name: a, about: b, topic: c, question: d}"] * 2) + "]", "called 'a'"),
        (read_exemplars, "exemplars: [{user: a, thoughts: b, answr: c}]", "did you mean 'answer'"),
        (read_exemplars, "- a list", "must hold"),
        (read_system_texts, "texts: [a, '']", "texts.1"),
    ],
)
def test_a_bad_file_gets_one_line(tmp_path: Path, reads, text: str, says: str) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=says) as caught:
        reads(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
