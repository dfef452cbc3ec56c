"""`python -m pyrexport` is `pyrexport`."""

from .cli import main

main()
