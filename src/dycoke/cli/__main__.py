"""``python -m dycoke.cli``: the same as ``dycoke``."""

from dycoke.cli.main import main

main()
