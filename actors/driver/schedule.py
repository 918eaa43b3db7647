"""Which prompts may start, which generator gets them, and which finished samples a step trains on.

A pure state machine: it knows sample ids, names of generators and numbers of versions, no process and no token. Step s
trains on as many samples as were drawn for it and makes weights version s; a sample started under version v is
s - 1 - v versions old when step s trains on it. Two rules keep that age at or below `staleness` for every sample:

admission   while `version` is the newest, no more samples are started than steps 1 to version + 1 + staleness take;
deadline    a step first takes the samples that would be too old for the next one, then others as they finish.

With oversampling some more are started, a step takes the first that finish, and what grows too old is aborted and
asked again under newer weights. That favours short answers, as every such scheme does.

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


class RolloutSchedule:
    """The samples of a whole run on their way from prompt to training; see the module's text."""

    def __init__(self, steps: int, staleness: int = 0, oversample: float = 1.0) -> None:
        self.steps, self.staleness, self.surplus = steps, staleness, oversample - 1.0
        self.version = 0
        self.trained = 0
        """The last step whose samples were taken."""
        self.repeated = 0
        """Samples that were aborted or lost and asked again."""
        self.generators: dict[str, GeneratorState] = {}
        self.finished: dict[int, int] = {}
        """Samples that wait for a step, in the order in which they finished, with their version."""
        self._ends: list[int] = []  # samples drawn up to and including each step
        self._fresh: deque[int] = deque()
        self._again: deque[int] = deque()
        self._started = 0
        self._flying: Counter[int] = Counter()
        self._taken: dict[int, int] = {}  # samples of the last step that was taken, with their version
        self._leaving: set[str] = set()

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands after a step: what `load_state_dict` goes on from, as plain values.

        ``pending`` are the samples that were drawn and not trained on; they start anew.
        """
        untrained = {*self._again, *self._fresh, *self.finished}
        untrained |= {sample for state in self.generators.values() for sample in state.in_flight}
        state = {"trained": self.trained, "ends": list(self._ends), "repeated": self.repeated}
        return state | {"pending": sorted(untrained)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the step in which `state_dict` was taken, its weights being the newest."""
        self.trained = self.version = int(state["trained"])
        self.repeated, self._ends = int(state["repeated"]), list(state["ends"])
        self._fresh = deque(state["pending"])
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
        """The samples of the next step."""
        ids = list(samples)
        self._ends.append(len(ids) + (self._ends[-1] if self._ends else 0))
        self._fresh.extend(ids)

    @property
    def waiting(self) -> int:
        """Samples that may be started now and are not."""
        return len(self._again) + min(len(self._fresh), self._allowed - self._started)

    @property
    def _allowed(self) -> int:
        step = min(self.version + 1 + self.staleness, self.drawn)
        return self._ends[step - 1] + round(self.surplus * self._size(step)) if step else 0

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
                self.finished[sample] = version
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
        """Whether the samples of ``step`` are there: enough of them, and all whose last chance this is."""
        if step > self.drawn or len(self.finished) < self._size(step):
            return False
        return self.surplus > 0 or not any(self._too_old(version, step + 1) for version in self._flying)

    def take(self, step: int) -> list[int]:
        """The samples that ``step`` trains on; what would be too old for the next step comes first.

        Raises RuntimeError where a sample is older than the bound, which the rules above exclude.
        """
        last_chance = [s for s, version in self.finished.items() if self._too_old(version, step + 1)]
        others = [s for s, version in self.finished.items() if not self._too_old(version, step + 1)]
        size = self._size(step)
        chosen = (last_chance + others)[:size]
        oldest = min(self.finished[sample] for sample in chosen)
        if self._too_old(oldest, step):
            raise RuntimeError(f"step {step} would train on a sample of version {oldest}, staleness {self.staleness}")
        # Only oversampling leaves finished samples that are too old for the next step.
        expired = last_chance[size:]
        self._taken = {sample: self.finished[sample] for sample in chosen}
        for sample in (*chosen, *expired):
            del self.finished[sample]
        self._repeat(expired)
        self.trained = step
        return chosen

    def give_back(self) -> None:
        """Undo the last `take`, on whose samples nothing was trained: they are finished and wait for their step."""
        self.finished = self._taken | self.finished
        self._taken, self.trained = {}, self.trained - 1

    def lose(self, samples: Sequence[int]) -> None:
        """The answers of these finished samples are lost; they wait again in front of all others."""
        for sample in samples:
            del self.finished[sample]
        self._repeat(samples)

    def publish(self, version: int) -> None:
        """Weights of this version are there for all generators."""
        self.version = version

    def _too_old(self, version: int, step: int) -> bool:
        return step - 1 - version > self.staleness

    def _land(self, generator: str, sample: int) -> int:
        version = self.generators[generator].in_flight.pop(sample)
        self._flying[version] -= 1
        if not self._flying[version]:
            del self._flying[version]
        return version

    def _repeat(self, samples: Sequence[int]) -> None:
        self._again.extendleft(reversed(samples))
        self.repeated += len(samples)
