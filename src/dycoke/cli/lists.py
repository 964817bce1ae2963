"""``dycoke methods``, ``models`` and ``flops``: what there is, as tables."""

from __future__ import annotations

from rich.table import Table

from dycoke.cli.console import out


def list_methods() -> None:
    """List the methods that run, bench and eval know by name."""
    from dycoke.methods import METHODS

    table = Table()
    table.add_column("method", no_wrap=True)
    table.add_column("what it does")
    table.add_column("where")
    for method in METHODS.values():
        table.add_row(method.name, method.about, ", ".join(method.where))
    out.print(table)
    out.print(
        "vision: by the vision encoder's attention; inside: in the LLM, at prefill.\n"
        "visionzip+dycoke composes two: the tokens of one, the dynamic cache of the other.\n"
        "The classes are in dycoke.methods."
    )


def list_flops() -> None:
    """The same as bench --check-paper: the paper's FLOPs, and ours."""
    from dycoke.bench.show import paper_flops

    out.print(paper_flops())


def list_models() -> None:
    """Print the model families that can be compressed, and what does not apply to each."""
    from dycoke.models import families, limits

    table = Table(title="merging and pruning work on all of these", show_lines=True)
    table.add_column("family (config.model_type), and checkpoints", no_wrap=True)
    table.add_column("RoPE")
    table.add_column("limits")
    for family in dict.fromkeys(families().values()):
        name = f"{family.name}\n({', '.join(family.model_types)})"
        checkpoints = "".join(f"\n  {checkpoint}" for checkpoint in family.checkpoints)
        table.add_row(name + checkpoints, family.rope, "\n".join(limits(family)))
    out.print(table, markup=False)
    out.print("Any other family: DyCoke(...)(model, layout=...), see docs/settings.md.")
