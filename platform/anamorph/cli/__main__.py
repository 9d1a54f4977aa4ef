"""``python -m anamorph.cli``: the same as the ``anamorph`` script."""

from anamorph.cli.main import main

main()
