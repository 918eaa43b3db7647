"""The schedule of samples: nothing is lost, nothing trained twice, no group divided, no sample older than the bound."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.driver.schedule import RolloutSchedule


class World:
    """Generators that finish in any order, late with weights or not, that come and go and give up; sizes in groups."""

    def __init__(self, schedule: RolloutSchedule, sizes: list[int], seed: int, capacity: int, coming: bool) -> None:
        self.schedule, self.sizes, self.capacity, self.coming = schedule, sizes, capacity, coming
        self.random = random.Random(seed)
        self.running: dict[str, dict[int, int]] = {}
        self.names = iter(f"g{i}" for i in range(10**6))
        self.next_sample = self.dropped = 0
        for _ in range(2):
            self.join()

    def join(self) -> None:
        name = next(self.names)
        self.running[name] = {}
        self.schedule.join(name, self.capacity)

    def resume(self) -> RolloutSchedule:
        """The schedule that goes on from a checkpoint, with as many generators that have nothing in flight."""
        old, state = self.schedule, json.loads(json.dumps(self.schedule.state_dict()))
        self.schedule = RolloutSchedule(old.steps, old.staleness, old.surplus + 1.0, old.group_size)
        self.schedule.load_state_dict(state)
        for name in self.running:
            self.running[name] = {}
            self.schedule.join(name, self.capacity)
        return self.schedule

    def select(self, step: int) -> tuple[list[int], dict[int, int]]:
        """The step's samples, as soon as they are complete, and the versions of all that was finished then."""
        for _ in range(100_000):
            if self.schedule.complete(step):
                versions = dict(self.schedule.finished)
                return self.schedule.select(step), versions
            self.move()
        raise AssertionError(f"step {step} waits in vain")

    def move(self) -> None:
        """One thing happens, at random."""
        while self.schedule.wants_samples:
            size = self.sizes[self.schedule.drawn] * self.schedule.group_size
            self.schedule.draw(range(self.next_sample, self.next_sample + size))
            self.next_sample += size
        name = self.random.choice(list(self.running))
        running = self.running[name]
        chance = self.random.random()
        if self.coming and chance < 0.1:
            self.join()
        elif self.coming and chance < 0.2 and len(self.running) > 1:
            assert sorted(self.schedule.leave(name)) == sorted(running)
            self.dropped += len(running)
            del self.running[name]
        elif self.coming and chance < 0.25 and len(self.running) > 1:
            self.schedule.retire(name)
            dropped = self.schedule.to_abort(name)
            assert sorted(dropped) == sorted(running)
            self.schedule.aborted(name, dropped)
            self.dropped += len(dropped)
            assert self.schedule.hand_out(name) == [] and self.schedule.leave(name) == []
            del self.running[name]
        elif self.coming and chance < 0.3:
            dropped = self.random.sample(sorted(running), min(2, len(running)))
            self.schedule.aborted(name, dropped)
            self.dropped += len(dropped)
            for sample in dropped:
                del running[sample]
        elif chance < 0.6:
            running |= dict.fromkeys(self.schedule.hand_out(name), self.schedule.version)
            assert len(running) <= self.capacity
        else:
            done = self.random.sample(sorted(running), self.random.randint(0, len(running)))
            self.schedule.finish(name, done, [running.pop(sample) for sample in done])
        for name, running in self.running.items():
            dropped = self.schedule.to_abort(name)
            self.schedule.aborted(name, dropped)
            for sample in dropped:
                del running[sample]


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    group=st.sampled_from([1, 1, 2, 4, 7]),
    staleness=st.integers(0, 4),
    oversample=st.sampled_from([1.0, 1.3, 2.0]),
    capacity=st.integers(1, 8),
    coming=st.booleans(),
    losing=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=200, deadline=None)
