"""Tiny random encoders on disk, as they come from pre-training: a masked language model, and a tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 66,
    "pad_token_id": 1,
}
_RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_position_embeddings": 64}
_MODERN = {"cls_token_id": 0, "sep_token_id": 2, "bos_token_id": 0, "eos_token_id": 2, "local_attention": 8}
ENCODERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "roberta": (tf.RobertaForMaskedLM, {}),
    "deberta": (tf.DebertaV2ForMaskedLM, _RELATIVE),
    "modernbert": (tf.ModernBertForMaskedLM, {**_MODERN, "global_attn_every_n_layers": 2}),
    "bert": (tf.BertForMaskedLM, {}),
}


def write_encoder(folder: Path, family: str, texts: Iterable[str], seed: int = 0) -> Path:
    """A folder with an encoder of a family, whose tokenizer knows the words of the texts."""
    # BERT's tokenizers have no BOS and EOS, and call theirs by other names.
    begin, pad, end, unknown, mask = (
        ("[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]")
        if family == "bert"
        else ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
    )
    core = Tokenizer(models.BPE(unk_token=unknown))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = [begin, pad, end, unknown, mask]
    words = ["BEGINNING OF CONVERSATION: USER: ASSISTANT:", *texts]
    core.train_from_iterator(words, trainers.BpeTrainer(vocab_size=512, special_tokens=special, show_progress=False))
    core.post_processor = TemplateProcessing(single=f"{begin} $A {end}", special_tokens=[(begin, 0), (end, 2)])
    names = {"cls_token": begin, "sep_token": end, "pad_token": pad, "unk_token": unknown, "mask_token": mask}
    if family != "bert":
        names |= {"bos_token": begin, "eos_token": end}
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=core, **names)
    tokenizer.save_pretrained(folder)
    architecture, more = ENCODERS[family]
    torch.manual_seed(seed)
    architecture(architecture.config_class(**{**_SIZES, "vocab_size": len(tokenizer), **more})).save_pretrained(folder)
    return folder
