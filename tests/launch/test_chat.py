"""Chats through a pipe, against transformers' own generation and against scores worked out from the tensors."""

from __future__ import annotations

import io
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from beaver_ray.data.readers import Reader
from beaver_ray.models.chat import ChatFolder, ChatModel, Sampling, _Pieces
from beaver_ray.yaml_files import save_config
from launch.__main__ import main
from tests.actors.support import ppo_config, without_template

LONGEST = 6


@pytest.fixture
def asked(tiny_world: Path) -> tuple[str, str]:
    """Two questions that the small world has words for."""
    first, second = (tiny_world / "prompts" / "test.jsonl").read_text().splitlines()[:2]
    return json.loads(first)["prompt"], json.loads(second)["prompt"]


@pytest.fixture
def run(tiny_world: Path, tmp_path: Path) -> Path:
    """The folder of a run whose policy is the small world's model."""
    folder = tmp_path / "run"
    (folder / "final").mkdir(parents=True)
    (folder / "final" / "policy").symlink_to(tiny_world / "model")
    return folder


def chat(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, lines: list[str], *arguments: object
) -> list[str]:
    """The lines that a chat writes for these lines."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    with pytest.raises(SystemExit) as ended:
        main(["chat", *map(str, arguments), "--max-new-tokens", str(LONGEST)])
    captured = capsys.readouterr()
    assert (ended.value.code, captured.err) == (0, "")
    assert "\x1b" not in captured.out
    return captured.out.splitlines()


def plain(model: Any, folder: Path, turns: list[str]) -> tuple[str, list[int], bool]:
    """(text, tokens of the dialogue with it, whether it ended) of transformers' own greedy answer to the turns."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer.encode(text, add_special_tokens=False)
    end = tokenizer.eos_token_id
    settings = {"do_sample": False, "max_new_tokens": LONGEST, "eos_token_id": end, "pad_token_id": end}
    with torch.no_grad():
        whole = model.generate(torch.tensor([prompt]), **settings)[0].tolist()
    answer, ended = str(tokenizer.decode(whole[len(prompt) :], skip_special_tokens=True)), whole[-1] == end
    # Read back from its text, as special tokens amid an answer of a random model are no text.
    messages.append({"role": "assistant", "content": answer})
    tokens = tokenizer.encode(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)
    return answer, tokens if ended else tokens[:-1], ended


def end_score(folder: Path, tokens: list[int]) -> float:
    """The score of the last token: hidden state times the head, plus its bias."""
    trunk = AutoModel.from_pretrained(folder, dtype=torch.float32)
    state = load_file(folder / "model.safetensors")
    with torch.no_grad():
        hidden_D = trunk(torch.tensor([tokens])).last_hidden_state[0, -1]
    return float(hidden_D @ state["score_head.weight"][0] + state["score_head.bias"][0])


def said(answer: tuple[str, list[int], bool]) -> list[str]:
    return [answer[0], *([] if answer[2] else [f"(cut after {LONGEST} tokens)"])]


