"""`python -m tests.fake_trial VERB`: `python -m job VERB` with the trials of `fake_training`.

Command line, process 1 and its workers, children, ledger, lease and commit are the job's own.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import replace

from job import cli, supervisor, verbs
from job.__main__ import main
from job.child import run_as_child
from job.errors import HeldError
from job.variables import load_settings
from tests.fake_training import FAKE_TRAINING


def _trial(options: Namespace) -> verbs.Ending:
    settings, _ = load_settings()
    try:
        return run_as_child(
            settings,
            options.heartbeat_fd,
            die=sys.exit,
            training=FAKE_TRAINING,
            worker=options.worker,
        )
    except HeldError as error:
        return error.exit_code, None


if __name__ == "__main__":
    cli.VERBS["trial"] = replace(cli.VERBS["trial"], run=_trial)
    supervisor.TRIAL_COMMAND = (sys.executable, "-m", "tests.fake_trial", "trial")
    sys.exit(main())
