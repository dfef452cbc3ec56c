"""`python -m pyrexport.cli` is `pyrexport`."""

from . import main

main()
