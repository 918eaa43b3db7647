"""Scores from a service over HTTP: what it is sent, how often, and what becomes of its mistakes."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from actors.driver.policy_stage import PolicyStage
from actors.roles import remote_scorer
from actors.roles.remote_scorer import RemoteScorer, ScoringService
from actors.stages import stages
from beaver_ray import experience
from beaver_ray.data.mixing import load_mix
from beaver_ray.data.tokenized import PromptDataset
from beaver_ray.errors import UserError
from beaver_ray.models.loading import load_tokenizer
from beaver_ray.score_sources import ALLOWED_HOSTS, ScorerSetting, check_allowed
from beaver_ray.template_options import TemplateOptions
from tests.actors.scoring_service import Service, serving
from tests.actors.support import labelled_by, ppo_config, random_sequences


def words(prompts: list[str], responses: list[str]) -> list[float]:
    """What the service says: words of the response, less a quarter for each of the prompt."""
    return [len(r.split()) - len(p.split()) / 4 for p, r in zip(prompts, responses, strict=True)]


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setattr(remote_scorer, "BACKOFF", 1e-4)
    with serving(words) as service:
        yield service


def remote(service: Service, world: Path, column: str = "cost/harm", timeout_s: float = 60.0) -> RemoteScorer:
    return RemoteScorer(
        service.url, {column: 0}, ScorerSetting(str(world / "model"), "float32", 512, 1, timeout_s=timeout_s)
    )


def test_texts_go_out_and_scores_come_back(service: Service, tiny_world: Path) -> None:
    batch = random_sequences(150, seed=1)
    found = remote(service, tiny_world).score(batch)
    assert found.schema.names == ["sample_id", "cost/harm"]
    assert found.column("sample_id").equals(batch.column("sample_id"))
    # The first asks who is there; the others come in any order.
    first, *others = service.requests
    assert first == {"prompts": [], "responses": [], "dialogues": []}
    assert sorted(len(request["prompts"]) for request in others) == [22, 64, 64]
    decode = load_tokenizer(str(tiny_world / "model")).decode
    texts = [
        [decode(tokens, skip_special_tokens=skip) for tokens in experience.rows(batch, column)]
        for column, skip in (("prompt_tokens", False), ("response_tokens", True))
    ]
    assert sorted(p for request in others for p in request["prompts"]) == sorted(texts[0])
    np.testing.assert_array_equal(experience.scalars(found, "cost/harm"), np.float32(words(*texts)))
    assert remote(service, tiny_world).score(batch.slice(0, 0)).num_rows == 0


def test_a_service_is_handed_the_dialogue(service: Service, tiny_world: Path) -> None:
    """Of prompts and of labelled pairs, where it is told of the run's prompts."""
    specs = [f"prompts:3/-1:{tiny_world}/prompts/train.jsonl"]
    samples, _ = load_mix(specs)
    tokenizer = load_tokenizer(str(tiny_world / "model"))
    batch = experience.make_batch(
        {
            "sample_id": range(3),
            "prompt_tokens": list(PromptDataset.build(samples, tokenizer, 64).prompts),
            "response_tokens": [[7, 8, 2], [9, 2], [10]],
            "finish_reason": ["stop", "stop", "length"],
        }
    )
    model = str(tiny_world / "model")
    told = RemoteScorer(service.url, {"cost/harm": 0}, ScorerSetting(model, "float32", 512, 1, prompts=[specs]))
    assert service.requests == [{"prompts": [], "responses": [], "dialogues": []}], "whether it is there"
    told.score(batch)
    sent = service.requests[-1]
    assert sent["dialogues"] == [[{"role": "user", "content": sample.input}] for sample in samples]
    assert sent["responses"] == [tokenizer.decode(tokens) for tokens in ([7, 8], [9], [10])]
    # With the system prompt, which the small world's template has no turn for.
    options = TemplateOptions(system="Be kind.")
    place = batch.schema.get_field_index("prompt_tokens")
    asked = list(PromptDataset.build(samples, tokenizer, 64, options).prompts)
    kind = experience.make_batch({"prompt_tokens": asked}).column(0)
    RemoteScorer(
        service.url, {"cost/harm": 0}, ScorerSetting(model, "float32", 512, 1, template=options, prompts=[specs])
    ).score(batch.set_column(place, batch.schema.field(place), kind))
    first = {"role": "system", "content": "Be kind."}
    assert service.requests[-1]["dialogues"] == [[first, *dialogue] for dialogue in sent["dialogues"]]


