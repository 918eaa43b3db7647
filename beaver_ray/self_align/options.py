"""The options of stages self_instruct and self_align, and what follows from them alone.

Nothing heavy is imported here: the command line reads this module first.
"""

from __future__ import annotations

import re
from typing import Literal

from pydantic import field_validator, model_validator

from beaver_ray.config import TextSamplingConfig
from beaver_ray.data_options import DataSpec
from beaver_ray.judge_options import FolderOrService, JudgeOptions
from beaver_ray.options import Strict, option
from beaver_ray.stage import Lengths, TemplatedStage
from beaver_ray.template_options import TemplateOptions

BLACKLIST = [
    *("image", "images", "picture", "pictures", "photo", "graph", "graphs", "chart", "diagram", "flowchart"),
    *("map", "maps", "file", "files", "draw", "plot", "sketch", "video", "videos", "audio", "music"),
]


class AskingConfig(TemplatedStage):
    """What stages share that ask one model many texts."""

    model: FolderOrService = option("Who writes: a model's folder, or {address, model} of a service.")
    form: Literal["completion", "chat"] = option(
        "completion: a model without tuning goes on with the text; chat: the text is a user's turn.", "completion"
    )
    rollout: TextSamplingConfig = option("Sampling; of a service its own options.", default_factory=TextSamplingConfig)
    max_prompt_tokens: int = option(
        "Longest text that a folder's model is asked; longer ones are left out, with a count. A service is asked all.",
        3072,
        gt=0,
    )
    template: TemplateOptions = option(
        "Of form chat, how a prompt is written: auto, chat or beaver, or {style, system, arguments}.", TemplateOptions()
    )
    trust_remote_code: bool = option("Run Python code that a model folder brings along.", False)

    @model_validator(mode="after")
    def _services_chat(self) -> AskingConfig:
        if isinstance(self.model, JudgeOptions) and self.form == "completion":
            raise ValueError("a service is asked in chats; set form: chat")
        return self

    def lengths(self) -> Lengths:
        """Of a text and its reply."""
        prompt, reply = self.max_prompt_tokens, self.rollout.max_new_tokens
        options = f"max_prompt_tokens {prompt} and rollout.max_new_tokens {reply}"
        return Lengths(prompt + reply, options, "lower them")


class InstructionFilters(Strict):
    """Which written instructions and topics are kept."""

    fewest_words: int = option("An instruction has so many words at least.", 4, ge=1)
    most_words: int = option("And so many at most, its input included.", 150, ge=1)
    blacklist: list[str] = option(
        "Words and phrases of what text cannot give; an instruction with one is left out.",
        default_factory=lambda: list(BLACKLIST),
    )
    any_script: bool = option(
        "Keep what begins with a letter beyond ASCII, as in other languages, and topics without capitals.", False
    )
    rouge_max: float = option("Highest ROUGE-L (F) with anything in the pool.", 0.7, ge=0, lt=1)
    topic_words: int = option("A topic has so many words at most.", 3, ge=1)


class SelfInstructConfig(AskingConfig):
    """Options of stage self_instruct."""

    seeds: str | None = option("YAML file of seed tasks; null for ours (175).", None)
    types: str | None = option("YAML file of kinds of question; null for ours (20).", None)
    vanilla: int = option("Instructions wanted from seed tasks; rounds end when they are there.", 500, ge=0)
    by_topic: int = option("Instructions wanted from kinds and topics.", 250, ge=0)
    topics: int = option("Topics wanted of each kind; no kind has more.", 10, ge=1)
    shown: int = option("Examples in a request.", 5, ge=1)
    tasks_asked: int = option("Tasks asked for in a request of the vanilla rounds.", 15, ge=1)
    topics_asked: int = option("Topics asked for in a request.", 10, ge=1)
    hints: int = option("Kinds and topics in a request for questions.", 5, ge=1)
    requests: int = option("Requests in one round, after which what was written is kept.", 64, ge=1)
    most_rounds: int = option("Rounds of each sort, at most.", 50, ge=1)
    filters: InstructionFilters = option("What is kept.", default_factory=InstructionFilters)

    @model_validator(mode="after")
    def _wants_something(self) -> SelfInstructConfig:
        if self.vanilla + self.by_topic == 0:
            raise ValueError("nothing is wanted; give vanilla or by_topic a number above 0")
        return self

    @property
    def data_sets(self) -> tuple[list[DataSpec], list[DataSpec]]:
        """None: it begins with its own files."""
        return [], []


