"""How much memory a large data set takes beyond its tokens, and how long reading it takes: first, and from disk again.

    python benchmarks/token_memory.py 1000000 --out benchmarks/token_memory.json

Writes a file of so many short demonstrations (made-up words) into a temporary folder and has a process of its own read
it as a stage does (`read_tokens`, then the data set). Memory is the largest sum over that process and its children of
pages that are theirs alone (USS), looked at ten times a second, less what the process held before it began.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

WORDS = [a + b + c for a in ("ba", "do", "ki", "lu", "me") for b in ("ra", "ni", "to", "ve") for c in ("", "s", "n")]
MIB = 2**20


def write_rows(file: Path, rows: int) -> None:
    """Demonstrations of 5 to 20 and 10 to 60 words; one prompt in a hundred has no answer."""
    draw = random.Random(0)
    with file.open("w", encoding="utf-8") as out:
        for number in range(rows):
            prompt = f"{number} " + " ".join(draw.choices(WORDS, k=draw.randint(5, 20)))
            answer = "" if number % 100 == 0 else " ".join(draw.choices(WORDS, k=draw.randint(10, 60)))
            out.write(json.dumps({"prompt": prompt, "response": answer}) + "\n")


def make_tokenizer() -> Any:
    """A byte-level tokenizer that knows these words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    core.train_from_iterator([" ".join(WORDS)] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>")


def read(file: str) -> None:
    """The process that is measured."""
    from beaver_ray.data.token_files import read_tokens
    from beaver_ray.data.tokenized import SupervisedDataset

    tokenizer = make_tokenizer()
    print("ready", flush=True)
    sys.stdin.readline()
    started = time.perf_counter()
    data = read_tokens(SupervisedDataset, [f"demonstrations:1:{file}"], tokenizer, 512).dataset()
    figures = {"seconds": time.perf_counter() - started, "kept": len(data), "tokens": len(data.tokens.flat)}
    figures |= {"tokens_mib": (data.tokens.flat.nbytes + data.tokens.offsets.nbytes) / MIB}
    print(json.dumps(figures), flush=True)
    sys.stdin.readline()


def measured(file: Path, cache: Path) -> dict[str, float]:
    """One reading of the file by a fresh process."""
    environment = {**os.environ, "HF_DATASETS_CACHE": str(cache)}
    command = [sys.executable, __file__, "--read", str(file)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert child.stdin is not None and child.stdout is not None
    while (line := child.stdout.readline()) != "ready\n":  # libraries have remarks of their own
        if not line:
            raise RuntimeError("the process that is measured did not start")
    before = own_memory(child.pid)
    child.stdin.write("go\n")
    child.stdin.flush()
    os.set_blocking(child.stdout.fileno(), False)
    highest, line = before, ""
    while not line.startswith("{"):
        time.sleep(0.1)
        highest = max(highest, own_memory(child.pid))
        line = child.stdout.readline()
        if child.poll() is not None and not line:
            raise RuntimeError(f"the process that is measured ended with {child.returncode}")
    child.communicate("end\n")
    figures: dict[str, float] = json.loads(line)
    peak = (highest - before) / MIB
    return {**figures, "peak_mib": peak, "beyond_tokens_mib": peak - figures["tokens_mib"]}


def own_memory(pid: int) -> int:
    """Bytes of a process and its children that nobody else shares."""
    total = 0
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for process in processes:
        try:
            total += process.memory_full_info().uss
        except (psutil.NoSuchProcess, psutil.AccessDenied):  # it has just ended
            continue
    return total


def main() -> None:
    """Measure a first and a second reading."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=int, nargs="*", default=[200_000])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--read")
    arguments = parser.parse_args()
    if arguments.read:
        read(arguments.read)
        return
    results = []
    for rows in arguments.rows:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rows.jsonl"
            write_rows(file, rows)
            first, again = (measured(file, Path(folder) / "cache") for _ in range(2))
            results.append({"rows": rows, "file_mib": file.stat().st_size / MIB, "first": first, "again": again})
            print(json.dumps(results[-1], indent=1))
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    if arguments.out:
        arguments.out.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
