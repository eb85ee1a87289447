"""`python -m overleap.cli`, where the command is not on the path."""

from overleap.cli import main

main()
