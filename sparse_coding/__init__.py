"""Folders import one way: sae < sweep < figures < toy | lm; rental, what writes run folders."""
