"""`python -m specdiff`, and `accelerate launch -m specdiff train ...`: the `specdiff` command."""

from __future__ import annotations

from .cli.main import app

if __name__ == "__main__":
    app(prog_name="specdiff")
