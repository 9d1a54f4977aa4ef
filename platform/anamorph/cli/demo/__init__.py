"""``anamorph demo``: the whole product on one machine, with a real model, in six steps.

``acts.py`` runs them in order; each step is a module of this package with one function,
which shows what happens and checks what it claims.
"""

from anamorph.cli.demo.acts import demo

__all__ = ["demo"]
