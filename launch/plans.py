"""What a run takes, role by role, beside what there is; and its table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from beaver_ray.errors import UserError
from launch.resources import Resources

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class RolePlan:
    """One role, or one constraint's part of it; memory is of each process."""

    role: str
    name: str
    processes: int
    group: str
    cpus: float
    gpus: float
    model: str | None
    parameters: int | None
    host_gib: float
    gpu_gib: float


@dataclass(frozen=True)
class Plan:
    """All roles of a run, what they take together, and what stands against it."""

    roles: list[RolePlan]
    resources: Resources
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What stands against nothing but is to be known: what could not be checked, or would have to wait."""

    @property
    def cpus(self) -> float:
        """CPUs of all processes."""
        return sum(r.cpus * r.processes for r in self.roles)

    @property
    def gpus(self) -> float:
        """GPUs of all processes."""
        return sum(r.gpus * r.processes for r in self.roles)

    @property
    def host_gib(self) -> float:
        """Estimated host memory of all processes."""
        return sum(r.host_gib * r.processes for r in self.roles)

    @property
    def gpu_gib(self) -> float:
        """Estimated GPU memory of all processes."""
        return sum(r.gpu_gib * r.processes for r in self.roles)

    @property
    def groups(self) -> dict[str, list[tuple[float, float]]]:
        """Group to its bundles (CPUs, GPUs): process i of every role of a group shares bundle i."""
        groups: dict[str, list[tuple[float, float]]] = {}
        for role in self.roles:
            bundles = groups.setdefault(role.group, [])
            bundles += [(0.0, 0.0)] * (role.processes - len(bundles))
            for index in range(role.processes):
                cpus, gpus = bundles[index]
                bundles[index] = (cpus + role.cpus, gpus + role.gpus)
        return groups

    def check(self) -> None:
        """Raises UserError with the first thing that cannot work."""
        if self.problems:
            raise UserError(self.problems[0])

    def table(self) -> Table:
        """The plan for a terminal."""
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=f"Plan for {self.resources.name}", title_justify="left", show_footer=True)
        gpus = f"{self.gpus:g} of {self.resources.gpus:g}"
        cpus = f"{self.cpus:g}" + ("" if self.resources.cpus is None else f" of {self.resources.cpus:g}")
        memory = f"{self.host_gib:.1f} of {self.resources.memory_gib:.1f}"
        for title, footer in (
            ("role", "all"),
            ("processes", str(sum(r.processes for r in self.roles))),
            ("group", ""),
            ("bundles", str(sum(len(b) for b in self.groups.values()))),
            ("CPUs each", cpus),
            ("GPUs each", gpus),
            ("parameters", ""),
            ("GiB each", memory),
            ("GPU GiB each", "?" if any(_gpu_gib(r) == "?" for r in self.roles) else _gib(self.gpu_gib)),
            ("model", ""),
        ):
            right = title not in ("role", "group", "model")
            table.add_column(title, footer, justify="right" if right else "left", overflow="fold")
        seen: set[str] = set()
        for r in self.roles:
            bundles = "" if r.group in seen else str(len(self.groups[r.group]))
            seen.add(r.group)
            table.add_row(
                escape(r.name),
                str(r.processes),
                escape(r.group),
                bundles,
                f"{r.cpus:g}",
                f"{r.gpus:g}",
                "" if r.model is None else "?" if r.parameters is None else _count(r.parameters),
                f"{r.host_gib:.1f}",
                _gpu_gib(r),
                escape(r.model or ""),
            )
        return table


def _gpu_gib(role: RolePlan) -> str:
    """Nothing without a GPU; "?" where it depends on what is not known, on a GPU's memory or a model's size."""
    return "?" if role.gpus and not role.gpu_gib else _gib(role.gpu_gib)


def _gib(number: float) -> str:
    return f"{number:.1f}" if number else ""


def _count(number: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
