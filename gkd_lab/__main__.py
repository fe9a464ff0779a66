"""`python -m gkd_lab` is `gkd-lab`."""

from gkd_lab.cli import main

main()
