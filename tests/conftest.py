"""Put the repository's root on the path: the scripts are flat modules there."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
