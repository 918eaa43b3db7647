"""Options of constraints: forms, scopes, multipliers, confidence, and what is refused or remarked upon."""

from __future__ import annotations

from pathlib import Path

from beaver_ray.constraint_options import MultiplierConfig
from beaver_ray.method.forms import CVaR, WorstOfK
from beaver_ray.method.multipliers import make_multiplier
from beaver_ray.yaml_files import save_config
from launch.config_files import load_config
from tests.configs import error, safe_ppo


def test_forms_of_a_cost() -> None:
    assert safe_ppo().constraints[0].form == "mean"
    tail = safe_ppo("constraints.harm.form=cvar:0.875")
    assert tail.constraints[0].tail == 0.125 and tail.objective().settings.forms == {"harm": CVaR(0.875)}
    together = safe_ppo("constraints.harm.form=worst_of_k", "rollout.samples_per_prompt=2")
    assert together.objective().settings.forms == {"harm": WorstOfK(2)}
    assert "form hinge bounds the mean of max(0, cost)" in error(
        "constraints.harm.form=hinge", "constraints.harm.limit=-1"
    )
    rate = ("constraints.harm.limit=null", "constraints.harm.violation_rate=0.1", "constraints.harm.calibration=[x]")
    assert "form hinge counts costs above 0 alone" in error("constraints.harm.form=hinge", *rate)
    assert safe_ppo("constraints.harm.form=cvar:0.5", *rate).constraints[0].bound == 0.1
    grouped = ("rollout.samples_per_prompt=2", "ppo.advantage=group_standardized", "constraints.harm.form=worst_of_k")
    assert "group_standardized of each; use leave_one_out" in error(*grouped)
    for form in ("cvar:0.5", "worst_of_k"):
        several = ("rollout.samples_per_prompt=2", f"constraints.harm.form={form}")
        assert "leave ppo.replay out" in error(*several, "ppo.replay=0.5")
        assert "form mean and hinge alone" in error(*several, "constraints.harm.multiplier.initial=auto")
    shaping = ("stage=reward_shaping", "rollout.samples_per_prompt=2", "constraints.harm.form=worst_of_k")
    assert "the reward is each answer's own" in error(*shaping)


def test_what_would_never_happen_is_refused() -> None:
    assert "the policy is never trained in 3 steps" in error("ppo.critic_warmup_steps=3")
    assert safe_ppo("ppo.critic_warmup_steps=2").ppo.critic_warmup_steps == 2
    assert "set evaluation.prompts" in error("evaluation.every=2")


def test_without_critics() -> None:
    free = ("rollout.samples_per_prompt=2", "ppo.advantage=group_standardized")
    assert not safe_ppo(*free).ppo.has_critics and safe_ppo().ppo.has_critics
    assert "group_standardized has no critics to warm up" in error(*free, "ppo.critic_warmup_steps=2")
    assert "takes a reward's unit away itself" in error(*free, "ppo.normalize_rewards=0.8")
    # No critic has to start anywhere.
    elsewhere = ("models.reward=python:score.py:f", "constraints.harm.model=http://a.b/harm")
    assert "or do without critics (ppo.advantage: leave_one_out)" in error(*elsewhere)
    assert safe_ppo(*free, *elsewhere).models.reward == "python:score.py:f"
    assert "a function that scores is written" in error(*free, "models.reward=python:score.txt:f")


def test_multipliers_that_start_by_themselves(tmp_path: Path) -> None:
    auto = "constraints.harm.multiplier.initial=auto"
    config = safe_ppo(auto)
    assert config.auto_multipliers == ["harm"] and safe_ppo().auto_multipliers == []
    save_config(config, tmp_path / "f.yaml")
    assert load_config(tmp_path / "f.yaml") == config
    assert safe_ppo("stage=ppo", auto).auto_multipliers == []
    assert "constraint harm: its weight is fixed; set multiplier.initial to a number" in error(
        "stage=reward_shaping", auto
    )
    assert "auto needs ppo.kl_coefficient above 0" in error(auto, "ppo.kl_coefficient=0")
    grouped = ("rollout.samples_per_prompt=2", "ppo.advantage=group_standardized")
    assert "auto is in units of scores; ppo.advantage takes these away" in error(auto, *grouped)


