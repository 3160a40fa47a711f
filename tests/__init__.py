"""The tests, in the folders of the package. `helpers` is shared by tests, `tools` are programs of their own."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
HANGS = 1500  # seconds: a child process that takes longer hangs; below the limit of a test
