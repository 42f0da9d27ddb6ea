"""Files that people bring, damaged: each is read as what it is, or refused with one line. `make fuzz` takes 1,000."""

import os

COUNT = int(os.environ.get("POSTTRAIN_FUZZ", "60"))
"""Damaged files of each kind that must be refused."""
