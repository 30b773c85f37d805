"""What a worker does from its start to its first lease, as a process: load a bundle and warm it up.

    python -m engines.bench.start BUNDLE

prints a line when the first job could be leased.
"""

import sys
from pathlib import Path

from engines.processes import start_child
from engines.runtime.pipeline import Pipeline


def main(argv: list[str]) -> None:
    """Load, warm up, say so."""
    start_child()
    pipeline = Pipeline.load(Path(argv[0]))
    pipeline.warm_up()
    sys.stdout.write(f"ready on {pipeline.backend}, {pipeline.device}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
