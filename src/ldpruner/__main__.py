"""`python -m ldpruner`."""

from ldpruner.cli import main

main()
