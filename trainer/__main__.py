"""python -m trainer compact ...: what makes models. Exit codes: 0 done, 1 failed, 78 configuration or data missing."""

from __future__ import annotations

import sys

import click

from detector.errors import GunfireError
from trainer.compact.commands import compact


@click.group()
def cli() -> None:
    """Train, evaluate and export models of the gunfire detector."""


cli.add_command(compact)


def main() -> None:
    """Run the command line; errors that this project raises on purpose become one line and an exit code."""
    try:
        cli.main(prog_name="trainer")
    except GunfireError as error:
        click.echo(f"trainer: {error}", err=True)
        sys.exit(getattr(error, "exit_code", 1))


if __name__ == "__main__":
    main()
