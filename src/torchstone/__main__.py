"""`python -m torchstone …` is the same as `torchstone …`; `torchrun … -m torchstone train RECIPE` uses it."""

from __future__ import annotations

from torchstone.cli.main import main

if __name__ == "__main__":
    main()
