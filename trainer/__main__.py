"""python -m trainer compact ...: what makes models. Exit codes: 0 done, 1 failed, 78 configuration or data missing."""

from __future__ import annotations

import click

from detector.cli import CONTEXT, ErrorGroup
from trainer.compact.commands import compact


@click.group(cls=ErrorGroup, context_settings=CONTEXT)
def main() -> None:
    """Train, evaluate and export models of the gunfire detector."""


main.add_command(compact)


if __name__ == "__main__":
    main(prog_name="trainer")
