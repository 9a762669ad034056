"""A training process of its own, which can be told where to kill itself (SIGKILL: nothing is tidied up).

``python -m tests.trainer.train_child KILL_AT -- OPTIONS OF trainer train``; KILL_AT: ``never``, ``step:N`` (after N's
row was told), ``best:N`` (N's evaluation is kept, its checkpoint isn't yet), ``checkpoint:N`` (half of it is on disk).
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import trainer.run as run_module
import trainer.train as train_module
from trainer.__main__ import main


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(what: str, step: int) -> None:
    if what == "step":
        told = train_module.Trainer._report

        def report(self: Any, at: int, *rest: Any) -> None:
            told(self, at, *rest)
            if at >= step:
                die()

        train_module.Trainer._report = report  # type: ignore[method-assign]
    elif what == "best":
        evaluate = train_module.Trainer._evaluate

        def evaluated(self: Any, at: int) -> None:
            evaluate(self, at)
            if at >= step:
                die()

        train_module.Trainer._evaluate = evaluated  # type: ignore[method-assign]
    elif what == "checkpoint":
        whole = run_module.write_whole

        def half(path: Any, content: bytes) -> None:
            if path.name == f"step-{step:09d}.safetensors":
                path.with_name(path.name + ".part").write_bytes(content[: len(content) // 2])
                die()
            whole(path, content)

        run_module.write_whole = half


if __name__ == "__main__":
    what, _, step = sys.argv[1].partition(":")
    kill_at(what, int(step or 0))
    main(sys.argv[3:], prog_name="trainer")