def test_where_a_multiplier_starts_that_says_nothing_of_it() -> None:
    assert make_multiplier(MultiplierConfig(rule="log_sgd", max=0.5)).value == 0.5
    fixed = safe_ppo("stage=reward_shaping", "constraints.harm.multiplier.initial=null").objective()
    assert fixed.weights == {"harm": 1.0}


def test_log_sgd_cannot_start_at_zero() -> None:
    rule = "constraints.harm.multiplier.rule=log_sgd"
    assert "cannot start at 0" in error(rule, "constraints.harm.multiplier.initial=0")
    assert safe_ppo(rule, "constraints.harm.multiplier.max=null").constraints[0].multiplier.max is None


def test_a_confidence_where_nothing_could_heed_it_is_refused() -> None:
    sure, few = "constraints.harm.confidence=0.9", "rollout.prompts_per_step=1"
    eight = "rollout.samples_per_prompt=8"
    refused, window = "confidence needs answers to several prompts; ", "constraints.harm.multiplier.window"
    assert f"{refused}raise rollout.prompts_per_step" in error(sure, few, "rollout.samples_per_prompt=32")
    assert f"{refused}give a multiplier.window above 8" in error(sure, few, eight, f"{window}=8")
    assert f"{refused}give a multiplier.window above 8" in error(sure, eight, f"{window}=8"), "of the last prompt alone"
    for held in ("constraints.harm.multiplier.window=9", "constraints.harm.multiplier.rule=pid"):  # pid holds 32
        assert safe_ppo(sure, few, eight, held).constraints[0].confidence == 0.9
    assert "harm: confidence puts a limit lower, and reward_shaping" in error(sure, "stage=reward_shaping")
    assert safe_ppo(sure, few, eight, "stage=ppo").constraints[0].confidence == 0.9


def test_violation_rate_needs_labelled_pairs() -> None:
    changes = ("constraints.harm.limit=null", "constraints.harm.violation_rate=0.1")
    assert "needs calibration data" in error(*changes)
    assert safe_ppo(*changes, "constraints.harm.calibration=[pairs]").constraints[0].violation_rate == 0.1


def test_a_scope_keeps_the_kinds_of_its_values() -> None:
    config = safe_ppo("constraints.harm.where={kind: [benign, 1, 2.5, true, null], level: '1', safe: false}")
    assert config.constraints[0].where == {"kind": ["benign", 1, 2.5, True, None], "level": "1", "safe": False}
    assert [type(value) for value in config.scopes["harm"]["kind"]] == [str, int, float, bool, type(None)]
    assert safe_ppo().scopes == {}


def test_two_constraints_of_one_name() -> None:
    entry = "{name: harm, model: c, limit: 0}"
    assert "different names" in error(f"constraints=[{entry}, {entry}]")


def test_a_judge_that_the_policy_is_trained_on_is_remarked_upon() -> None:
    own = "is what the policy is trained on itself, and agrees with it whatever comes; give another"
    file, reward, cost = "configs/local/safe_ppo.yaml", "evaluation.judge=r", "constraints.harm.judge=c"
    models = ["models.reward=r", "constraints.harm.model=c"]
    assert load_config(file, [*models, reward, cost]).remarks == [  # type: ignore[attr-defined]
        f"evaluation.judge {own}",
        f"the judge of constraint harm {own}",
    ]
    assert load_config(file, [*models, "evaluation.judge=c", "constraints.harm.judge=r"]).remarks == []  # type: ignore[attr-defined]


def test_constraints_that_do_nothing_are_remarked_upon() -> None:
    file = "configs/local/safe_ppo.yaml"
    assert load_config(file, ["stage=reward_shaping"]).remarks == [  # type: ignore[attr-defined]
        "constraint harm weighs 0 in the reward, and nothing holds it down: set its multiplier.initial"
    ]
    assert load_config(file, ["stage=reward_shaping", "constraints.harm.multiplier.initial=1"]).remarks == []  # type: ignore[attr-defined]
    assert load_config(file, ["steps=4"]).remarks == [  # type: ignore[attr-defined]
        "constraints.harm.multiplier.delay_steps is 4, and the run ends after 4: its multiplier never moves"
    ]
    assert load_config(file, ["steps=5"]).remarks == []  # type: ignore[attr-defined]
