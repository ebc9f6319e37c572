"""The command `imm-analyze`: diagnosis, one sub-command per question."""

from __future__ import annotations

import click

from ..common.version import __version__
from .change import change_command
from .console import CONTEXT
from .importance import importance_command
from .kl import kl_command
from .pareto import pareto_command
from .samples import samples_command

epilog = """\b
Examples:
  imm-analyze importance base/ --data train.jsonl -o importance.json      where do weights matter?
  imm-analyze change base/ sft/ --importance importance.json -o report/   where did they change?
  imm-analyze kl base/ sft/ --data task.jsonl                             how far are its predictions from the base's?
  imm-analyze samples base.jsonl round-1.jsonl                            did the model get better?
  imm-analyze pareto run/ --in math.accuracy --out other.accuracy         which alpha is worth choosing?
"""


@click.group("imm-analyze", context_settings=CONTEXT, epilog=epilog)
@click.version_option(__version__, prog_name="imm-analyze")
def analyze_command() -> None:
    """Diagnose self-improvement: where weights matter, where they changed, whether the gain is real, which alpha."""


for _command in (importance_command, change_command, kl_command, samples_command, pareto_command):
    analyze_command.add_command(_command)