def test_every_sample_is_trained_once_with_its_group_and_none_is_too_old(
    sizes: list[int],
    group: int,
    staleness: int,
    oversample: float,
    capacity: int,
    coming: bool,
    losing: float,
    seed: int,
) -> None:
    schedule = RolloutSchedule(len(sizes), staleness, oversample, group)
    world = World(schedule, sizes, seed, capacity, coming)
    trained: list[int] = []
    for step, size in enumerate(sizes, start=1):
        chosen, versions = world.select(step)
        while world.random.random() < losing:  # some answers prove to be lost, of this step and of later ones
            for _ in range(world.random.randint(0, 20)):
                world.move()
            schedule.give_back()
            lost = world.random.sample(list(schedule.finished), min(3, len(schedule.finished)))
            schedule.lose(lost)
            world.dropped += len(lost)
            chosen, versions = world.select(step)
        assert len(chosen) == size * group
        assert set(Counter(sample // group for sample in chosen).values()) == {group}
        assert all(0 <= step - 1 - versions[sample] <= staleness for sample in chosen)
        trained += chosen
        for _ in range(world.random.randint(0, 20)):  # the step's training takes its time
            world.move()
        schedule.advance(step)
        if world.random.random() < losing:  # all processes end, and the run goes on from its checkpoint
            schedule = world.resume()
    assert Counter(trained) == Counter(range(sum(sizes) * group))
    assert schedule.waiting == 0 and not schedule.finished
    # What a step has trained on is forgotten with the next one.
    assert schedule._groups.keys() <= set(chosen) and not schedule._parted
    if staleness < 2 and oversample == 1.0:
        assert schedule.repeated == world.dropped, "nothing was thrown away for its age"


def test_synchronous_steps_train_on_their_own_samples_alone() -> None:
    schedule = RolloutSchedule(steps=2)
    schedule.join("a", 10)
    assert schedule.wants_samples
    schedule.draw([0, 1, 2])
    assert not schedule.wants_samples
    assert schedule.hand_out("a") == [0, 1, 2]
    assert schedule.finish("a", [2, 0], [0, 0]) == [2, 0]
    assert not schedule.complete(1)
    schedule.finish("a", [1], [0])
    assert schedule.complete(1) and schedule.select(1) == [2, 0, 1]
    assert not schedule.wants_samples
    schedule.advance(1)
    schedule.draw([3])
    assert schedule.hand_out("a") == [3] and not schedule.wants_samples


def test_one_step_ahead_waits_for_the_long_answer_at_its_deadline_only() -> None:
    schedule = RolloutSchedule(steps=4, staleness=1)
    schedule.join("a", 10)
    for first in (0, 2):
        schedule.draw([first, first + 1])
    assert not schedule.wants_samples
    assert schedule.hand_out("a") == [0, 1, 2, 3]
    schedule.finish("a", [1, 2], [0, 0])
    # Sample 0 is long. Step 1 goes on without it, with a sample that was drawn for step 2.
    assert schedule.complete(1) and schedule.select(1) == [1, 2]
    schedule.advance(1)
    schedule.draw([4, 5])
    assert schedule.hand_out("a") == [4, 5]
    schedule.finish("a", [3, 4, 5], [0, 1, 1])
    # In step 3 it would be two versions old: step 2 waits for it, though three others are there.
    assert not schedule.complete(2)
    schedule.finish("a", [0], [0])
    assert schedule.complete(2) and schedule.select(2) == [3, 0]


def test_a_step_takes_whole_groups_though_others_have_finished_first() -> None:
    schedule = RolloutSchedule(steps=3, staleness=1, group_size=2)
    schedule.join("a", 10)
    for first in (0, 4):
        schedule.draw(range(first, first + 4))
    assert schedule.hand_out("a") == [0, 1, 2, 3, 4, 5, 6, 7]
    # Four answers are there, of four prompts; then those of the third and of the first prompt are all there.
    schedule.finish("a", [0, 2, 4, 6], [0] * 4)
    assert not schedule.complete(1)
    schedule.finish("a", [5, 1], [0, 0])
    assert schedule.complete(1) and schedule.select(1) == [4, 5, 0, 1]
    assert schedule.state_dict()["pending"] == [2, 3, 6, 7]


def test_a_group_is_as_old_as_its_oldest_sample_and_its_step_waits_for_the_rest() -> None:
    schedule = RolloutSchedule(steps=3, staleness=1, group_size=2)
    schedule.join("a", 3)
    for first in (0, 2):
        schedule.draw([first, first + 1])
    assert schedule.hand_out("a") == [0, 1, 2]
    schedule.finish("a", [0, 1, 2], [0, 0, 0])
    assert schedule.select(1) == [0, 1]
    schedule.advance(1)
    schedule.draw([4, 5])
    assert schedule.hand_out("a") == [3, 4, 5]
    # Step 2 has a whole group, but sample 2 would be two versions old in step 3 and waits for sample 3.
    schedule.finish("a", [4, 5], [1, 1])
    assert not schedule.complete(2)
    schedule.aborted("a", [3])
    assert not schedule.complete(2) and schedule.hand_out("a") == [3]
    schedule.finish("a", [3], [1])
    assert schedule.complete(2) and schedule.select(2) == [2, 3]
    assert schedule.select(3) == [4, 5]


def test_oversampling_repeats_only_what_is_too_old_and_the_rest_of_the_group_waits() -> None:
    schedule = RolloutSchedule(steps=3, staleness=1, oversample=1.5, group_size=2)
    schedule.join("a", 7)
    for first in (0, 4, 8):
        schedule.draw(range(first, first + 4))
    assert schedule.hand_out("a") == [0, 1, 2, 3, 4, 5, 6]
    schedule.finish("a", [0, 2, 3, 4, 5, 6], [0] * 6)
    assert schedule.select(1) == [2, 3, 4, 5]
    schedule.advance(1)
    # Of the groups (0, 1) and (6, 7) one sample each is finished, at version 0; 1 is in flight.
    assert schedule.hand_out("a") == [7, 8, 9, 10, 11]  # with a whole group more than the two of each step
    schedule.finish("a", [8, 9, 10, 11], [1] * 4)
    assert schedule.complete(2) and schedule.select(2) == [8, 9, 10, 11]
    # In step 3 they would be two versions old. What is in flight at version 1 may go on.
    assert schedule.to_abort("a") == [1] and list(schedule.finished) == [] and schedule.repeated == 2
    schedule.aborted("a", [1])
    schedule.advance(2)
    assert schedule.hand_out("a") == [1, 0, 6]
    schedule.finish("a", [7, 0, 1, 6], [1, 2, 2, 2])
    # Sample 7 is the oldest.
    assert schedule.select(3) == [6, 7, 0, 1]


def test_oversampling_starts_whole_groups() -> None:
    schedule = RolloutSchedule(steps=2, oversample=1.3, group_size=2)
    schedule.join("a", 100)
    schedule.draw(range(4))
    schedule.draw(range(4, 8))
    assert schedule.hand_out("a") == [0, 1, 2, 3, 4, 5]


def test_a_lost_answer_keeps_the_others_of_its_group_waiting() -> None:
    schedule = RolloutSchedule(steps=2, staleness=1, group_size=2)
    schedule.join("a", 8)
    for first in (0, 2):
        schedule.draw([first, first + 1])
    schedule.finish("a", schedule.hand_out("a"), [0] * 4)
    assert schedule.select(1) == [0, 1]
    schedule.give_back()
    schedule.lose([1])
    # Step 1 takes the group that is still whole. In step 2 the rest of the other one has its last chance.
    assert schedule.complete(1) and schedule.select(1) == [2, 3]
    schedule.advance(1)
    assert not schedule.complete(2) and schedule.hand_out("a") == [1]
    schedule.finish("a", [1], [1])
    assert schedule.select(2) == [0, 1] and schedule.repeated == 1


def test_half_a_group_cannot_be_drawn() -> None:
    with pytest.raises(ValueError, match="5 samples are not whole groups of 2"):
        RolloutSchedule(steps=1, group_size=2).draw(range(5))


def test_oversampling_aborts_the_tail_and_asks_again() -> None:
    schedule = RolloutSchedule(steps=2, oversample=1.5)
    schedule.join("a", 10)
    schedule.draw([0, 1])
    schedule.draw([2, 3])
    assert schedule.hand_out("a") == [0, 1, 2]  # half as many again as the two of step 1
    schedule.finish("a", [2, 1], [0, 0])
    assert schedule.to_abort("a") == []
    assert schedule.select(1) == [2, 1]
    assert schedule.to_abort("a") == [0]
    schedule.aborted("a", [0])
    schedule.advance(1)
    assert schedule.hand_out("a") == [0, 3]
    assert schedule.repeated == 1


def test_a_lost_generators_samples_go_first_to_another() -> None:
    schedule = RolloutSchedule(steps=1)
    schedule.join("a", 2)
    schedule.join("b", 2)
    schedule.draw(range(5))
    assert schedule.hand_out("a") == [0, 1] and schedule.hand_out("b") == [2, 3]
    schedule.finish("b", [2, 3], [0, 0])
    assert schedule.leave("a") == [0, 1]
    assert schedule.hand_out("b") == [0, 1]


def test_a_lost_answer_is_given_again_before_its_step_is_trained() -> None:
    schedule = RolloutSchedule(steps=2)
    schedule.join("a", 4)
    schedule.draw([0, 1, 2])
    schedule.hand_out("a")
    schedule.finish("a", [0, 1, 2], [0, 0, 0])
    assert schedule.select(1) == [0, 1, 2]
    schedule.give_back()
    schedule.lose([1])
    assert not schedule.complete(1) and schedule.hand_out("a") == [1]
    schedule.finish("a", [1], [0])
    assert schedule.select(1) == [0, 2, 1] and schedule.repeated == 1
    assert schedule.state_dict()["pending"] == []


def test_no_step_waits_for_a_version_under_which_nothing_was_started() -> None:
    schedule = RolloutSchedule(steps=3, staleness=1)
    schedule.join("a", 2)
    schedule.draw([0, 1])
    schedule.draw([2, 3])
    assert schedule.hand_out("a") == [0, 1]
    schedule.finish("a", [0, 1], [0, 0])
    assert schedule.hand_out("a") == [2, 3] and schedule.select(1) == [0, 1]
    schedule.advance(1)
    schedule.draw([4, 5])
    # All places are taken for as long as version 1 is the newest.
    assert schedule.waiting == 2 and schedule.hand_out("a") == []
    schedule.finish("a", [2, 3], [0, 0])
    assert schedule.select(2) == [2, 3]
    schedule.advance(2)
    schedule.finish("a", schedule.hand_out("a"), [2, 2])
    assert schedule.complete(3) and schedule.select(3) == [4, 5]


def test_prompts_are_shared_out_evenly() -> None:
    schedule = RolloutSchedule(steps=1)
    for name in "abc":
        schedule.join(name, 100)
    schedule.draw(range(10))
    assert [len(schedule.hand_out(name)) for name in "abc"] == [4, 4, 2]


def test_who_leaves_has_no_share() -> None:
    schedule = RolloutSchedule(steps=1)
    for name in "abc":
        schedule.join(name, 100)
    schedule.draw(range(10))
    schedule.retire("b")
    assert [len(schedule.hand_out(name)) for name in "abc"] == [5, 0, 5]


def test_a_sample_under_older_weights_than_promised_is_a_bug() -> None:
    schedule = RolloutSchedule(steps=2)
    schedule.join("a", 2)
    schedule.advance(1)
    schedule.draw([0])
    schedule.hand_out("a")
    with pytest.raises(RuntimeError, match="a started sample 0 under version 0, not 1"):
        schedule.finish("a", [0], [0])