def test_the_dialogues_of_labelled_pairs_are_those_of_their_rows(
    service: Service, tiny_world: Path, tmp_path: Path
) -> None:
    """Also where the policy's tokenizer has no token for a word, so that the tokens do not tell it."""
    service.score = lambda prompts, responses: [float(len(response)) for response in responses]
    labelled_by(service.score, tiny_world, tmp_path / "pairs.jsonl")
    pairs = (tmp_path / "pairs.jsonl").read_text().replace(" the ", " ÄÖÜ ").replace("key", "schlüssel")
    (tmp_path / "pairs.jsonl").write_text(pairs)
    run = [[f"prompts:3/-1:{tiny_world}/prompts/train.jsonl"]]
    setting = ScorerSetting(str(tiny_world / "model"), "float32", 512, 1, prompts=run)
    told = RemoteScorer(service.url, {"cost/harm": 0}, setting)
    service.requests.clear()
    assert told.calibrate("cost/harm", [f"PKU-SafeRLHF:1:{tmp_path}/pairs.jsonl"], 64)["n"] == 120
    sent = [one for body in service.requests for one in zip(body["dialogues"], body["prompts"], strict=True)]
    contents = [dialogue[0]["content"] for dialogue, _ in sent]
    assert sorted(contents) == sorted(2 * [json.loads(line)["prompt"] for line in pairs.splitlines()])
    for content, (_, prompt) in zip(contents, sent, strict=True):
        assert f"USER: {content} ASSISTANT:" in prompt
    answers = [answer for body in service.requests for answer in body["responses"]]
    rows = map(json.loads, pairs.splitlines())
    assert sorted(answers) == sorted(row[key] for row in rows for key in ("response_0", "response_1"))


def test_its_scores_are_calibrated_like_any_others(service: Service, tiny_world: Path) -> None:
    # The more words the less safe, by the service; the labels know nothing of that, so here it is told.
    labels = {}
    for line in (tiny_world / "preferences" / "test.jsonl").read_text().splitlines():
        for index in (0, 1):
            safe, answer = re.search(rf'"is_response_{index}_safe": (\w+)', line), f'"response_{index}": "(.*?)"'
            labels[re.search(answer, line)[1]] = safe[1] == "true"  # type: ignore[index]
    service.score = lambda prompts, responses: [-1.0 if labels[r] else 1.0 for r in responses]
    scorer = remote(service, tiny_world)
    specs = [f"PKU-SafeRLHF:1:{tiny_world}/preferences/test.jsonl"]
    figures = scorer.calibrate("cost/harm", specs, 64)
    assert figures["accuracy"] == figures["sign_accuracy"] == 1.0
    service.score = lambda prompts, responses: [1.0 for _ in responses]
    probability = experience.scalars(scorer.score(random_sequences(3, seed=1)), "cost/harm")
    expected = 1 / (1 + np.exp(-(figures["scale"] + figures["bias"])))
    np.testing.assert_allclose(probability, expected, rtol=1e-6)


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_busy_service_is_asked_again(service: Service, tiny_world: Path, status: int) -> None:
    scorer = remote(service, tiny_world)
    service.instead = [(status, {}, b"later")] * 4
    assert scorer.score(random_sequences(3, seed=1)).num_rows == 3
    assert len(service.requests) == 2 + 4
    service.instead = [(status, {}, b"later")] * 5
    with pytest.raises(UserError, match=f"{service.url} does not score but answers {status} .*: later"):
        scorer.score(random_sequences(3, seed=1))


