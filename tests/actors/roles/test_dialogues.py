"""Dialogues that an environment goes on with: their tokens, masks and log-probs against plain transformers, and who
reads them.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from actors.roles import environment
from actors.roles.environment import EnvironmentSpec
from actors.roles.exchange import DIALOGUE_SCHEMA, PROMPT_SCHEMA, Exchange, InFlight, check_prompts, sample_seed
from actors.roles.function_scorer import FunctionScorer
from actors.roles.generator import GeneratorSpec, VllmGenerator
from actors.roles.hf_generator import HFGenerator
from actors.roles.scorer import Scorer
from beaver_ray import experience
from beaver_ray.data.mixing import load_mix
from beaver_ray.data.readers import Dialogues, Reader
from beaver_ray.data.tokenized import PromptDataset
from beaver_ray.errors import UserError
from beaver_ray.models.loading import load_tokenizer
from beaver_ray.score_sources import ScorerSetting
from beaver_ray.small_world.build import build
from beaver_ray.small_world.world import SmallWorld
from beaver_ray.user_code import Code
from tests.actors.conftest import disturb, forward_logprobs
from tests.actors.support import EOS, LiteralScoreModel, disturb_folder, whole_sequences, write_score_folder
from tests.packed_weights import pack

TEMPERATURE, NEW_TOKENS, SEED = 0.7, 48, 5
STOPS = [EOS, *range(60, 90)]  # so that answers of a random model end
TALK = """
import os
import random
import time

class Talk:
    def __init__(self, dialogue, fields, seed, slow=None, wrong=None, gate=None):
        self.question, self.slow, self.wrong, self.gate = dialogue[-1], slow, wrong, gate
        self.left = random.Random(seed).randrange(4)

    def opened(self):
        return self.gate is not None and os.path.exists(self.gate)

    def reply(self, answer):
        deadline = time.monotonic() + (120 if self.gate else 1.2)
        while self.slow == self.question and not self.opened() and time.monotonic() < deadline:
            time.sleep(0.05)
        if self.wrong == self.question:
            return int(answer)
        self.left -= 1
        return None if self.left < 0 else " ".join(["really"] * (1 + len(answer.split()) % 3) + [self.question])
"""


class Talk:
    """The same, to say what is right."""

    def __init__(self, question: str, sample_id: int) -> None:
        self.question, self.left = question, random.Random(sample_seed(SEED, sample_id)).randrange(4)

    def reply(self, answer: list[str]) -> str | None:
        self.left -= 1
        return None if self.left < 0 else " ".join(["really"] * (1 + len(answer) % 3) + [self.question])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small world whose policy vLLM can run on a CPU (heads of 32) and which ends its answers soon."""
    folder = tmp_path_factory.mktemp("dialogues")
    settings = SmallWorld(seed=3, train_prompts=24, test_prompts=8)
    sizes = {"pairs": 8, "test_pairs": 8, "demonstrations": 8, "test_demonstrations": 8}
    build(folder, settings, hidden_size=32, layers=2, heads=1, **sizes)  # type: ignore[arg-type]
    disturb_folder(folder / "model")
    GenerationConfig(eos_token_id=STOPS).save_pretrained(folder / "model")
    return folder


