"""What the tests of serving share."""

from __future__ import annotations

import sys
from pathlib import Path

# Models and tokenizers of the tests of pipelines lie one directory up, programs that load bundles in that of exports.
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "export")]
