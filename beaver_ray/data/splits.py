"""Which files of a folder a dataset's name means, as the Hugging Face hub would say.

The hub's own rules decide, from the `datasets` library: the `configs` that a dataset card (README.md) lists, else the
words train, validation, test and their like in the names of folders or files, else everything is the training split.
"""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Any

from beaver_ray.errors import UserError, first_line

# Of Anthropic/hh-rlhf and PKU-Alignment/processed-hh-rlhf.
SUBSETS = ("harmless-base", "helpful-base")
# Texts may be packed; Parquet packs itself.
SUFFIXES = (
    *(
        f"{kind}{packed}"
        for kind in (".jsonl", ".json", ".csv", ".tsv")
        for packed in ("", ".gz", ".bz2", ".xz", ".zst")
    ),
    ".parquet",
)


def split_files(
    folder: Path, subset: str | None, split: str, strict: bool, configuration: str | None = None
) -> list[Path]:
    """The files of one split, sorted.

    subset: folder that has it inside a clone; where ``folder`` holds no subsets it is taken for that one itself.
    configuration: the one of the dataset card that is meant; None for the default one.
    strict: the name means this split and no other; else the only one that there is will do.

    Raises:
        UserError: no data file, no such split or subset, or a card that cannot be understood.
    """
    splits = _splits(_subset_folder(folder, subset), folder if subset is None else None, configuration)
    found = {name: files for name, files in splits.items() if files}
    if not found:
        raise UserError(f"no file in folder {folder}: it needs files ending in {', '.join(SUFFIXES)}")
    if split not in found and not strict and len(found) == 1:
        return next(iter(found.values()))
    if split not in found:
        raise UserError(
            f"folder {folder} has no '{split}' split, only {', '.join(sorted(found))}: use the dataset name of that "
            "one, or give the path of a file"
        )
    return found[split]


def _subset_folder(folder: Path, subset: str | None) -> Path:
    if subset is None:
        return folder
    if (folder / subset).is_dir():
        return folder / subset
    others = [name for name in SUBSETS if (folder / name).is_dir()]
    if others:
        raise UserError(f"folder {folder} has no subset '{subset}', only {', '.join(others)}: give a whole clone")
    return folder


def _splits(folder: Path, card: Path | None, configuration: str | None) -> dict[str, list[Path]]:
    """The data files of each split."""
    from datasets.data_files import EmptyDatasetError, get_data_patterns, sanitize_patterns

    entry = _configured(card, configuration) if card else {}
    base = folder.absolute() / str(entry.get("data_dir") or "")
    root = glob.escape(base.as_posix())
    try:
        listed = entry.get("data_files")
        patterns = sanitize_patterns(listed) if listed is not None else get_data_patterns(root)
    except EmptyDatasetError:
        return {}
    except ValueError as error:
        raise _bad_card(folder, error) from None
    return {str(split): _matches(root, of_split) for split, of_split in patterns.items()}


def _matches(root: str, patterns: list[str]) -> list[Path]:
    from datasets.data_files import resolve_pattern

    found: set[str] = set()
    for pattern in patterns:
        try:
            found.update(resolve_pattern(pattern, base_path=root))
        except FileNotFoundError:
            continue
    return sorted(Path(name) for name in found if name.endswith(SUFFIXES))


def _configured(folder: Path, configuration: str | None) -> dict[str, Any]:
    """What the dataset card says of a configuration, or of the default one; empty where it says nothing."""
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    card = folder / "README.md"
    try:
        if not card.is_file() or not card.read_text(encoding="utf-8", errors="replace").startswith("---"):
            return {}
        configs = MetadataConfigs.from_dataset_card_data(DatasetCard.load(card, ignore_metadata_errors=True).data)
        name = configuration or configs.get_default_config_name()
    except Exception as error:  # of broken cards these raise nearly anything
        raise _bad_card(folder, error) from None
    if configs and name is None:
        raise UserError(
            f"folder {folder} has several subsets ({', '.join(configs)}) and no default one: give the path of the "
            "files of one, or {path: FOLDER, subset: ONE, ...}"
        )
    if configs and name not in configs:
        raise UserError(f"folder {folder} has no subset '{name}', only {', '.join(configs)}: give one of those")
    return dict(configs[name]) if configs and name is not None else {}


def _bad_card(folder: Path, error: Exception) -> UserError:
    return UserError(
        f"{folder / 'README.md'} does not say which files are data ({first_line(error)}): mend its 'configs', or give "
        "the path of a file"
    )
