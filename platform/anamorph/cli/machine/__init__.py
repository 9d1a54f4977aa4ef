"""The whole system on one machine: what ``up``, ``down``, ``status`` and ``demo`` stand on."""
