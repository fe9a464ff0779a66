"""The commands by group, with a line and examples for each; their modules are imported when they are called.

So the help and the completion of `gkd-lab` load neither pydantic nor a room of the package.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup


@dataclass(frozen=True)
class CommandEntry:
    """A command: its function, and its line and examples in the help."""

    function: str
    """`module:function`, the module inside `gkd_lab.cli`."""
    short_help: str
    examples: tuple[str, ...]
    """Lines that can be typed as they are; the help of the command ends with them."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `typer.Typer.command`."""


_TAKES_MORE_OPTIONS = {"context_settings": {"allow_extra_args": True, "ignore_unknown_options": True}}

COMMAND_GROUPS: Mapping[str, Mapping[str, CommandEntry]] = {
    "Start": {
        "list": CommandEntry(
            "commands:list_experiments", "Name the experiments and their questions.", ("gkd-lab list",)
        ),
        "new": CommandEntry(
            "new_command:write_new_experiment",
            "Write an experiment for your data and your pair of models.",
            (
                "gkd-lab new",
                "gkd-lab new mine.yaml --data ./rows",
                "gkd-lab new mine.yaml --data ./rows --teacher ./teacher --student ./student",
            ),
        ),
        "plan": CommandEntry(
            "commands:show_plan",
            "Show each cell with its status and cost; run nothing.",
            (
                "gkd-lab plan quickstart",
                "gkd-lab plan quickstart --set beta=0,1 --set seed=0,1,2",
                "gkd-lab plan lambda_beta_arithmetic --power",
            ),
        ),
    },
    "Run": {
        "run": CommandEntry(
            "run_commands:run_experiment",
            "Train and evaluate the cells of an experiment.",
            ("gkd-lab run quickstart", "gkd-lab run quickstart --set steps=100 --workers 2"),
        ),
        "status": CommandEntry(
            "commands:show_status",
            "Show how far each cell is, and why it failed.",
            ("gkd-lab status quickstart", "gkd-lab status quickstart --watch"),
        ),
        "cell": CommandEntry(
            "run_commands:run_cell",
            "Train and evaluate one cell, as a sweep agent asks.",
            (
                "gkd-lab cell --task arithmetic --lmbda 0.5 --beta 0.1 --seed 0",
                "gkd-lab cell --experiment quickstart --lmbda 1 --beta 0",
            ),
            _TAKES_MORE_OPTIONS,
        ),
        "sweep": CommandEntry(
            "commands:print_sweep_file",
            "Print the sweep file for wandb agents.",
            ("gkd-lab sweep quickstart > sweep.yaml",),
        ),
    },
    "Read": {
        "table": CommandEntry(
            "commands:write_table",
            "Write the table of scores: csv, json, md, parquet.",
            (
                "gkd-lab table quickstart",
                "gkd-lab table quickstart --format csv --long -o scores.csv",
            ),
        ),
        "claims": CommandEntry(
            "commands:judge_claims",
            "Judge the paper's claims on a run.",
            ("gkd-lab claims paper", "gkd-lab claims quickstart --format json"),
        ),
        "report": CommandEntry(
            "commands:write_report_page",
            "Write one HTML page with figures and scores.",
            ("gkd-lab report quickstart", "gkd-lab report quickstart -o page.html"),
        ),
        "figures": CommandEntry(
            "figure_command:write_figure_files",
            "Write the report's figures as pdf, svg or png.",
            ("gkd-lab figures quickstart -o figures --format pdf,png --width 3.25",),
        ),
        "show": CommandEntry(
            "show_command:show_cell",
            "Print a cell's configuration, and where each value is from.",
            ("gkd-lab show 1a2b3c4d", "gkd-lab show 1a2b3c4d --experiment quickstart --format json"),
        ),
        "compare": CommandEntry(
            "commands:compare_cells",
            "Compare two cells, over the same examples.",
            ("gkd-lab compare 1a2b3c4d 5e6f7a8b",),
        ),
    },
    "Check": {
        "verify": CommandEntry(
            "commands:verify_experiment",
            "Check each record against its hashes.",
            ("gkd-lab verify quickstart",),
        ),
        "rescore": CommandEntry(
            "commands:rescore_experiment",
            "Compute metrics again from stored predictions.",
            ("gkd-lab rescore quickstart --metrics accuracy",),
        ),
        "selfcheck": CommandEntry(
            "model_commands:check_model_pair",
            "Check the trainer's invariances on two models.",
            ("gkd-lab selfcheck", "gkd-lab selfcheck --teacher ./teacher --student ./student"),
        ),
    },
    "Models": {
        "train": CommandEntry(
            "user_commands:train_student",
            "Distil one student of yours, with TRL's options.",
            ("gkd-lab train --config run.yaml",),
            {**_TAKES_MORE_OPTIONS, "add_help_option": False},
        ),
        "evaluate": CommandEntry(
            "model_commands:evaluate_cell",
            "Run lm-eval's tasks on a finished cell.",
            ("gkd-lab evaluate 1a2b3c4d --tasks mmlu --limit 100",),
        ),
        "export": CommandEntry(
            "model_commands:export_cell",
            "Write a cell's student, or its adapter, to a folder.",
            ("gkd-lab export 1a2b3c4d -o student",),
        ),
        "push": CommandEntry(
            "user_commands:push_cell",
            "Push a cell's student and its card to the hub.",
            ("gkd-lab push 1a2b3c4d --repo me/student --private",),
        ),
    },
}
"""Title -> command -> entry, in the order of the help."""
COMMANDS: Mapping[str, CommandEntry] = {
    name: entry for group in COMMAND_GROUPS.values() for name, entry in group.items()
}


HIDDEN_COMMANDS: Mapping[str, CommandEntry] = {
    "unit": CommandEntry(
        "run_commands:run_unit",
        "Run one unit of an experiment, as a job of a cluster does.",
        ("gkd-lab unit quickstart --unit 0123456789ab",),
    ),
}
"""Commands that programs call; the help and the completion leave them out."""


def load_command(name: str) -> Any:
    """Return the click command of an entry of COMMANDS or HIDDEN_COMMANDS, after importing its module."""
    entry = COMMANDS[name] if name in COMMANDS else HIDDEN_COMMANDS[name]
    module, _, function = entry.function.partition(":")
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    lines = "\n".join(f"  {line}" for line in entry.examples)
    epilog = f"\b\n{'Examples' if len(entry.examples) > 1 else 'Example'}:\n{lines}"
    app.command(name, epilog=epilog, **entry.options)(
        getattr(import_module(f"gkd_lab.cli.{module}"), function)
    )
    return typer.main.get_command(app)


class CommandGroup(TyperGroup):
    """The commands of COMMANDS: stubs for help and completion, replaced by the command that is called."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for name, entry in COMMANDS.items():
            self.commands[name] = TyperCommand(name, short_help=entry.short_help)
        for name, entry in HIDDEN_COMMANDS.items():
            self.commands[name] = TyperCommand(name, short_help=entry.short_help, hidden=True)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Return (name, command, remaining words) of a call."""
        name, command, words = super().resolve_command(ctx, args)
        return name, command and load_command(str(name)), words

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write a section for each group of commands."""
        width = max(map(len, COMMANDS))
        for title, group in COMMAND_GROUPS.items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(width), entry.short_help) for name, entry in group.items()])
