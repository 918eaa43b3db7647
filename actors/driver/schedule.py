"""Which prompts may start, which generator gets them, and which finished samples a step trains on.

A pure state machine: it knows sample ids, names of generators and numbers of versions, no process and no token. The
samples of one prompt are a group, and a step trains on whole groups. Before that each sample goes its own way: those of
a group may come from several generators and versions, and one that is lost is asked for again alone. A group is whole
when all its samples are finished.

Step s trains on as many groups as were drawn for it and makes weights version s; a sample started under version v is
s - 1 - v versions old when step s trains on it, and a group as old as its oldest sample. Two rules keep that age at or
below `staleness` for every sample:

admission   while `version` is the newest, no more groups are started than steps 1 to version + 1 + staleness take;
deadline    a step waits for all groups with a sample, finished or in flight, that would be too old for the next one; it
            takes these first, then others in the order in which they became whole.

With oversampling some more groups are started, a step takes the first that are whole, and what grows too old, in flight
or finished, is asked again under newer weights; the rest of its group waits for it. That favours short answers, as
every such scheme does.

No step waits in vain: whole groups are admitted, and what is to be repeated may always start, so every group that was
begun becomes whole.

All costs are per sample or per call of one generator, whatever the number of generators.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class GeneratorState:
    """A generator as the schedule sees it: `in_flight` maps its samples to the version they were started under."""

    capacity: int
    in_flight: dict[int, int] = field(default_factory=dict)
    leaving: bool = False


@dataclass(eq=False)
class SampleGroup:
    """The samples of one prompt; so many of them are ``missing``, which are not finished."""

    samples: list[int]
    missing: int


class RolloutSchedule:
    """The samples of a whole run on their way from prompt to training, in groups; see the module's text."""

    def __init__(self, steps: int, staleness: int = 0, oversample: float = 1.0, group_size: int = 1) -> None:
        self.steps, self.staleness, self.surplus, self.group_size = steps, staleness, oversample - 1.0, group_size
        self.version = 0
        self.trained = 0
        """The last step whose samples were selected."""
        self.repeated = 0
        """Samples that were aborted or lost and asked again."""
        self.generators: dict[str, GeneratorState] = {}
        self.finished: dict[int, int] = {}
        """Samples that wait for a step, in the order in which they finished, with their version."""
        self._ends: list[int] = []  # samples drawn up to and including each step
        self._fresh: deque[int] = deque()
        self._again: deque[int] = deque()
        self._started = 0
        self._flying: Counter[int] = Counter()  # samples in flight of each version
        self._parted: Counter[int] = Counter()  # finished samples of each version whose groups are not whole
        self._groups: dict[int, SampleGroup] = {}  # of each sample that was drawn and not trained on
        self._whole: dict[SampleGroup, None] = {}  # groups that wait for a step, in the order of becoming whole
        self._taken: dict[int, int] = {}  # samples of the last step that was selected, with their version
        self._leaving: set[str] = set()

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands after a step: what `load_state_dict` goes on from, as plain values.

        ``pending`` are the samples that were drawn and not trained on, whole groups; they start anew.
        """
        untrained = {*self._again, *self._fresh, *self.finished}
        untrained |= {sample for state in self.generators.values() for sample in state.in_flight}
        state = {"trained": self.trained, "ends": list(self._ends), "repeated": self.repeated}
        return state | {"pending": sorted(untrained)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the step in which `state_dict` was taken, its weights being the newest."""
        self.trained = self.version = int(state["trained"])
        self.repeated, self._ends = int(state["repeated"]), list(state["ends"])
        self._add(state["pending"])
        self._started = (self._ends[-1] if self._ends else 0) - len(self._fresh)

    # What the data give.

    @property
    def drawn(self) -> int:
        """Steps whose samples were drawn."""
        return len(self._ends)

    @property
    def wants_samples(self) -> bool:
        """Whether the samples of the next step should be drawn from the data now."""
        return self.drawn < min(self.steps, self.version + 1 + self.staleness + (self.surplus > 0))

    def draw(self, samples: Iterable[int]) -> None:
        """The samples of the next step in rising order, those of a group side by side."""
        ids = list(samples)
        self._ends.append(len(ids) + (self._ends[-1] if self._ends else 0))
        self._add(ids)

    def _add(self, samples: list[int]) -> None:
        if len(samples) % self.group_size:
            raise ValueError(f"{len(samples)} samples are not whole groups of {self.group_size}")
        for first in range(0, len(samples), self.group_size):
            group = SampleGroup(samples[first : first + self.group_size], self.group_size)
            self._groups.update(dict.fromkeys(group.samples, group))
        self._fresh.extend(samples)

    @property
    def waiting(self) -> int:
        """Samples that may be started now and are not."""
        return len(self._again) + min(len(self._fresh), self._allowed - self._started)

    @property
    def _allowed(self) -> int:
        step = min(self.version + 1 + self.staleness, self.drawn)
        if not step:
            return 0
        return self._ends[step - 1] + round(self.surplus * self._size(step) / self.group_size) * self.group_size

    def _size(self, step: int) -> int:
        return self._ends[step - 1] - (self._ends[step - 2] if step > 1 else 0)

    # Generators.

    def join(self, generator: str, capacity: int) -> None:
        """A generator takes part from now on."""
        self.generators[generator] = GeneratorState(capacity)
        self._leaving.discard(generator)

    def retire(self, generator: str) -> None:
        """A generator gets no more samples; those in flight are to be aborted."""
        self.generators[generator].leaving = True
        self._leaving.add(generator)

    def leave(self, generator: str) -> list[int]:
        """A generator is gone; its samples, which are returned, wait again in front of all others."""
        state = self.generators.pop(generator)
        self._leaving.discard(generator)
        self._flying -= Counter(state.in_flight.values())
        lost = list(state.in_flight)
        self._repeat(lost)
        return lost

    def hand_out(self, generator: str) -> list[int]:
        """Samples that this generator starts now, under the newest version, which it must load before them."""
        state = self.generators[generator]
        waiting = self.waiting
        if state.leaving or not waiting:
            return []
        # An even share: no generator hoards prompts while another has none.
        share = -(-(waiting + self._flying.total()) // (len(self.generators) - len(self._leaving)))
        count = min(waiting, min(state.capacity, share) - len(state.in_flight))
        if count <= 0:
            return []
        samples = [self._again.popleft() for _ in range(min(count, len(self._again)))]
        fresh = [self._fresh.popleft() for _ in range(count - len(samples))]
        self._started += len(fresh)
        for sample in (*samples, *fresh):
            state.in_flight[sample] = self.version
        self._flying[self.version] += count
        return samples + fresh

    def finish(self, generator: str, samples: Sequence[int], versions: Sequence[int]) -> list[int]:
        """A generator answered; returns the samples that can be trained on, the others are asked again.

        Raises RuntimeError for a sample older than the version under which it was to be started.
        """
        kept = []
        for sample, version in zip(samples, versions, strict=True):
            promised = self._land(generator, sample)
            if version < promised:
                raise RuntimeError(f"{generator} started sample {sample} under version {version}, not {promised}")
            if self._too_old(version, self.trained + 1):
                self._repeat([sample])
            else:
                self._keep(sample, version)
                kept.append(sample)
        return kept

    def to_abort(self, generator: str) -> list[int]:
        """Samples in flight at this generator that no step can train on any more, or all where it is leaving."""
        state = self.generators[generator]
        if not (state.leaving or self.surplus):
            return []
        return [s for s, v in state.in_flight.items() if state.leaving or self._too_old(v, self.trained + 1)]

    def aborted(self, generator: str, samples: Sequence[int]) -> None:
        """A generator dropped these samples unfinished; they wait again in front of all others."""
        for sample in samples:
            self._land(generator, sample)
        self._repeat(samples)

    # Steps.

    def complete(self, step: int) -> bool:
        """Whether the samples of ``step`` are there: enough whole groups, and all whose last chance this is."""
        if step > self.drawn or len(self._whole) * self.group_size < self._size(step):
            return False
        return self.surplus > 0 or not any(self._too_old(v, step + 1) for v in (*self._flying, *self._parted))

    def select(self, step: int) -> list[int]:
        """The samples that ``step`` trains on; groups that would be too old for the next step come first.

        Raises RuntimeError where a sample is older than the bound, which the rules above exclude.
        """
        oldest = {group: min(self.finished[sample] for sample in group.samples) for group in self._whole}
        last_chance = [group for group, version in oldest.items() if self._too_old(version, step + 1)]
        others = [group for group, version in oldest.items() if not self._too_old(version, step + 1)]
        chosen = (last_chance + others)[: self._size(step) // self.group_size]
        version = min(oldest[group] for group in chosen)
        if self._too_old(version, step):
            raise RuntimeError(f"step {step} would train on a sample of version {version}, staleness {self.staleness}")
        for sample in self._taken:
            del self._groups[sample]
        self._taken = {sample: self.finished.pop(sample) for group in chosen for sample in group.samples}
        for group in chosen:
            del self._whole[group]
        # Left by oversampling; from staleness 2 on also where earlier steps took younger groups that were whole first.
        self.lose([sample for sample, version in self.finished.items() if self._too_old(version, step + 1)])
        self.trained = step
        return list(self._taken)

    def give_back(self) -> None:
        """Undo the last `select`, on whose samples nothing was trained: they are finished and wait for their step."""
        self.finished = self._taken | self.finished
        self._whole = dict.fromkeys(self._groups[sample] for sample in self._taken) | self._whole
        self._taken, self.trained = {}, self.trained - 1

    def lose(self, samples: Sequence[int]) -> None:
        """The answers of these finished samples are lost or too old; they wait again in front of all others."""
        for sample in samples:
            group = self._groups[sample]
            if not group.missing:
                del self._whole[group]
                self._parted.update(self.finished[member] for member in group.samples)
            group.missing += 1
            _drop(self._parted, self.finished.pop(sample))
        self._repeat(samples)

    def advance(self, version: int) -> None:
        """Weights of this version are there for all generators."""
        self.version = version

    def _too_old(self, version: int, step: int) -> bool:
        return step - 1 - version > self.staleness

    def _keep(self, sample: int, version: int) -> None:
        group = self._groups[sample]
        group.missing -= 1
        self.finished[sample] = version
        self._parted[version] += 1
        if not group.missing:
            self._whole[group] = None
            for member in group.samples:
                _drop(self._parted, self.finished[member])

    def _land(self, generator: str, sample: int) -> int:
        version = self.generators[generator].in_flight.pop(sample)
        _drop(self._flying, version)
        return version

    def _repeat(self, samples: Sequence[int]) -> None:
        self._again.extendleft(reversed(samples))
        self.repeated += len(samples)


def _drop(counts: Counter[int], version: int) -> None:
    """One sample less of this version, which is not among the keys any more where it was the last."""
    counts[version] -= 1
    if not counts[version]:
        del counts[version]
