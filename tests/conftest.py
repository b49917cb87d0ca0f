"""Put the repository's root on the path: the scripts are flat modules there. And where the data is."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session")
def flickr8k():
    """The folder that holds Flickr8k in the course's layout; a test that wants it is skipped where there is none."""
    for folder in ROOT / "data", ROOT.parent / "shared/data/flickr8k":
        if (folder / "train.json").exists() and (folder / "val.json").exists():
            return folder
    pytest.skip("Flickr8k is neither in data/ nor in ../shared/data/flickr8k")
