"""`python -m pyambient`: the command line, for where no console script is installed."""

from pyambient.cli.main import main

if __name__ == "__main__":
    main()
