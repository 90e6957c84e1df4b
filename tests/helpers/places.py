"""Where the checkout and its parts lie, and what the README shows."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
BENCHMARKS = ROOT / "benchmarks"
README = (ROOT / "README.md").read_text()
RECIPES = re.findall(r"^```python torchrun\n(.*?)^```", README, re.M | re.S)
"""The README's snippets for several processes."""
