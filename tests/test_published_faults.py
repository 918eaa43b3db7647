"""Faults of the published code that no other test shows to be none of ours, and the docs' table of them all."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, OPTConfig, PreTrainedConfig

from actors.roles.exchange import Exchange
from actors.roles.generator import GeneratorSpec
from actors.roles.hf_generator import HFGenerator
from beaver_ray.errors import UserError
from beaver_ray.models.loading import load_policy, load_tokenizer
from launch.config_files import load_config
from tests.actors.conftest import make_prompts

ROOT = Path(__file__).parents[1]
SAFE_PPO = ROOT / "configs" / "compat" / "safe_ppo.yaml"
FAULTS = 27


def test_fault_05_tokenizers_and_padded_vocabularies_stay_as_they_are(tiny_world: Path, tmp_path: Path) -> None:
    """A vocabulary padded by 64 rows, and a tokenizer that has no unknown token."""
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_world / "model")
    rows = model.config.vocab_size + 64
    model.resize_token_embeddings(rows)
    model.save_pretrained(tmp_path)
    plain: Any = AutoTokenizer.from_pretrained(tiny_world / "model")
    plain.unk_token = None
    plain.save_pretrained(tmp_path)
    loaded = load_policy(str(tmp_path), torch.float32)
    tokenizer = load_tokenizer(str(tmp_path))
    assert loaded.get_input_embeddings().weight.shape[0] == loaded.get_output_embeddings().weight.shape[0] == rows
    assert len(tokenizer) == len(plain) < rows and tokenizer.unk_token is None
    assert tokenizer.get_vocab() == plain.get_vocab()


SIZES = {"vocab_size": 200, "max_position_embeddings": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
LEARNED_POSITIONS = [
    GPT2Config(**SIZES, hidden_size=16),
    OPTConfig(**SIZES, hidden_size=16, word_embed_proj_dim=16, ffn_dim=24),
]


@pytest.mark.parametrize("config", LEARNED_POSITIONS, ids=lambda config: config.model_type)
def test_fault_08_padding_moves_no_position(config: PreTrainedConfig, tiny_world: Path, tmp_path: Path) -> None:
    """Learned positions and prompts of 1 to 19 tokens in one batch: log-probs are those of each row by itself."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_world / "model").save_pretrained(tmp_path)
    generator = HFGenerator(GeneratorSpec(str(tmp_path), dtype="float32", max_model_len=64, max_new_tokens=8))
    _, batch = generator.exchange(make_prompts(6, lengths=(1, 20), vocabulary=200), Exchange(6))
    for row in batch.to_pylist():
        prompt, answer = row["prompt_tokens"], row["response_tokens"]
        with torch.no_grad():
            logprobs_TV = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        expected = [float(logprobs_TV[len(prompt) - 1 + n, token]) for n, token in enumerate(answer)]
        assert row["rollout_logprobs"] == pytest.approx(expected, abs=1e-5)
    assert len({len(row["prompt_tokens"]) for row in batch.to_pylist()}) > 3


@pytest.mark.parametrize("option", ["top_p=0.9", "repetition_penalty=1.2"])
def test_fault_07_nothing_is_sampled_from_another_distribution_than_is_trained(option: str) -> None:
    with pytest.raises(UserError, match=option.partition("=")[0]):
        load_config(SAFE_PPO, [f"rollout.{option}"])


def test_fault_10_the_schedule_counts_the_steps_that_there_are() -> None:
    """Two epochs of 45, 45 and 10 prompts are six steps: the rest of an epoch is a step of its own."""
    config = load_config(SAFE_PPO, ["epochs=2", "rollout.prompts_per_step=45"])
    assert config.total_steps(100) == 6  # type: ignore[attr-defined]
    assert config.total_steps(90) == 4  # type: ignore[attr-defined]


def test_fault_18_of_transformers_one_private_name_is_used() -> None:
    found = set()
    for room in ("beaver_ray", "actors", "launch"):
        for file in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "transformers":
                    found |= {name.name for name in node.names if name.name.startswith("_")}
    assert found == {"_get_template_variables"}


@pytest.mark.parametrize("name", ["safe_ppo", "ppo", "reward_shaping"])
def test_fault_19_what_is_asked_for_is_done_or_refused(name: str) -> None:
    """A flag that this stage does not have, and one that is given twice; bfloat16 is what all its models run in."""
    recipe = SAFE_PPO.with_name(f"{name}.yaml")
    with pytest.raises(UserError, match="master_port"):
        load_config(recipe, ["master_port=1"])
    assert load_config(recipe).engine.dtype == "bfloat16"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("version", "epochs", "initial", "rate", "limit"),
    [(1, 3, 1.0, 0.01, 0.0), (2, 3, 0.5, 0.04, -3.0), (3, 4, 1.0, 0.04, -3.0)],
)
def test_fault_26_the_papers_rounds_are_recipes_of_their_own(
    version: int, epochs: int, initial: float, rate: float, limit: float
) -> None:
    """Table 4; its threshold of -d is the limit, and its KL coefficient of 0.1, split in half, is 0.05."""
    config: Any = load_config(SAFE_PPO.with_name(f"paper-v{version}.yaml"))
    (harm,) = config.constraints
    multiplier = harm.multiplier
    assert (config.epochs, harm.limit) == (epochs, limit)
    assert (multiplier.rule, multiplier.initial, multiplier.learning_rate) == ("log_sgd", initial, rate)
    assert (config.policy.learning_rate, config.ppo.kl_coefficient, config.ppo.clip_ratio) == (9.65e-6, 0.05, 0.1)
    published: Any = load_config(SAFE_PPO)
    (harm,) = published.constraints
    assert (published.epochs, harm.limit, harm.multiplier.initial, harm.multiplier.learning_rate) == (1, 0.0, 1.0, 0.1)
    assert (published.policy.learning_rate, published.ppo.kl_coefficient, published.ppo.clip_ratio) == (1e-5, 0.01, 0.2)


def test_the_page_lists_every_fault_with_tests_that_exist() -> None:
    """Each test is there, and says in its name or docstring which fault it is about."""
    page = (ROOT / "docs" / "moving-from-safe-rlhf.md").read_text(encoding="utf-8")
    section = page.partition("## Faults of the published code")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (\d+) \| (.+) \| (.+) \| (.+) \|$", section, flags=re.MULTILINE)
    assert [int(number) for number, *_ in rows] == list(range(1, FAULTS + 1))
    for number, _, _, tests in rows:
        named = re.findall(r"`(tests/[^`]+?\.py)::(test_\w+)`", tests)
        assert named or tests.startswith("does not apply: "), f"fault {number} has neither a test nor a reason"
        for file, name in named:
            tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
            found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
            assert len(found) == 1, f"fault {number}: no test {name} in {file}"
            said = re.findall(r"[Ff]aults? ([\d, and]+)", ast.get_docstring(found[0]) or "")
            numbers = {int(n) for words in said for n in re.findall(r"\d+", words)}
            assert f"_fault_{int(number):02}_" in name or int(number) in numbers, (
                f"{file}::{name} is silent on {number}"
            )
