"""`python -m pqk` is `pqk`."""

from pqk.cli.app import main

if __name__ == "__main__":
    main()
