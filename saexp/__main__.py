"""`python -m saexp`."""

from saexp.cli import main

if __name__ == "__main__":
    main()
