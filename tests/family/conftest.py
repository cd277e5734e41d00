"""The toy family lies outside jvdiff/ and is found as a user's own would be, with its folder on the path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
