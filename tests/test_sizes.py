"""Rooms stay small enough to be read: bounds on the lines of a file and of a function."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
FILE_LINES = 500
FUNCTION_LINES = 60
SOURCES = [*ROOT.glob("varfast/**/*.py"), *ROOT.glob("kernels/**/*.py")]