def test_a_busy_service_has_a_quarter_of_the_time_for_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/scores.md; asked five times."""
    pauses: list[float] = []
    monkeypatch.setattr("urllib3.util.retry.time", SimpleNamespace(sleep=pauses.append, time=time.time))
    with serving(words) as service:
        service.instead = [(503, {}, b"later")] * 5
        with pytest.raises(UserError, match="answers 503"):
            ScoringService(service.url, timeout_s=600.0).scores(["p"], ["r"])
    assert len(service.requests) == 5 and sum(pauses) == pytest.approx(600 / 4, rel=0.1)


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_what_is_wrong_is_not_asked_again(service: Service, tiny_world: Path, status: int) -> None:
    service.instead = [(status, {}, b"no")]
    with pytest.raises(UserError, match=f"answers {status} .*: no; see its log"):
        remote(service, tiny_world)
    assert len(service.requests) == 1


def test_no_redirect_is_followed(service: Service, tiny_world: Path) -> None:
    with serving(words) as stranger:
        service.instead = [(307, {"Location": stranger.url}, b"")]
        with pytest.raises(UserError, match="answers 307"):
            remote(service, tiny_world)
        assert stranger.requests == []


def test_a_silent_service_and_none_at_all(service: Service, tiny_world: Path) -> None:
    silent = ScoringService(service.url, timeout_s=4.0)  # 0.2 s a try
    service.silent.set()
    with pytest.raises(UserError, match=rf"no answer from the scorer at {service.url} .*timed out"):
        silent.scores(["p"], ["r"])
    # It counts a request when that has come in, which may be after its sender has gone.
    deadline = time.monotonic() + 30
    while len(service.requests) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(service.requests) == 5
    with serving(words) as gone:
        url = gone.url
    with pytest.raises(UserError, match=r"no answer from the scorer at .*refused.*resume=true"):
        ScoringService(url, 2.0).scores([], [])


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"<html>",
        b"[]",
        b"{}",
        b"null",
        b'{"scores": 1}',
        b'{"scores": [1]}',
        b'{"scores": [1, "x"]}',
        b'{"scores": [1, NaN]}',
        b'{"scores": [1, null]}',
        b'{"scores": [[1], [2]]}',
        b'{"scores": [1, 1e999]}',
        b'{"scores": [1, 1e39]}',
        b'{"scores": [1, ' + b"9" * 400 + b"]}",
        b'{"scores": [[1], 2]}',
        b"\xff\xfe",
    ],
)
def test_an_answer_that_is_none_is_refused_in_one_line(service: Service, tiny_world: Path, answer: bytes) -> None:
    scorer = remote(service, tiny_world)
    service.instead = [(200, {}, answer)]
    with pytest.raises(UserError, match=r'must answer \{"scores": \[...\]\} with 2 finite numbers \(of float32\), not'):
        scorer.score(random_sequences(2, seed=1))


def test_hosts_must_be_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ALLOWED_HOSTS, raising=False)
    with pytest.raises(UserError, match=rf"may not be sent to a\.b, .* export {ALLOWED_HOSTS}=a\.b:80 "):
        check_allowed("http://a.b/x")
    monkeypatch.setenv(ALLOWED_HOSTS, "scores.here, A.B:8000")
    for allowed in ("http://a.b:8000/x", "https://scores.here/", "http://SCORES.here:1234"):
        check_allowed(allowed)
    monkeypatch.setenv(ALLOWED_HOSTS, "[::1]:8000,scores.here,a.b:8000,[fd00::1:8000]")
    check_allowed("http://[::1]:8000/x")
    for other in (
        "http://[::1]/",
        "http://[fd00::1]:8000/",
        "http://a.b/x",
        "https://a.b:800",
        "http://x.scores.here",
        "http://scores.here.x",
        "http://here",
    ):
        with pytest.raises(UserError, match="may not be sent"):
            check_allowed(other)


def config(tiny_world: Path, stage: str = "safe_ppo", models: dict[str, object] | None = None) -> PolicyStage:
    constraint = {"name": "harm", "model": "http://a.b/harm", "limit": 0.0, "critic": f"{tiny_world}/cost_model"}
    parts = {"policy": f"{tiny_world}/model", "reward": f"{tiny_world}/reward_model"} | (models or {})
    return ppo_config(tiny_world, stage, models=parts, constraints=[constraint])


def test_critics_start_from_folders(tiny_world: Path) -> None:
    both = {"reward": "https://a.b/reward", "reward_critic": f"{tiny_world}/reward_model"}
    assert config(tiny_world, models=both).models.reward == "https://a.b/reward"
    with pytest.raises(ValueError, match=r"no critic can start from .*; give reward_critic a folder"):
        config(tiny_world, models={"reward": "https://a.b/reward"})
    changes = config(tiny_world).model_dump()
    changes["constraints"][0]["critic"] = None
    with pytest.raises(ValueError, match=r"constraint harm: no critic can start from .*; give critic a folder"):
        stages()["safe_ppo"].model_validate(changes)
    # Plain PPO has no cost critic, and a shared one starts from the reward's.
    stages()["ppo"].model_validate(changes | {"stage": "ppo"})
    stages()["safe_ppo"].model_validate(changes | {"models": changes["models"] | {"shared_critic": True}})


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "https:///score",
        "http://a.b?key=secret",
        "http://user:secret@a.b/",
        "http://user:secret@:8000/",
        "http://user:80/secret@a.b/",
        "http://user:sec/ret@a.b/",
        "http://a.b/#secret",
        "http://a.b:99999/",
        "http://a.b:0/",
        "http://[::1/",
        # urllib3 would ask secret.com.
        "http://secret.com\\[::1]/x",
        "http://secret.com\\@a.b/x",
        "http://a.b/x y",
    ],
)
def test_addresses_that_are_none_or_hold_a_secret(tiny_world: Path, url: str) -> None:
    both: dict[str, object] = {"reward": url, "reward_critic": f"{tiny_world}/reward_model"}
    with pytest.raises(ValueError, match="a scoring service's address is") as error:
        config(tiny_world, models=both)
    assert "sec" not in str(error.value).split("[type=")[0]
