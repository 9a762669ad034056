"""python -m trainer compact ...: what makes models.

Exit codes: 0 done; 1 failed, as where data or a model is missing or can't be used; 2 no such option; 78 options or
configuration can't be used, or weights have to be fetched first; 130 interrupted.
"""

from __future__ import annotations

import click

from detector.cli import CONTEXT, ErrorGroup
from trainer.commands_audio import evaluate_audio_command
from trainer.commands_embed import embed_command
from trainer.commands_evaluate import evaluate_command
from trainer.commands_export import export_command
from trainer.commands_labels import ontology_command
from trainer.commands_predict import check_segments_command, predict_command
from trainer.commands_train import train_command
from trainer.compact.commands import compact


@click.group(cls=ErrorGroup, context_settings=CONTEXT)
def main() -> None:
    """Train, evaluate and export models of the gunfire detector."""


main.add_command(compact)
main.add_command(train_command)
main.add_command(embed_command)
main.add_command(evaluate_command)
main.add_command(ontology_command)
main.add_command(predict_command)
main.add_command(export_command)
main.add_command(check_segments_command)
main.add_command(evaluate_audio_command)


if __name__ == "__main__":
    main(prog_name="trainer")
