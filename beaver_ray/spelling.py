"""Characters that are written in several ways, in one."""

from __future__ import annotations

import unicodedata

_APOSTROPHES = str.maketrans(dict.fromkeys("\u2018\u2019\u02bc\u00b4", "'"))
_SIMPLIFIED = str.maketrans(
    "無為協幫對請問題這個類種應該說違內們絕給參與討論編寫滿執實動沒辦願難繼續議語處據讓還將會當於僅諮詢專業醫師構斷風險後負規學習娛樂聯尋務時診見",
    "无为协帮对请问题这个类种应该说违内们绝给参与讨论编写满执实动没办愿难继续议语处据让还将会当于仅咨询专业医师构断风险后负规学习娱乐联寻务时诊见",
)


def alike(text: str) -> str:
    """Apostrophes as on a keyboard, letters and signs of one width, each with its accents in one character."""
    return unicodedata.normalize("NFKC", text.translate(_APOSTROPHES))


def simplified(text: str) -> str:
    """Those traditional Chinese characters that phrases of rules/refusals.py and disclaimers.py have, simplified."""
    return text.translate(_SIMPLIFIED)
