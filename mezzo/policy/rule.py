"""One rule of a policy: a pattern over sites, and the format it gives them."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from mezzo.errors import ConfigError
from mezzo.formats import AnyFormat, get_format
from mezzo.policy.site import ROLES, SHORTHANDS, Site


@dataclass(frozen=True)
class Rule:
    """Give `fmt` to every site that the pattern matches.

    path    glob over the path; `*` also crosses dots; `path#1` means the second call only
    role    a role, a shorthand (input, weight, grad_output, out), or a glob over roles such as `fprop.*`
    """

    path: str
    role: str
    fmt: AnyFormat

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

    @classmethod
    def parse(cls, site: str, fmt: str) -> Rule:
        """From `PATH:ROLE` and a format's name.

        raises    ConfigError on a site without a role, an unknown role or an unknown format
        """
        path, colon, role = site.strip().rpartition(":")
        if not colon:
            raise ConfigError(f"a rule's site is PATH:ROLE, such as head:* or *.norm1:compute; got {site.strip()!r}")
        return cls(path.strip(), role.strip(), get_format(fmt.strip()))

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
        return tuple(role for role in ROLES if fnmatchcase(role, self.role))

    def matches_path(self, path: str) -> bool:
        return fnmatchcase(path, self.path.partition("#")[0])

    def matches(self, site: Site) -> bool:
        call = self.path.partition("#")[2]
        return (not call or int(call) == site.call) and site.role in self.roles() and self.matches_path(site.path)

    def __str__(self) -> str:
        return f"{self.site}={self.fmt}"
