"""What tells the worse answer of real pairs: the question, the answer, or both together.

    python benchmarks/moderation_pairs.py hh-rlhf:1:hh/harmless-base/test.jsonl.gz --seeds 0 1 2

Names data sets as a recipe does. Every question stands there twice, once with the answer that people preferred and once
with the other, whose label `worse` is true: by the question alone the area under the ROC curve is exactly one half. A
fifth of the first turns is held out; stage moderation trains a model of about a million parameters from random weights
on the others, with a tokenizer that was made of their texts. What a question adds to its answer is a matter of meaning,
and no model that small is expected to gain by it.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import torch
from common import study_options, write
from moderation import moderation_figures
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from beaver_ray.data.mixing import load_mix, prompt_key
from beaver_ray.data.sources import RawSample
from beaver_ray.json_files import write_rows

ARMS = ("question", "answer", "qa")
WORDS, TOKENS = 4000, 256
SPECIAL = ("<pad>", "<s>", "</s>")
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}"
TEMPLATE += "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}assistant: {% endif %}"


def write_model(folder: Path, texts: list[str], seed: int) -> None:
    """A decoder of random weights, and a byte-pair tokenizer of these texts."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    words.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=WORDS, special_tokens=list(SPECIAL), initial_alphabet=letters, show_progress=False
        ),
    )
    pad, bos, eos = SPECIAL
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token=pad, bos_token=bos, eos_token=eos)
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(seed)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=TOKENS, **shape, **ids))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def answers(sample: RawSample) -> list[dict[str, Any]]:
    """Both answers of a pair, each with its label."""
    said = ((sample.answer, not sample.better), (sample.other_answer, bool(sample.better)))
    return [{"prompt": list(prompt_key(sample)), "response": text, "labels": {"worse": bad}} for text, bad in said]


def study(folder: Path, samples: list[RawSample], seed: int) -> dict[str, Any]:
    """The figures of one way to hold first turns out."""
    split: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for sample in samples:
        held_out = zlib.crc32(f"{seed}/{prompt_key(sample)[0]}".encode()) % 5 == 0
        split["test" if held_out else "train"] += answers(sample)
    if not (folder / "model").is_dir():
        texts = [text for row in split["train"] for text in (row["prompt"][-1], row["response"])]
        write_model(folder / "model", texts, seed)
    files = {name: folder / f"{name}.jsonl" for name in split}
    for name, rows in split.items():
        write_rows(files[name], rows)
    found: dict[str, Any] = {"seed": seed, **{f"{name}_answers": len(rows) for name, rows in split.items()}}
    for arm in ARMS:
        data = {"train": [f"moderation:1:{files['train']}"], "eval": [f"moderation:1:{files['test']}"]}
        sizes = {"max_tokens": TOKENS, "engine": {"micro_batch_tokens": 2048}}
        model = str(folder / "model")
        figures = moderation_figures(folder, arm, seed, model=model, labels=["worse"], **data, **sizes)
        found[arm] = {key: round(figures["labels"]["worse"][key], 4) for key in ("auroc", "auprc", "ece")}
    return found


def main() -> None:
    """Study every seed, and write one JSON file."""
    parser = study_options(__doc__, "moderation_pairs", "runs/moderation-pairs", (0, 1, 2), jobs=False)
    parser.add_argument("data", nargs="+", help="data sets of pairs, NAME:PROPORTION:PATH")
    options = parser.parse_args()
    torch.set_num_threads(1)
    samples = [sample for sample in load_mix(options.data)[0] if sample.better is not None]
    seeds = [study(options.workspace.resolve() / f"seed_{seed}", samples, seed) for seed in options.seeds]
    mean = {arm: round(sum(of_seed[arm]["auroc"] for of_seed in seeds) / len(seeds), 4) for arm in ARMS}
    marks = {
        f"{arm} above question": all(row[arm]["auroc"] > row["question"]["auroc"] for row in seeds) for arm in ARMS[1:]
    }
    write(options.out, {"pairs": len(samples), "auroc": mean, "marks": marks, "seeds": seeds})
    print(json.dumps({"auroc": mean, "marks": marks}, indent=2))


if __name__ == "__main__":
    main()
