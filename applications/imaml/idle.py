"""Settings that a run does not use: what was typed and changes nothing is refused, and no table tells of it."""

from __future__ import annotations

from collections.abc import Iterable

from applications.imaml.config import NO_IMAGES, OF_IMAGES, Config, ConfigError

__all__ = ["idle", "refuse_idle"]

# They find their step by a line search.
_SEARCHES = ("lbfgs", "hessian-free")


def idle(config: Config) -> dict[str, str]:
    """The settings that have no effect beside the others.

    Args:
        config: of a run.

    Returns:
        Why, by the name of each such setting: a sentence's end.
    """
    found: dict[str, str] = {}
    if config.algorithm != "imaml":
        why = f"is of imaml's linear system, and {config.algorithm} has none"
        found |= {"curvature": why, "damping": why}
        if config.inner != "hessian-free":
            found["cg_steps"] = f"{why}, nor has inner={config.inner!r}"
    if config.inner in _SEARCHES:
        found["inner_lr"] = f"is not for inner={config.inner!r}, whose steps are found by a line search"
    if config.data == "glyphs":
        found["root"] = "is not for glyphs, which are drawn on the spot"
    if config.is_regression:
        found |= dict.fromkeys(OF_IMAGES, NO_IMAGES)
    return found


def refuse_idle(configs: Iterable[Config], typed: Iterable[str]) -> None:
    """Refuse settings that none of some runs uses, though somebody has typed them.

    Args:
        configs: of the runs, at least one.
        typed: names of the settings that were typed.

    Raises:
        ConfigError: if one of those has no effect.
    """
    each = list(configs)
    unused = [idle(config) for config in each]
    for name in typed:
        if all(name in found for found in unused):
            raise ConfigError(f"{name}={getattr(each[0], name)!r} {unused[0][name]}; leave it out.")
