"""``python -m sailyard``: the command line, also where no script is installed."""

from sailyard.cli import app

if __name__ == "__main__":
    app()
