"""``python -m pyvit``."""

from pyvit.cli import main

main()
