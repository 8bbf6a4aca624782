"""`python -m saexp`."""

import sys

try:
    from saexp.cli import program
except ModuleNotFoundError as error:
    if error.name not in ("hydra", "omegaconf"):
        raise
    sys.exit(
        f"saexp: {error.name} is not installed in this Python; type source .venv/bin/activate "
        "(after make run), or pip install -e ."
    )

if __name__ == "__main__":
    program()
