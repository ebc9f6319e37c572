"""The command `imm-analyze`: diagnosis, one sub-command per question."""

from __future__ import annotations

import click

from .change import change_command
from .help import CONTEXT, Group, version_option
from .importance import importance_command
from .kl import kl_command
from .pareto import pareto_command
from .samples import samples_command

epilog = """\b
Examples:
  # where do weights matter?
  imm-analyze importance base/ --data qa.jsonl -o imp.json
  # where did they change?
  imm-analyze change base/ sft/ --importance imp.json
  # how far are its predictions from the base's?
  imm-analyze kl base/ sft/ --data qa.jsonl
  # did the model get better?
  imm-analyze samples base.jsonl sft.jsonl
  # which alpha is worth choosing?
  imm-analyze pareto run/ --in math.acc --out qa.acc
"""


@click.group(
    "imm-analyze",
    cls=Group,
    short_help="Measure: where weights matter and changed, whether a gain is real.",
    context_settings=CONTEXT,
    epilog=epilog,
)
@version_option("imm-analyze")
def analyze_command() -> None:
    """Diagnose self-improvement: where weights matter, where they changed, whether the gain is real, which alpha."""


for _command in (importance_command, change_command, kl_command, samples_command, pareto_command):
    analyze_command.add_command(_command)
