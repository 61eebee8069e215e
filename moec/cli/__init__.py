"""The ``moec`` command."""

from moec.cli.app import app, main

__all__ = ["app", "main"]