class Tags(Strict):
    """What stands before each part of a dialogue in the context."""

    user: str = option("Before what the user says.", "### User", min_length=1)
    thoughts: str = option("Before what the assistant thinks.", "### Assistant thinks", min_length=1)
    answer: str = option("Before what the assistant answers.", "### Assistant says", min_length=1)

    @model_validator(mode="after")
    def _are_told_apart(self) -> Tags:
        tags = [self.user, self.thoughts, self.answer]
        if any(one in other for place, one in enumerate(tags) for other in tags[:place] + tags[place + 1 :]):
            raise ValueError(f"no tag may be part of another, as one of {tags} is; change it")
        return self


class AnswerFilters(Strict):
    """Which answers are kept, in this order; a filter that is off (null, 0, false, []) lets everything pass."""

    opening: str | None = option(
        "How thoughts must begin; null for any beginning.",
        "I think before I answer, as a helpful and honest assistant does.",
    )
    needs_answer: bool = option("Leave out replies without the tag of an answer; else all of it is the answer.", True)
    allow_cut: bool = option("Keep answers that were cut at rollout.max_new_tokens.", False)
    strip: list[str] = option(
        "Regular expressions; what matches at an answer's beginning is taken off.",
        default_factory=lambda: [r"(?:According to|As stated (?:in|on)) (?:the )?Wikipedia(?: article)?[^,.:]*[,:]\s*"],
    )
    min_chars: int = option("Shortest answer.", 160, ge=0)
    repeats: bool = option("Leave out answers that say a clause of four words or more twice.", True)
    starts: list[str] = option(
        "Beginnings of answers that are left out.", default_factory=lambda: ["I'm sorry", "I am sorry", "Sorry,"]
    )
    blacklist: list[str] = option("Phrases of answers that are left out.", default_factory=list)
    copies: bool = option("Leave out answers that say a sentence of an exemplar's answer (six words or more).", True)

    @field_validator("strip")
    @classmethod
    def _are_patterns(cls, value: list[str]) -> list[str]:
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
        return value


class Identity(Strict):
    """Rows in which the assistant says who it is."""

    rows: int = option("How many; 0 for none. They go round the questions that there are.", 0, ge=0)
    maker: str = option("Who made the assistant.", "its developers", min_length=1)


class SystemTexts(Strict):
    """System texts before pairs, so that what is engraved holds behind others as well."""

    share: float = option("Share of the pairs that get one; the seed decides which.", 0.0, ge=0, le=1)
    file: str | None = option("YAML file of texts; null for ours (16).", None)


class SelfAlignConfig(AskingConfig):
    """Options of stage self_align."""

    prompts: list[DataSpec] = option("What is answered (NAME[:PROPORTION[:PATH]], or a mapping).", min_length=1)
    principles: str | None = option("YAML file of principles; null for ours (16).", None)
    exemplars: str | None = option("YAML file of exemplars; null for ours (5).", None)
    context: str | None = option("Jinja file of what stands before the dialogues; null for ours.", None)
    assistant: str = option("The assistant's name.", "Beaver", min_length=1)
    tags: Tags = option("Between the parts of a dialogue.", default_factory=Tags)
    filters: AnswerFilters = option("What is kept.", default_factory=AnswerFilters)
    identity: Identity = option("Rows in which the assistant says who it is.", default_factory=Identity)
    system_texts: SystemTexts = option(
        "System texts before a share of the pairs, so that what is engraved holds behind others as well.",
        default_factory=SystemTexts,
    )

    @property
    def data_sets(self) -> tuple[list[DataSpec], list[DataSpec]]:
        """What is answered."""
        return self.prompts, []
