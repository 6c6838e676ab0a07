"""How good a network is: scores, tables and pictures."""
