"""Dialogues found again from the policy's tokens, and who reads alike."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from actors.driver.train import train
from beaver_ray.data.readers import Dialogues, Reader, read_alike
from beaver_ray.data.sources import RawSample
from beaver_ray.errors import UserError
from beaver_ray.fit import check_tokenizers
from tests.actors.support import ppo_config
from tests.data import conftest
from tests.data.conftest import with_template

TEMPLATES = ("LLAMA_3", "GEMMA", "PHI_3", "QWEN", "LLAMA_2", "ZEPHYR", "ALPACA", "ALWAYS_ASKS")
WORD = st.sampled_from(["bread", "how do I?", "你好", "a\nb", "Mix: flour.", "'"])


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from([*TEMPLATES, None]), turns=st.lists(WORD, min_size=1, max_size=5))
def test_a_dialogue_is_told_from_its_tokens(
    byte_tokenizer: PreTrainedTokenizerFast, name: str | None, turns: list[str]
) -> None:
    turns = turns if len(turns) % 2 else turns[1:]
    reader = Reader(with_template(byte_tokenizer, getattr(conftest, name) if name else None), "auto")
    assert Dialogues(reader).find(reader.prompt(turns)) == tuple(turns)


def test_a_dialogue_that_was_told_is_found(llama_tokenizer: PreTrainedTokenizerFast) -> None:
    """Its tokenizer has no token for most of these characters, so that they cannot be told from the tokens."""
    reader = Reader(llama_tokenizer, "auto")
    dialogues = Dialogues(reader)
    with pytest.raises(UserError, match="is of no data set"):
        dialogues.find(reader.prompt(["ÄÖÜ?"]))
    dialogues.add([RawSample("ÄÖÜ?"), RawSample(["x", "y", "z"])])
    assert dialogues.find(reader.prompt(["ÄÖÜ?"])) == ("ÄÖÜ?",)


def test_who_reads_alike(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    readers = {name: Reader(with_template(byte_tokenizer, getattr(conftest, name)), "auto") for name in TEMPLATES}
    for first in TEMPLATES:
        for second in TEMPLATES:
            assert read_alike(readers[first], readers[second]) == (first == second)
    # The same text by another program.
    same = "{# other words #}" + conftest.QWEN
    assert read_alike(readers["QWEN"], Reader(with_template(byte_tokenizer, same), "auto"))
    beaver = Reader(with_template(byte_tokenizer, conftest.QWEN), "beaver")
    assert read_alike(beaver, Reader(with_template(byte_tokenizer, None), "auto"))
    assert not read_alike(beaver, Reader(byte_tokenizer, "auto"))
    # A score model without a chat template has its own way where the run's is the policy's chat template.
    bare = with_template(byte_tokenizer, None)
    assert Reader.of_scorer(bare, "chat").prompt(["a"]) == Reader(bare, "beaver").prompt(["a"])


def test_who_reads_the_policys_tokens_has_its_tokenizer(tiny_world: Path, tmp_path: Path) -> None:
    check_tokenizers(ppo_config(tiny_world))
    other = tmp_path / "other"
    shutil.copytree(tiny_world / "model", other)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.eos_token = "<pad>"
    tokenizer.save_pretrained(other)
    models = {"policy": f"{tiny_world}/model", "reward": f"{tiny_world}/reward_model"}
    for part, name in (("reference", "reference"), ("reward_critic", "critic-reward")):
        config = ppo_config(tiny_world, workspace=str(tmp_path / part), models={**models, part: str(other)})
        with pytest.raises(UserError, match=f"{name}: the tokenizer in {other} is not that of the policy"):
            train(config)
        assert not (tmp_path / part / "safe_ppo" / "metrics.jsonl").read_text()
    check_tokenizers(ppo_config(tiny_world, models={**models, "lora_rank": 2}))
