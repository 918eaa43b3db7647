"""Several answers to every prompt, of one model or of several mixed, and pairs of them to be labelled.

final/answers.jsonl has every answer, final/pairs.jsonl the pairs (`beaver_ray.data.pairs`), final/manifest.json what
they were made from. Prompts are answered in blocks that are kept in answers/, so that a resumed run answers what is
left.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import model_validator

from actors.driver.policy_stage import generator_role
from beaver_ray.config import TextSamplingConfig
from beaver_ray.data_options import DataSpec
from beaver_ray.errors import UserError
from beaver_ray.json_files import json_line, write_rows
from beaver_ray.options import option
from beaver_ray.stage import Lengths, ModelUse, RoleSpec, TemplatedStage
from beaver_ray.template_options import TemplateOptions

if TYPE_CHECKING:
    import numpy as np

    from actors.driver.processes import Roles
    from actors.roles.generator import GeneratorSpec
    from beaver_ray.data.readers import Reader
    from beaver_ray.data.tokenized import PromptDataset
    from beaver_ray.report.charts import Card, Chart
    from beaver_ray.runs import RunFolder

BLOCK = 512
"""Prompts whose answers are kept together."""


class Generate(TemplatedStage):
    """Options of stage generate."""

    kinds: ClassVar[tuple[str, ...]] = ("rollout",)

    stage: Literal["generate"] = option("Sample answers and draw pairs of them.")
    policies: list[str] = option(
        "Folders of models; each answers every prompt, once if it is named twice.", min_length=1
    )
    prompts: list[DataSpec] = option("Prompts (NAME[:PROPORTION[:PATH]], or a mapping).", min_length=1)
    max_prompt_tokens: int = option("Longer prompts are dropped, with a count.", 512, gt=0)
    answers: int = option("Answers of each model to each prompt.", 4, gt=0)
    pairs: int = option(
        "Pairs drawn from a prompt's answers, as far as there are different ones; 0 for answers alone.", 2, ge=0
    )
    rollout: TextSamplingConfig = option("Sampling.", default_factory=TextSamplingConfig)
    template: TemplateOptions = option(
        "How a prompt is written: auto, chat or beaver, or {style, system, arguments}.", TemplateOptions()
    )
    trust_remote_code: bool = option("Run Python code that a model folder brings along.", False)

    @model_validator(mode="after")
    def _makes_pairs(self) -> Generate:
        if self.pairs and self.answers * len(self.models) < 2:
            raise ValueError(
                "one answer to a prompt is no pair; raise answers to 2 at least, name a second policy, or set pairs: 0"
            )
        return self

    @property
    def models(self) -> list[str]:
        """The folders of ``policies``, each once."""
        return list(dict.fromkeys(self.policies))

    def roles(self) -> list[RoleSpec]:
        """The generators, which hold one model after the other."""
        return [self._generator(range(len(self.models)))]

    def _generator(self, numbers: Sequence[int]) -> RoleSpec:
        """The generators of these models, which start with the first of them."""
        policy, trust = self.models[numbers[0]], self.trust_remote_code

        def spec() -> GeneratorSpec:
            from actors.driver.processes import sampling_spec

            return sampling_spec(self, policy, self.rollout, self.max_prompt_tokens, self.template, trust)

        uses = tuple(ModelUse(f"policies.{number}", self.models[number]) for number in numbers)
        return generator_role(self, self.rollout, spec, uses)

    def run(self, run: RunFolder) -> None:
        """Let every model answer, draw the pairs, and write both."""
        from beaver_ray.data.mixing import load_mix
        from beaver_ray.data.pairs import draw_pairs
        from beaver_ray.fit import check_there_and_fit
        from beaver_ray.manifest import write_stage_manifest

        run.note(*check_there_and_fit(self))
        samples, reports = load_mix(self.prompts)
        for label, report in reports.items():
            run.note(f"{label}: {report.line()}")
        run.rewind(0)  # figures of the blocks that are there already are logged again
        rows: list[dict[str, Any]] = []
        blocks = 0
        for number in range(len(self.models)):
            answered = self._answers_of(number, samples, run, blocks)
            blocks += len(answered)
            rows += [row for block in answered for row in block]
        pairs, left_out = draw_pairs(rows, self.pairs, self.seed)
        counts = {"answers": len(rows), "pairs": len(pairs), **left_out}
        run.note(", ".join(f"{count} {what}" for what, count in counts.items()))
        if self.pairs and not pairs:
            raise UserError(
                f"no prompt has two different whole answers ({dict(left_out)}); raise rollout.max_new_tokens"
            )
        folder = run.folder / "final.part"
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier start, which may have drawn pairs
        write_rows(folder / "answers.jsonl", rows)
        if pairs:
            write_rows(folder / "pairs.jsonl", pairs)
        write_stage_manifest(self, folder, counts)

    def _answers_of(
        self, number: int, samples: Sequence[Any], run: RunFolder, before: int
    ) -> list[list[dict[str, Any]]]:
        """The answers of one model, block by block; those that an earlier start has left are read.

        before: blocks of the models before, so that each block is a step of its own in metrics.jsonl.
        """
        from actors.driver.evaluate import judging
        from actors.driver.kept_answers import KeptAnswers
        from beaver_ray.data.readers import Reader
        from beaver_ray.data.tokenized import PromptDataset
        from beaver_ray.models.loading import load_tokenizer

        policy = self.models[number]
        tokenizer = load_tokenizer(policy, self.trust_remote_code)
        reader = Reader(tokenizer, self.template)
        prompts = PromptDataset.build(samples, tokenizer, self.max_prompt_tokens, self.template)
        run.note(f"{policy}: prompts {prompts.report.line()}")
        kept = KeptAnswers(
            run=run,
            title=f"answers of {policy}",
            folder=run.folder / "answers" / f"{number}-{self._key(policy, prompts)}",
            prompts=len(prompts),
            answers=self.answers,
            block=BLOCK,
            before=before,
        )
        return kept.rows(
            start=lambda: judging(self, [self._generator([number])]),
            ask=lambda some, roles: self._sample(number, some, prompts, reader, roles),
            figures=_repeated,
        )

    def _sample(
        self, number: int, some: range, prompts: PromptDataset, reader: Reader, roles: Roles
    ) -> list[dict[str, Any]]:
        """The answers to some of the prompts, in order.

        A sample's random numbers depend on the seed, the model's number and the prompt's, and not on the block.
        """
        import numpy as np
        import pyarrow.compute as pc

        from actors.driver.evaluate import answers_to
        from actors.driver.rollouts import Rollouts
        from beaver_ray import experience

        prompt_ids = np.repeat(np.arange(some.start, some.stop), self.answers)
        place = prompt_ids * self.answers + np.tile(np.arange(self.answers), len(some))
        batch = experience.make_batch(
            {
                "sample_id": (number << 40) + place,
                "prompt_id": prompt_ids,
                "prompt_tokens": [prompts.prompts[int(i)] for i in prompt_ids],
            }
        )
        rollouts = Rollouts(roles.rollout, self.rollout.max_sequences, self.cluster.step_timeout)
        columns = ["sample_id", "prompt_id", "response_tokens", "finish_reason"]
        answered = answers_to(batch, columns, roles, rollouts)
        answered = answered.take(pc.sort_indices(answered.column("sample_id")))
        tokens, cut = experience.rows(answered, "response_tokens"), experience.truncated(answered).tolist()
        ids = experience.scalars(answered, "prompt_id").tolist()
        return [
            self._asked(prompts.samples[prompt])
            | {
                "temperature": self.rollout.temperature,
                "response": reader.answer_text(answer, not truncated),
                "model": self.models[number],
                "truncated": truncated,
                "tokens": len(answer),
            }
            for prompt, answer, truncated in zip(ids, tokens, cut, strict=True)
        ]

    def _asked(self, sample: Any) -> dict[str, Any]:
        """What a row says of its prompt: also what it is about, where the data say so."""
        from beaver_ray.data.survey import CATEGORIES

        about = {name: sample.fields[name] for name in CATEGORIES if sample.fields.get(name) is not None}
        return {"prompt": sample.input, **sample.system_row, **about}

    @property
    def _nucleus(self) -> list[float]:
        """top_p where it changes anything; without it, blocks of answers have the names that they always had."""
        return [self.rollout.top_p] if self.rollout.top_p < 1 else []

    def _key(self, policy: str, prompts: PromptDataset) -> str:
        """Equal where answers that an earlier start has left are those that this one would give."""
        from beaver_ray.models.folders import fingerprint

        part = self.model_dump(mode="json", include={"answers", "template", "seed", "debug"})
        part |= {"rollout": [self.rollout.max_new_tokens, self.rollout.temperature, *self._nucleus]}
        digest = hashlib.blake2b((fingerprint(policy, self.engine.dtype) + json.dumps(part)).encode(), digest_size=8)
        for sample in prompts.samples:  # and not the name of their file, which may hold others by now
            digest.update(json_line(self._asked(sample)).encode())
        return digest.hexdigest()

    def lengths(self) -> Lengths:
        """Of a prompt and its answer."""
        prompt, answer = self.max_prompt_tokens, self.rollout.max_new_tokens
        options = f"max_prompt_tokens {prompt} and rollout.max_new_tokens {answer}"
        return Lengths(prompt + answer, options, "lower them")

    @property
    def data_sets(self) -> tuple[list[DataSpec], list[DataSpec]]:
        """The prompts."""
        return self.prompts, []

    def headlines(self) -> list[str]:
        """Where the pairs are."""
        made = self.folder / "final" / ("pairs.jsonl" if self.pairs else "answers.jsonl")
        return [f"{made.stem}: {made}"] if made.is_file() else []

    def charts(self, metrics: dict[str, np.ndarray]) -> list[Chart]:
        """Lengths and what is of no use, block by block."""
        from beaver_ray.report.charts import Chart, Panel, Series, drawable

        shares = [Series(key.replace("_", " "), metrics[key]) for key in ("cut", "repeated") if key in metrics]
        return drawable(
            [
                Chart("Length", "Mean tokens of an answer.", [Panel("tokens", [Series("tokens", metrics["tokens"])])]),
                Chart("Of no use", "Answers cut at their longest; repeating another.", [Panel("share", shares)]),
            ]
        )

    def cards(self, metrics: dict[str, np.ndarray], evaluation: dict[str, Any]) -> list[Card]:
        """How many answers there are, and how many are alike."""
        from beaver_ray.report.charts import Card

        total = metrics["answers"].sum()
        repeated = float((metrics["repeated"] * metrics["answers"]).sum() / total)
        return [
            Card("Answers", f"{int(total):,}", f"of {len(self.models)} models"),
            Card("Repeated", f"{repeated:.1%}", "answers that say what another of their prompt says"),
        ]


def _repeated(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The share of a block's answers that repeat another to the same prompt, under the same system text."""
    different = {(json.dumps([row["prompt"], row.get("system")]), row["response"].strip()) for row in rows}
    return {"repeated": 1 - len(different) / len(rows)}
