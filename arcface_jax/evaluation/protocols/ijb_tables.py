"""IJB results for the terminal: tables of 1:1 and 1:N results, and remarks."""

from collections.abc import Sequence

from rich.table import Table

from arcface_jax.evaluation.protocols.ijb import IjbResult
from arcface_jax.runtime.tables import new, share

_RULES = ("insightface", "standard")
_NAMES = ("options", "rule")


def tables(results: Sequence[IjbResult]) -> list[Table]:
    """Makes tables of 1:1 and, if there are galleries, 1:N results; a line per rule and options.

    Args:
      results: from `ijb.evaluate`, all on one set.
    """
    first = results[0]
    title = f"{first.name.split('_')[0]} pairs: {first.same:,} same, {first.different:,} different"
    heads = [f"TAR at\n{at.label}" for at in reversed(first.tars)]
    pairs = new(f"{title}; TAR at FAR", [*heads, "AUC", "EER"], names=_NAMES)
    for result in results:
        for rule in _RULES:
            tars = result.nearest if rule == "insightface" else result.tars
            cells = [share(at.tar) for at in reversed(tars)]
            shared = [f"{result.auc:.5f}", share(result.eer)]
            pairs.add_row(result.options.label, rule, *cells, *shared)
    if not first.identification:
        return [pairs]
    outcome = first.identification[0]
    heads = [f"rank {rank}" for rank in outcome.ranks]
    heads += [f"TPIR at\nFPIR {at.fpir:g}" for at in outcome.tpirs]
    title = "identification, mixed probes in both galleries"
    identification = new(title, heads, names=_NAMES)
    for result in results:
        for outcome in result.identification:
            cells = [*outcome.ranks.values(), *(at.tpir for at in outcome.tpirs)]
            identification.add_row(result.options.label, outcome.rule, *map(share, cells))
    return [pairs, identification]


def remarks(result: IjbResult) -> list[str]:
    """Lists what the set is too small to measure, and what insightface's rule then does."""
    lines = []
    missing = [at for at in result.tars if at.tar is None]
    if missing:
        needs = ", ".join(f"{at.label} (needs {at.pairs_needed:,})" for at in missing)
        lines.append(
            f"{result.different:,} pairs of different people are too few for a FAR of {needs}; "
            "insightface's rule takes the nearest point there, whatever its FAR"
        )
    if not result.identification:
        lines.append("no identification: the folder's meta/ has no 1N csv files")
    return lines