@pytest.fixture
def model(world: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(world / "model", dtype=torch.float32)


def prompt_source(world: Path) -> str:
    return f"prompts:1:{world}/prompts/train.jsonl"


def questions(world: Path) -> list[str]:
    return [str(sample.input) for sample in load_mix([prompt_source(world)])[0]]


def prompts(world: Path, first_id: int = 0) -> pa.RecordBatch:
    data = PromptDataset.build(load_mix([prompt_source(world)])[0], load_tokenizer(str(world / "model")), 64)
    rows = [
        {"sample_id": first_id + n, "prompt_id": n, "prompt_tokens": list(tokens)}
        for n, tokens in enumerate(data.prompts)
    ]
    return pa.RecordBatch.from_pylist(rows, PROMPT_SCHEMA)


def spec(world: Path, **keywords: Any) -> GeneratorSpec:
    talk = Code("python:talk.py:Talk", "Talk", keywords, TALK, str(world / "talk.py"))
    return GeneratorSpec(
        str(world / "model"),
        dtype="float32",
        max_model_len=32 + NEW_TOKENS,
        max_new_tokens=NEW_TOKENS,
        max_sequences=8,
        temperature=TEMPERATURE,
        seed=SEED,
        kv_cache_gib=0.1,
        environment=EnvironmentSpec(talk, "auto", [[prompt_source(world)]]),
    )


def check_structure(world: Path, row: dict[str, Any]) -> None:
    """Answers that end in a stop token, and between them exactly what the user says, by the world's words alone."""
    tokenizer = load_tokenizer(str(world / "model"))
    words, mask, tokens = tokenizer.get_vocab(), row["loss_mask"], row["response_tokens"]
    assert len(tokens) == len(mask) == len(row["rollout_logprobs"]) == len(row["token_versions"]) <= NEW_TOKENS
    user, place, said = Talk(questions(world)[row["prompt_id"]], row["sample_id"]), 0, []
    while True:
        end = next((n for n in range(place, len(tokens)) if tokens[n] in STOPS), len(tokens) - 1) + 1
        assert mask[place:end] == [True] * (end - place)
        if tokens[end - 1] not in STOPS:
            assert row["finish_reason"] == "length" and end == len(tokens) == NEW_TOKENS
            break
        answer = [tokenizer.decode([t]) for t in tokens[place : end - 1] if t not in tokenizer.all_special_ids]
        turn = user.reply(answer)
        if turn is None:
            assert row["finish_reason"] == "stop" and end == len(tokens)
            break
        hole = [words[word] for word in ["USER:", *turn.split(), "ASSISTANT:"]]
        if end + len(hole) >= NEW_TOKENS:
            assert row["finish_reason"] == "room" and end == len(tokens)
            break
        assert tokens[end : end + len(hole)] == hole and mask[end : end + len(hole)] == [False] * len(hole)
        place = end + len(hole)
        said.append(turn)
    assert row["turns"] == said


def check_logprobs(row: dict[str, Any], models: dict[int, PreTrainedModel]) -> None:
    """Each own token's, from one forward of the whole dialogue by the weights that it was sampled under."""
    mask = torch.tensor(row["loss_mask"])
    versions = torch.tensor(row["token_versions"])
    for version, by in models.items():
        mine = mask & (versions == version)
        expected = forward_logprobs(by, row, TEMPERATURE)[mine]
        torch.testing.assert_close(torch.tensor(row["rollout_logprobs"])[mine], expected, atol=1e-4, rtol=0)
    own = versions[mask].tolist()
    assert own == sorted(own) and row["weight_version"] == own[0] and set(own) <= models.keys()


def drain(generator: VllmGenerator | HFGenerator, batch: pa.RecordBatch | None, count: int) -> dict[int, Any]:
    _, found = generator.exchange(batch, Exchange(count))
    return {row["sample_id"]: row for row in found.to_pylist()}


def test_plain_generation(world: Path, model: PreTrainedModel) -> None:
    generator = HFGenerator(spec(world))
    summary, found = generator.exchange(prompts(world), Exchange(24))
    assert found.schema == DIALOGUE_SCHEMA and found.num_rows == 24
    rows = found.to_pylist()
    for row in rows:
        check_structure(world, row)
        check_logprobs(row, {0: model})
    assert {len(row["turns"]) for row in rows} == {0, 1, 2, 3} and {r["finish_reason"] for r in rows} >= {
        "stop",
        "room",
    }
    assert summary["generated_tokens"] == sum(sum(row["loss_mask"]) for row in rows)
    # A sample that was lost with its generator is the same again, in whatever batch.
    again = drain(generator, prompts(world).take(pa.array([5, 11])), 2)
    assert [again[n]["response_tokens"] for n in (5, 11)] == [rows[n]["response_tokens"] for n in (5, 11)]


@pytest.fixture(scope="module")
def vllm_generator(world: Path) -> Iterator[VllmGenerator]:
    slow = questions(world)[4]
    generator = VllmGenerator(spec(world, slow=slow, gate=str(world / "gate")))
    yield generator
    generator.close()


def test_in_vllm_with_weights_that_change_in_flight(
    vllm_generator: VllmGenerator, world: Path, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, sizes = vllm_generator._engine, []
    step = engine.step

    def counted() -> Any:
        sizes.append((len(engine.output_processor.request_states), len(vllm_generator._queue)))
        return step()

    monkeypatch.setattr(engine, "step", counted)
    new = AutoModelForCausalLM.from_config(model.config).float()
    new.load_state_dict(model.state_dict())
    disturb(new, seed=1)
    # Three times as many as fit at a time; one of them has a slow user, who keeps nobody else waiting.
    first = drain(vllm_generator, prompts(world), 23)
    assert len(first) == 23 and 4 not in first
    (world / "gate").touch()
    assert sizes[0] == (8, 16) and all(at_work >= 8 for at_work, queued in sizes if queued), "the batch stays full"
    first |= drain(vllm_generator, None, 24)
    assert sorted(first) == list(range(24))
    for row in first.values():
        check_structure(world, row)
        check_logprobs(row, {0: model})
    assert {len(row["turns"]) for row in first.values()} == {0, 1, 2, 3}
    # Dropped in the middle and asked for again, alone, a dialogue is the same.
    some = prompts(world).take(pa.array([2, 7, 13]))
    done = drain(vllm_generator, some, 1)
    left = [n for n in (2, 7, 13) if n not in done]
    summary, nothing = vllm_generator.exchange(None, Exchange(1, abort=left))
    assert sorted(summary["aborted"]) == sorted(left) and nothing.num_rows == 0
    again = done | drain(vllm_generator, some.filter(pa.array([n in left for n in (2, 7, 13)])), 3)
    assert {n: row["response_tokens"] for n, row in again.items()} == {n: first[n]["response_tokens"] for n in again}
    # New weights come while dialogues are under way: none is lost, and every token knows its version.
    rows = drain(vllm_generator, prompts(world, 100), 5)
    vllm_generator.update_weights(pack(new.state_dict().items(), 1, 2**20))
    rows |= drain(vllm_generator, None, 24)
    assert sorted(rows) == list(range(100, 124))
    for row in rows.values():
        check_structure(world, row)
        check_logprobs(row, {0: model, 1: new})
    own = {n: {v for v, m in zip(r["token_versions"], r["loss_mask"], strict=True) if m} for n, r in rows.items()}
    assert any(own[n] == {0, 1} and row["turns"] for n, row in rows.items())
    assert {row["weight_version"] for row in rows.values()} == {0, 1}


def test_mistakes_of_an_environment_are_one_line(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = questions(world)[3]
    batch = prompts(world).take(pa.array([3]))
    where = r"rollout\.environment python:talk\.py:Talk: turn 1 of sample 3, after answer '[^']*': "
    with pytest.raises(UserError, match=where + "ValueError: invalid literal for int"):
        HFGenerator(spec(world, wrong=wrong)).exchange(batch, Exchange(1))
    with pytest.raises(UserError, match=where + r"TypeError: .*unexpected keyword argument 'nonsense'"):
        HFGenerator(spec(world, nonsense=1)).exchange(batch, Exchange(1))
    # In threads: a slow one is waited for as long as it may take.
    monkeypatch.setattr(environment, "QUICK_S", 0.01)
    monkeypatch.setattr(environment, "REPLY_S", 0.05)
    made = spec(world, slow=wrong).start_environment()
    assert made is not None
    flight = InFlight(*check_prompts(batch, 99, ()))
    flight.versions = [(0, 0)]
    flight.answered([10, EOS], [0.0, 0.0])
    made.ask(flight)
    with pytest.raises(UserError, match=r"turn 1 of sample 3, after answer '\w+': no reply within 0\.05 s"):
        for _ in range(100):
            assert made.replies(idle=True) == []
    made.close()


def talking(world: Path, reply: Callable[[str], str | None]) -> environment.Environment:
    """An environment that answers so to everybody."""
    made = spec(world).start_environment()
    assert made is not None
    made.made = lambda *_, **__: SimpleNamespace(reply=reply)
    return made


def test_half_a_character_is_no_turn(world: Path) -> None:
    made = talking(world, lambda answer: "\ud800 hi")
    with pytest.raises(UserError, match=r"turn 1 of sample 0, after answer '': UnicodeEncodeError: .*surrogates"):
        made.reply(InFlight(*check_prompts(prompts(world).slice(0, 1), 99, ())))


def test_an_environment_that_ends_its_process_is_one_line(world: Path) -> None:
    made = talking(world, lambda answer: sys.exit(3))
    with pytest.raises(UserError, match="turn 1 of sample 0, after answer '': SystemExit: 3"):
        made.reply(InFlight(*check_prompts(prompts(world).slice(0, 1), 99, ())))


def test_an_environment_is_as_slow_as_its_slowest_reply(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads for twelve replies: six of them one after another take longer than one may, and each does not."""
    monkeypatch.setattr(environment, "PARALLEL", 2)
    monkeypatch.setattr(environment, "QUICK_S", 1.0)
    for seconds, slow in ((0.3, False), (2.0, True)):
        made = talking(world, lambda answer, seconds=seconds: time.sleep(seconds))  # type: ignore[misc]
        for flight in map(InFlight, check_prompts(prompts(world).slice(0, 12), 99, ())):
            made.ask(flight)
        assert len(made.replies(idle=False)) == (0 if slow else 12) and made.slow == slow
        made.close()


# Who reads dialogues


def dialogue(world: Path, ends: tuple[int, int] = (EOS, EOS)) -> pa.RecordBatch:
    """Prompt 0 with one answer, and prompt 1 with two; the answers end in these tokens."""
    words = load_tokenizer(str(world / "model")).get_vocab()
    asked = prompts(world).column("prompt_tokens").to_pylist()[:2]
    first = [words["key"], words["oil"], ends[0]]
    hole = [words[w] for w in ("USER:", "please", "show", "me", "ASSISTANT:")]
    second = [words["shim"], ends[1]]
    return experience.make_batch(
        {
            "sample_id": [0, 1],
            "prompt_tokens": asked,
            "response_tokens": [first, first + hole + second],
            "loss_mask": [[True] * 3, [True] * 3 + [False] * 5 + [True] * 2],
            "finish_reason": ["stop", "room"],
            "turns": [[], ["please show me"]],
        }
    )


def test_a_function_is_given_the_whole_dialogue(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = Code(
        "python:f.py:f",
        "f",
        {},
        "SEEN = []\ndef f(prompts, responses, *, dialogues):\n    SEEN.append((prompts, responses, dialogues))\n"
        "    return [len(turns) for turns in dialogues]\n",
        str(tmp_path / "f.py"),
    )
    scorer = FunctionScorer(
        code, {"reward": 0}, ScorerSetting(str(world / "model"), "float32", 512, 1, prompts=[[prompt_source(world)]])
    )
    scores = scorer.score(dialogue(world))
    one, two = questions(world)[:2]
    seen = scorer.function.__globals__["SEEN"]
    assert seen == [([one, "please show me"], ["key oil", "shim"], [[one], [two, "key oil", "please show me"]])]
    assert experience.scalars(scores, "reward").tolist() == [1.0, 3.0]


def test_a_score_model_reads_the_whole_dialogue(world: Path, tmp_path: Path) -> None:
    """In the policy's tokens with the end that it knows behind each answer; and in words of its own."""
    write_score_folder(tmp_path / "reward", world / "model", seed=1, score_type="reward")
    load_tokenizer(str(world / "model")).save_pretrained(tmp_path / "reward")
    policy, folder = str(world / "model"), str(tmp_path / "reward")
    scorer = Scorer(folder, {"reward": 0}, ScorerSetting(policy, "float32", 512, 1, prompts=[[prompt_source(world)]]))
    assert scorer.reads_tokens
    literal = LiteralScoreModel(tmp_path / "reward")
    ended = whole_sequences(dialogue(world))
    with torch.no_grad():
        expected = [float(literal([row])[0, -1]) for row in ended]
    for batch in (dialogue(world), dialogue(world, (STOPS[3], STOPS[7]))):
        np.testing.assert_allclose(experience.scalars(scorer.score(batch), "reward"), expected, atol=1e-4)
    reader = Reader(load_tokenizer(policy), "auto")
    scorer.reads_tokens, scorer.dialogues = False, Dialogues(reader, [[prompt_source(world)]])
    told = scorer.in_own_tokens(dialogue(world))
    assert whole_sequences(told) == ended


def test_answers_by_hand() -> None:
    masks = [[True, True], [True, False, False, True, True, False, True]]
    batch = experience.make_batch({"response_tokens": [[5] * len(m) for m in masks], "loss_mask": masks})
    assert experience.answers(batch) == [[(0, 2)], [(0, 1), (3, 5), (6, 7)]]
    assert experience.answers(batch.slice(0, 0)) == []
