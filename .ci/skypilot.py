"""Reads docs/skypilot.yaml as SkyPilot does, by its own schemas: `make check-skypilot`.

Runs in an environment of its own: SkyPilot's needs are not the job's.
"""

from __future__ import annotations

import sys
from pathlib import Path

import sky

PATH = Path(__file__).parents[1] / "docs/skypilot.yaml"


def main() -> None:
    try:
        task = sky.Task.from_yaml(str(PATH))
    except ValueError as error:  # what SkyPilot raises for whatever its schemas refuse
        sys.exit(f"{PATH}: {error}")
    (resources,) = task.resources
    print(f"{PATH.name}: {task.name}, {resources}")


if __name__ == "__main__":
    main()
