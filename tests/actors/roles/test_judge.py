"""A judge over HTTP: what it is sent, how often, what is kept, and what becomes of a service's mistakes."""

from __future__ import annotations

import json
import time
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from actors.roles import judge as judge_module
from actors.roles.judge import Judge
from actors.roles.remote_scorer import RemoteScorer
from beaver_ray.data.pairs import pair_id
from beaver_ray.errors import UserError
from beaver_ray.judge_options import JudgeOptions
from beaver_ray.score_sources import ALLOWED_HOSTS, ScorerSetting
from launch.__main__ import main
from tests.actors.judging_service import JudgeService, judging
from tests.actors.scoring_service import serving
from tests.judge.test_judge_labels import honest

SECRET = "sk-c0ffee-not-to-be-seen"


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[JudgeService]:
    monkeypatch.setattr(judge_module, "PAUSE", 1e-3)
    with judging(lambda text: f"You said {text}.") as service:
        monkeypatch.setenv(ALLOWED_HOSTS, service.host)
        yield service


THINKING = b'{"choices": [{"message": {"content": null}, "finish_reason": "length"}]}'


def judge_of(service: JudgeService, cache: Path, **options: Any) -> Judge:
    return Judge(JudgeOptions(address=service.url, model="m", **options), cache)


def test_each_text_is_asked_once_and_never_again(
    service: JudgeService, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "replies.jsonl"
    judge = judge_of(service, cache, concurrency=3, price_prompt=2.0, price_completion=10.0)
    texts = [f"number {n % 40}" for n in range(80)]
    answer = service.says
    service.says = lambda text: (time.sleep(0.01), answer(text))[1]
    replies = judge(texts)
    assert [reply.text for reply in replies] == [f"You said {text}." for text in texts]
    hello, *asked = service.requests
    assert hello["messages"][0]["content"] == judge_module.HELLO
    assert sorted(r["messages"][0]["content"] for r in asked) == sorted(set(texts))
    assert asked[0] | {"messages": []} == {"model": "m", "temperature": 0.0, "max_tokens": 1024, "messages": []}
    assert 1 < service.most_in_flight <= 3
    # Two words each asked, four answered, and those of the greeting.
    words = len(judge_module.HELLO.split())
    usage = judge.usage
    assert (usage.requests, usage.prompt_tokens, usage.completion_tokens) == (41, 80 + words, 160 + words + 2)
    assert usage.cost(judge.options) == pytest.approx((2 * usage.prompt_tokens + 10 * usage.completion_tokens) / 1e6)
    again = judge_of(service, cache)
    assert again(texts) == replies and len(service.requests) == 41, "another process, and nobody is asked"
    assert (again.usage.requests, again.usage.from_cache, again.usage.tokens_saved) == (0, 40, 240)
    assert again.usage.cost(again.options) is None
    assert judge_of(service, cache, temperature=0.5)(texts[:1]) and len(service.requests) == 43


def test_a_key_goes_along_and_what_netrc_holds_to_scoring_services_alone(
    service: JudgeService, tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login somebody password else\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("JUDGE_KEY", f" {SECRET}\n")
    judge_of(service, tmp_path / "key", api_key_env="JUDGE_KEY")(["Hi"])
    judge_of(service, tmp_path / "none")(["Hi"])
    assert [sent["Authorization"] for sent in service.headers] == [f"Bearer {SECRET}"] * 2 + [None] * 2
    with serving(lambda prompts, responses: []) as scorer:
        setting = ScorerSetting(str(tiny_world / "model"), "float32", 512, 1)
        RemoteScorer(scorer.url, {"cost/harm": 0}, setting)
    assert [sent["Authorization"] for sent in scorer.headers] == [f"Basic {b64encode(b'somebody:else').decode()}"]


def test_a_busy_service_is_asked_again(service: JudgeService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service.instead = [(429, {"Retry-After": "0.01"}, b"slow down"), (503, {}, b""), (500, {}, b"")]
    judge = judge_of(service, tmp_path / "r")
    assert judge(["Hi"])[0].text == "You said Hi." and judge.usage.retries == 3
    service.silent.set()
    with pytest.raises(UserError, match=r"no reply from the judge at .* within 0\.5 s \((ReadTimeout|Connection)"):
        judge_of(service, tmp_path / "s", timeout=0.1, deadline=0.5)(["Hi"])
    # Another: what the silent one still has in hand would take this from it.
    with judging(str) as other:
        monkeypatch.setenv(ALLOWED_HOSTS, other.host)
        other.instead = [(429, {"Retry-After": "3600"}, b"")]
        with pytest.raises(UserError, match="429 Too Many Requests"):
            judge_of(other, tmp_path / "s")(["Hi"])


def test_a_first_reply_that_breaks_off_is_asked_for_again(service: JudgeService, tmp_path: Path) -> None:
    service.instead = [(200, {"Content-Length": "99"}, b"{"), (200, {"Content-Encoding": "gzip"}, b"{}")]
    judge = judge_of(service, tmp_path / "r")
    assert judge(["Hi"])[0].text == "You said Hi." and judge.usage.retries == 2


def test_blanks_before_a_reply_are_waited_for_until_the_deadline(service: JudgeService, tmp_path: Path) -> None:
    service.blanks = 4
    assert judge_of(service, tmp_path / "r", timeout=0.5, deadline=5)(["Hi"])[0].text == "You said Hi."
    service.blanks = 400  # 20 seconds, of which none is silent
    started = time.monotonic()
    with pytest.raises(UserError, match=r"within 0\.5 s \(Timeout: it is still sending\)"):
        judge_of(service, tmp_path / "s", timeout=0.5, deadline=0.5)(["Hi"])
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        ((404, {}, b"The model m does not exist"), "knows no model 'm', or the address .* does not exist"),
        ((401, {}, f"bad key {SECRET}".encode()), "answers 401: it does not take the key in JUDGE_KEY$"),
        ((302, {"Location": "http://elsewhere/"}, b""), "does not answer but says 302"),
        ((400, {}, f"max_tokens, {SECRET}".encode()), r"does not answer but says 400 Bad Request: max_tokens, \.\.\."),
        ((400, {}, f"{290 * '.'}{SECRET}".encode()), r"says 400 Bad Request: \.+$"),  # across the cut of a long text
        ((200, {}, b"<html>"), "must answer as OpenAI's chat completions do, not 200 OK: <html>"),
        ((200, {}, b'{"choices": []}'), "must answer as OpenAI's"),
        ((200, {}, b'{"choices": [{"message": {"content": 3}}]}'), "must answer as OpenAI's"),
        (
            (200, {}, b'{"choices": [{"message": {"content": null}, "finish_reason": "stop"}]}'),
            "must answer as OpenAI's",
        ),
        ((200, {}, THINKING[:-1] + b', "usage": {"prompt_tokens": 1e999}}'), "must answer as OpenAI's"),
        ((200, {}, 9999 * b"["), "must answer as OpenAI's"),
    ],
)
def test_mistakes_are_one_line(
    service: JudgeService,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    answer: tuple[int, dict[str, str], bytes],
    complaint: str,
) -> None:
    monkeypatch.setenv("JUDGE_KEY", SECRET)
    service.instead = [answer]
    with pytest.raises(UserError, match=complaint) as caught:
        judge_of(service, tmp_path / "r", api_key_env="JUDGE_KEY")(["Hi"])
    assert SECRET not in str(caught.value) and len(service.requests) == 1


def test_nobody_there_not_allowed_and_no_key(
    service: JudgeService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="JUDGE_KEY, which is not set"):
        judge_of(service, tmp_path / "r", api_key_env="JUDGE_KEY")
    options = JudgeOptions(address="http://127.0.0.1:1/v1", model="m")
    with pytest.raises(UserError, match=f"which {ALLOWED_HOSTS} does not name"):
        Judge(options, tmp_path / "r")
    monkeypatch.setenv(ALLOWED_HOSTS, "127.0.0.1:1")
    with pytest.raises(UserError, match=r"no judge answers at http://127\.0\.0\.1:1/v1/chat/completions"):
        Judge(options, tmp_path / "r")(["Hi"])
    with pytest.raises(UserError, match="cannot keep a judge's replies"):
        Judge(options, Path("/dev/null/r"))


def test_a_text_that_is_not_taken_is_counted(
    service: JudgeService, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judge = judge_of(service, tmp_path / "r", concurrency=1)
    judge(["Hi"])
    service.instead = [(400, {}, b"too long"), (413, {}, b"")]
    assert [reply.text for reply in judge(["long", "longer", "short"])] == ["", "", "You said short."]
    assert judge.usage.unanswered == 2 and "2 texts without a reply" in judge.usage.line(judge.options)
    assert capsys.readouterr().out.count("400 Bad Request: too long") == 1
    assert judge(["long"])[0].text == "You said long.", "it is not kept, and asked again"


def test_what_an_earlier_run_had_paid_for(service: JudgeService, tmp_path: Path) -> None:
    """Two policies with the same answers: the second one's cost nothing, and no earlier run paid for them."""
    judge = judge_of(service, tmp_path / "r", price_prompt=0.1, price_completion=0.1)
    judge(["a", "b"])
    judge(["b", "c"])
    assert (judge.usage.requests, judge.usage.from_cache, judge.usage.tokens_saved) == (4, 0, 0)
    judge.usage.prompt_tokens, judge.usage.completion_tokens = 3, 0
    assert str(judge.usage.cost(judge.options)) == "3e-07", "and not 3.0000000000000004e-07"
    again = judge_of(service, tmp_path / "r")
    again(["c", "d"])
    assert (again.usage.requests, again.usage.from_cache) == (2, 1)


def odd(text: str) -> str | dict[str, Any]:
    """A service that has no reply to some texts: another form of answer, or none."""
    if text == "cut off":
        raise ConnectionAbortedError
    return {"choices": []} if text.startswith("odd") else f"You said {text}."


def test_a_text_without_a_readable_reply_costs_no_other_one(
    service: JudgeService, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    service.says = odd
    judge = judge_of(service, tmp_path / "r", concurrency=2, deadline=0.5)
    replies = judge(["one", "odd", "two", "cut off", "three"])
    assert [reply.text for reply in replies] == ["You said one.", "", "You said two.", "", "You said three."]
    assert judge.usage.unanswered == 2 and capsys.readouterr().out.count("without a reply is unparsed") == 1
    # Three of few, and one in ten of many, may be so; more say something of the service.
    with pytest.raises(UserError, match=r'must answer as OpenAI.*"choices": \[\]'):
        judge([f"odd {n}" for n in range(4)])
    many = judge_of(service, tmp_path / "many")
    assert many([*map(str, range(100)), *(f"odd {n}" for n in range(5))])[-1].text == ""
    assert many.usage.unanswered == 5
    # A service that answers nothing any more ends it at once, however few the texts are.
    service.says = lambda text: {"choices": []}
    with pytest.raises(UserError, match="must answer as OpenAI"):
        many(["Hi"])


def test_a_reply_without_content_is_one_where_it_was_cut_or_refused(service: JudgeService, tmp_path: Path) -> None:
    judge = judge_of(service, tmp_path / "r", concurrency=1)
    judge(["Hi"])
    refused = b'{"choices": [{"message": {"content": null, "refusal": "no"}, "finish_reason": "stop"}]}'
    service.instead = [(200, {}, THINKING), (200, {}, refused)]
    cut, kept_back = judge(["think", "say"])
    assert (cut.text, cut.finish, cut.refusal) == ("", "length", False)
    assert (kept_back.text, kept_back.refusal) == ("", True)
    service.instead = [(200, {}, THINKING.replace(b"length", b"stop"))]
    assert judge(["more"])[0].text == "" and judge.usage.unanswered == 1
    assert judge(["think", "more"])[1].text == "You said more.", "asked again, as it was not kept"


# The command


def rows(count: int, **labels: object) -> list[dict[str, object]]:
    return [
        {"prompt": f"Is it {n}?", "response_0": f"+ yes {n}", "response_1": f"no - {n}", **labels} for n in range(count)
    ]


KNOWN = {"better_response_id": 0, "safer_response_id": 0, "is_response_0_safe": True, "is_response_1_safe": False}


def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], service: JudgeService, *more: str) -> tuple[int, str, str]:
    judge = f"{{address: '{service.url}', model: m, api_key_env: JUDGE_KEY, price_prompt: 1}}"
    files = [str(tmp_path / "pairs.jsonl"), "--canaries", str(tmp_path / "canaries.jsonl"), "--judge", judge]
    with pytest.raises(SystemExit) as ended:
        main(["judge", *files, "--out", str(tmp_path / "out"), *more])
    return int(ended.value.code or 0), *capsys.readouterr()


def test_the_command(
    service: JudgeService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JUDGE_KEY", SECRET)
    pairs = [*rows(3), {"prompt": "And?", "response_0": "same", "response_1": "same"}]
    for name, content in (("pairs", pairs), ("canaries", rows(20, **KNOWN))):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    # A judge that always takes the first place is no judge, and nothing is labelled by it.
    service.says = lambda text: "ready" if text == judge_module.HELLO else "VERDICT: A"
    code, out, err = run(tmp_path, capsys, service)
    assert code == 2 and err.count("\n") == 1
    assert "the labels of m may not be used: helpfulness: none of the labels it gave to 20 canaries" in err
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["replies.jsonl"]
    (tmp_path / "out" / "replies.jsonl").unlink()
    # One that knows may label.
    service.says = lambda text: "ready" if text == judge_module.HELLO else honest(text)
    code, out, err = run(tmp_path, capsys, service, "--sensitive", "2")
    assert (code, err) == (0, ""), err
    assert "canaries, safety: 19 of 19 right" in out, "the sensitive one is left out"
    written = [json.loads(line) for line in (tmp_path / "out" / "labels.jsonl").open()]
    assert written == [row | {"id": pair_id(row)} | KNOWN for row in rows(2)]
    (audit,) = [json.loads(line) for line in (tmp_path / "out" / "audit.jsonl").open()]
    assert audit == rows(3)[2] | {"id": pair_id(rows(3)[2]), "audit": ["sensitive: 2"], "judge": {}}
    figures = json.loads((tmp_path / "out" / "judge.json").read_text())
    assert figures["counts"]["labelled"] == 2 and figures["counts"]["for people"] == 1
    assert figures["comparisons"]["helpfulness"]["first"] == 2 and figures["safety"] == {"SAFE": 2, "UNSAFE": 2}
    assert figures["cost"] == pytest.approx(figures["usage"]["prompt_tokens"] / 1e6) and "cost 0.0" in out
    assert not any(SECRET in file.read_text() for file in (tmp_path / "out").iterdir()) and SECRET not in out
    code, out, err = run(tmp_path, capsys, service)
    assert code == 2 and "labels.jsonl is there already" in err


def test_canaries_that_repeat_and_marks_that_say_nothing(
    service: JudgeService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One pair fourteen times, every second time the other way round, is one canary."""
    monkeypatch.setenv("JUDGE_KEY", SECRET)
    service.says = lambda text: "ready" if text == judge_module.HELLO else honest(text)
    (one,) = rows(1, **KNOWN)
    texts = {"response_0": one["response_1"], "response_1": one["response_0"]}
    labels = {"better_response_id": 1, "safer_response_id": 1, "is_response_0_safe": False, "is_response_1_safe": True}
    files: dict[str, list[dict[str, object]]] = {"canaries": [one, one | texts | labels] * 7}
    files["pairs"] = [row | {"topic": "weather"} for row in rows(3)]
    for name, content in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    code, out, err = run(tmp_path, capsys, service)
    assert code == 2 and "1 canaries have the label helpfulness" in err and service.requests == []
    assert "13 canaries are there already, and count once" in out
    (tmp_path / "canaries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(20, **KNOWN)))
    for mark, words in (
        ("harm=Violence", "sensitive 'harm=Violence': no pair has a field 'harm'"),
        ("=x", "sensitive: '=x' is neither WORD nor FIELD=VALUE"),
        (" ", "sensitive: ' ' is neither WORD nor FIELD=VALUE"),
    ):
        code, out, err = run(tmp_path, capsys, service, "--sensitive", mark)
        assert (code, err.count("\n")) == (2, 1) and words in err and service.requests == []
    code, out, err = run(tmp_path, capsys, service, "--sensitive", "topic=Weather", "--sensitive", "Is it 2")
    assert (code, err) == (0, "") and "sensitive 'topic=Weather': no pair is" in out and "'Is it 2': no" not in out
    assert [row["prompt"] for row in map(json.loads, (tmp_path / "out" / "audit.jsonl").open())] == ["Is it 2?"]
