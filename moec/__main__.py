"""``python -m moec``: the command where the script is not installed."""

from moec.cli import main

main()
