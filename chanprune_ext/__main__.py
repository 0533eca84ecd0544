"""``python -m chanprune_ext`` is the command ``chanprune``, for launchers that take a module."""

from chanprune_ext.cli import app

if __name__ == "__main__":
    app(prog_name="chanprune")