def test_a_dialogue_with_scores(
    tiny_world: Path,
    asked: tuple[str, str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two turns (before the first a byte-order mark), a reset, a system text: greedy answers are those of transformers,
    scores those of the tensors.
    """
    folder, (one, two) = tiny_world / "model", asked
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    first = plain(model, folder, [one])
    second = plain(model, folder, [one, first[0], two])
    told = plain(model, folder, [f"be brief\n\n{one}"])  # this template has no place for a system's turn
    scores = ["--reward", tiny_world / "reward_model", "--cost", f"harm={tiny_world / 'cost_model'}"]
    lines = [f"\ufeff{one}", "", two, "/reset", "/system be brief", "/regenerate", one, "/regenerate", "/nonsense"]
    out = chat(capsys, monkeypatch, [*lines, "/quit", one], folder, *scores, "--temperature", 0)

    def footer(answer: tuple[str, list[int], bool]) -> str:
        reward, cost = (end_score(tiny_world / f"{kind}_model", answer[1]) for kind in ("reward", "cost"))
        return f"reward {reward:.3f}  harm {cost:.3f} ({'unsafe' if cost > 0 else 'safe'})"

    expected = [*said(first), footer(first), *said(second), footer(second), "the dialogue is forgotten"]
    expected += ["system text set", "nothing was asked yet"]
    # Scorers judge the dialogue as they were trained on it, without the system text.
    assert out[: len(expected)] == expected
    rest = out[len(expected) :]
    assert rest[: len(said(told))] == said(told)
    again = len(said(told)) + 1
    assert rest[again : 2 * again] == rest[:again], "a greedy answer is the same again"
    assert rest[2 * again :] == ["no command /nonsense; /help lists them"]


def test_side_by_side_a_run_and_an_adapter(
    tiny_world: Path,
    run: Path,
    asked: tuple[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_world / "model", dtype=torch.float32)
    expected = [plain(base, tiny_world / "model", [asked[0]])]
    torch.manual_seed(0)
    wrapped = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    wrapped.save_pretrained(tmp_path / "adapter")
    expected.append(plain(wrapped, tiny_world / "model", [asked[0]]))
    assert expected[0][1] != expected[1][1]
    out = chat(capsys, monkeypatch, [asked[0]], run, tmp_path / "adapter", "--temperature", 1e-300)
    assert out == ["[run]", *said(expected[0]), "[adapter]", *said(expected[1])]


def test_a_run_s_policy_is_asked_by_the_run_s_template_and_an_adapter_by_its_own(
    tiny_world: Path,
    run: Path,
    asked: tuple[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The run's by name or its final/policy; the adapter's, which was saved beside it, and not that of its base."""
    data = {"template": {"style": "beaver", "system": "be brief"}}
    config = ppo_config(tiny_world, workspace=str(tmp_path), name="run", data=data)
    save_config(config, run / "config.yaml")
    bare = without_template(tiny_world / "model", tmp_path)
    wrapped = get_peft_model(
        AutoModelForCausalLM.from_pretrained(bare, dtype=torch.float32),
        LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    )
    wrapped.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(tiny_world / "model").save_pretrained(tmp_path / "adapter")
    folders = [tiny_world / "model", run, run / "final" / "policy", tmp_path / "adapter"]
    own, by_run, by_name, beside = (
        chat(capsys, monkeypatch, [asked[0]], folder, "--temperature", 0) for folder in folders
    )
    assert own == said(plain(wrapped, tiny_world / "model", [asked[0]])) == beside
    assert by_run == by_name != own


def test_a_model_that_missed_a_question_is_left_out_when_it_is_answered_anew(
    tiny_world: Path,
    asked: tuple[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every dialogue is too long for the second one."""
    shutil.copytree(tiny_world / "model", tmp_path / "short")
    config = tmp_path / "short" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 4}))
    whole = AutoModelForCausalLM.from_pretrained(tiny_world / "model", dtype=torch.float32)
    answer = said(plain(whole, tiny_world / "model", [asked[0]]))
    models = (tiny_world / "model", tmp_path / "short")
    out = chat(capsys, monkeypatch, [asked[0], "/regenerate"], *models, "--temperature", 0)
    assert out[: len(answer) + 2] == ["[model]", *answer, "[short]"] and "4" in out[len(answer) + 2]
    assert out[len(answer) + 3 :] == ["[model]", *answer]


def test_an_empty_answer_is_an_answer(
    tiny_world: Path,
    asked: tuple[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All logits are 0, and the first token ends an answer: what is answered anew is the last question."""
    folder = tmp_path / "mute"
    shutil.copytree(tiny_world / "model", folder)
    weights = load_file(folder / "model.safetensors")
    save_file({name: torch.zeros_like(tensor) for name, tensor in weights.items()}, folder / "model.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(0)
    tokenizer.save_pretrained(folder)
    heard: list[list[str]] = []
    monkeypatch.setattr(ChatModel, "answer", _hearing(heard))
    out = chat(capsys, monkeypatch, [*asked, "/regenerate"], folder, "--temperature", 0)
    assert out == ["", "(an empty answer)"] * 3
    assert heard == [[asked[0]], [asked[0], "", asked[1]], [asked[0], "", asked[1]]]


def _hearing(heard: list[list[str]]) -> Any:
    """`ChatModel.answer`, which also notes the turns that it answers."""
    answer = ChatModel.answer

    def noted(self: ChatModel, turns: list[str], *rest: Any) -> Any:
        heard.append(list(turns))
        return answer(self, turns, *rest)

    return noted


def test_a_seed_repeats_a_chat(
    tiny_world: Path,
    asked: tuple[str, str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = [asked[0], "/regenerate", "/regenerate"]
    twice = chat(capsys, monkeypatch, lines[:1], tiny_world / "model", tiny_world / "model", "--seed", 7)
    assert [line for line in twice if line.startswith("[")] == [f"[{tiny_world / 'model'}{n}]" for n in ("", " (2)")]
    first, second, other = (
        chat(capsys, monkeypatch, lines, tiny_world / "model", "--seed", seed) for seed in (7, 7, 8)
    )
    assert first == second and first != other


def test_ctrl_c_stops_an_answer_alone(tiny_world: Path, asked: tuple[str, str]) -> None:
    model = ChatModel("one", ChatFolder.find(str(tiny_world / "model")), Sampling(1.0, 16, seed=1))
    whole = model.answer([asked[0]], None, lambda piece: None)
    pieces: list[str] = []

    def show(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 2:
            signal.raise_signal(signal.SIGINT)

    model.asked = 0
    answer = model.answer([asked[0]], None, show)
    assert answer.stopped and not answer.ended and len(pieces) == 2
    assert answer.text == "".join(pieces) and whole.text.startswith(answer.text) and whole.text != answer.text
    assert not whole.stopped and model.answer([asked[0]], None, pieces.append).text


def test_white_space_of_the_template_in_several_tokens_is_no_part_of_an_answer() -> None:
    """Bytes as tokens, and a template that writes two line breaks before an answer and one behind it."""
    letters = {letter: number for number, letter in enumerate(["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    core = Tokenizer(BPE(letters, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content if m.role == 'user' else '\n\n' + m.content + '\n</s>' }}{% endfor %}"
    )
    reader = Reader(tokenizer, "chat")
    assert (reader.form.before, reader.form.after) == ("\n\n", "\n")
    for said, answer, handed in (
        ("\n\nab a\n</s>", "ab a", ["a", "b", " ", "a", "\n"]),
        ("\n\n\nb\n</s>", "\nb", ["\nb", "\n"]),
        ("ab", "ab", ["a", "b"]),
        ("\n", "\n", ["\n"]),
    ):
        shown: list[str] = []
        pieces = _Pieces(reader, shown.append)
        pieces.put(torch.tensor([[3]]))
        for token in tokenizer.encode(said, add_special_tokens=False):
            pieces.put(torch.tensor([token]))
        pieces.end()
        assert (shown, pieces.shown) == (handed, answer)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere/at/all"], "no model in '/nowhere/at/all'"),
        (["MODEL", "--cost", "harm"], "--cost 'harm' must be NAME=FOLDER"),
        (["MODEL", "--cost", "Harm=MODEL"], "'Harm' must be lower-case letters"),
        (["MODEL", "--cost", "harm=/nowhere", "--cost", "harm=MODEL"], "--cost harm is given twice"),
        (["MODEL", "--reward", "/nowhere/at/all"], "reward: no model in '/nowhere/at/all'"),
        (["MODEL", "--reward", "python:x.txt:f"], "a function that scores is written"),
        (["MODEL", "--temperature", "-1"], "--temperature"),
        (["MODEL", "--temperature", "inf"], "--temperature"),
        (["MODEL", "--temperature", "nan"], "--temperature"),
        (["MODEL", "--tries", "2"], "--tries goes with --moderation, for example --moderation FOLDER"),
        (["UNFINISHED"], "has no policy in final/policy"),
        (["ADAPTER"], "names no base_model_name_or_path"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, tiny_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.yaml").touch()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter" / "adapter_model.safetensors").touch()
    places = {"MODEL": tiny_world / "model", "UNFINISHED": tmp_path / "unfinished", "ADAPTER": tmp_path / "adapter"}
    with pytest.raises(SystemExit) as ended:
        main(["chat", *(str(places.get(word, word)) for word in arguments)])
    captured = capsys.readouterr()
    assert ended.value.code == 2 and captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and message in captured.err
