"""The tests, in folders as the package is: what they share is in `helpers`, what is run by name in `tools`."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
HANGS = 1500  # seconds after which a child process is ended: below the limit of a test, far above what any takes
