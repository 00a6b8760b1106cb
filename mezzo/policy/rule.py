"""One rule of a policy: a pattern over sites, and what it gives them."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from mezzo.errors import ConfigError
from mezzo.formats import AnyFormat
from mezzo.policy.site import ROLES, SHORTHANDS, STATE_ROLES, TENSOR_ROLES, Site
from mezzo.policy.spec import Spec

# A Hadamard transform is undone by the product of two transformed operands.
_OPERANDS = ("fprop.a", "fprop.b", "dgrad.a", "dgrad.b", "wgrad.a", "wgrad.b")
_TENSORS = (*_OPERANDS, "fprop.query", "fprop.key", "fprop.value", "fprop.probs", "dgrad.dout")


@dataclass(frozen=True)
class Rule:
    """Give `spec` to every site that the pattern matches.

    path    glob over the path; `*` also crosses dots; `path#1` means the second call only
    role    a role, a shorthand (input, weight, grad_output, out, state), or a glob over roles such as `fprop.*`;
            globs leave out `master`, `state` and `saved`, which are what is stored
    """

    path: str
    role: str
    spec: Spec

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError(f"the rule for {self.role!r} has an empty path; `*` means every path")
        if any(char in self.path + self.role for char in ";="):
            raise ConfigError(f"a rule's site cannot hold ; or =, got {self.path}:{self.role}")
        if not self.roles():
            raise ConfigError(
                f"unknown role {self.role!r} in the rule for {self.path!r}; known: {', '.join(SHORTHANDS)}, "
                f"{', '.join(ROLES)}, or a glob over them such as fprop.*"
            )
        if "#" in self.path and not self.path.partition("#")[2].isdecimal():
            raise ConfigError(f"a call index is a whole number, got {self.path!r}; write path#1 for the second call")
        for what, given, allowed in (
            ("kahan and split are", self.spec.keep, ("master",)),
            ("hadamard is", self.spec.hadamard, _OPERANDS),
            ("delayed is", self.spec.delayed, _TENSORS),
            ("another rounding is", self.spec.rounding != "nearest", (*_TENSORS, "master", *STATE_ROLES)),
        ):
            wrong = [role for role in self.roles() if role not in allowed]
            if given and wrong:
                raise ConfigError(f"{what} for {', '.join(allowed)}; the rule {str(self)!r} also speaks of {wrong[0]}")

    @classmethod
    def parse(cls, site: str, spec: str) -> Rule:
        """From `PATH:ROLE` and `FORMAT [WORD …]`, as in `Spec.parse`.

        raises    ConfigError on a site without a role, an unknown role, format or word
        """
        path, colon, role = site.strip().rpartition(":")
        if not colon:
            raise ConfigError(f"a rule's site is PATH:ROLE, such as head:* or *.norm1:compute; got {site.strip()!r}")
        return cls(path.strip(), role.strip(), Spec.parse(spec.strip()))

    @property
    def fmt(self) -> AnyFormat:
        return self.spec.fmt

    @property
    def site(self) -> str:
        return f"{self.path}:{self.role}"

    @property
    def by_call(self) -> bool:
        """Whether the rule speaks of one call only."""
        return "#" in self.path

    def roles(self) -> tuple[str, ...]:
        """The roles that this rule speaks of."""
        if self.role in SHORTHANDS:
            return SHORTHANDS[self.role]
        if self.role in ROLES:
            return (self.role,)
        # What is stored is named by its own name: `head:*=bfloat16` must not take the float32 masters away.
        return tuple(role for role in TENSOR_ROLES if fnmatchcase(role, self.role))

    def matches_path(self, path: str) -> bool:
        return fnmatchcase(path, self.path.partition("#")[0])

    def matches(self, site: Site) -> bool:
        call = self.path.partition("#")[2]
        return (not call or int(call) == site.call) and site.role in self.roles() and self.matches_path(site.path)

    def __str__(self) -> str:
        return f"{self.site}={self.spec}"
