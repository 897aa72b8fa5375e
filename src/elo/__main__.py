"""Run the command line with `python -m elo`."""

from elo.cli import main

if __name__ == "__main__":
    main()
