"""Processes that tests start, and the programs that they run in them."""
