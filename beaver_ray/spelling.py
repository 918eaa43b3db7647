"""Characters that are written in several ways, in one."""

from __future__ import annotations

import re
import unicodedata

import regex

UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
"""A letter of Chinese, Japanese, Thai, Lao, Khmer or Burmese, which write no spaces between words."""
# A letter goes with the signs above and below it: vowels and tones of Indian and South-East Asian scripts, accents.
_WORD = regex.compile(rf"{UNSPACED}\p{{M}}*|(?:(?!{UNSPACED})[\p{{L}}\p{{N}}_][\p{{M}}\u200c\u200d]*)+")
_ASCII_WORD = re.compile(r"\w+", re.ASCII)
_APOSTROPHES = str.maketrans(dict.fromkeys("\u2018\u2019\u02bc\u00b4", "'"))
_SIMPLIFIED = str.maketrans(
    "無為協幫對請問題這個類種應該說違內們絕給參與討論編寫滿執實動沒辦願難繼續議語處據讓還將會當於僅諮詢專業醫師構斷風險後負規學習娛樂聯尋務時診見",
    "无为协帮对请问题这个类种应该说违内们绝给参与讨论编写满执实动没办愿难继续议语处据让还将会当于仅咨询专业医师构断风险后负规学习娱乐联寻务时诊见",
)


def alike(text: str) -> str:
    """Apostrophes as on a keyboard, letters and signs of one width, each with its accents in one character."""
    return unicodedata.normalize("NFKC", text.translate(_APOSTROPHES))


def words(text: str) -> list[str]:
    """The words of a text in lower case and in one spelling (`alike`): runs of letters and digits; of scripts without
    spaces each letter, with the signs that belong to it."""
    return _ASCII_WORD.findall(text.lower()) if text.isascii() else _WORD.findall(alike(text).lower())


def simplified(text: str) -> str:
    """Those traditional Chinese characters that phrases of rules/refusals.py and disclaimers.py have, simplified."""
    return text.translate(_SIMPLIFIED)
