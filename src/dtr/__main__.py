"""`python -m dtr`."""

from dtr.cli import main

if __name__ == "__main__":
    main()
