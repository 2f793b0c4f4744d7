"""Tests of what scripts/ shares and that needs no mount."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
