"""The loop: a target, rows and their caches, rounds of a draft, a forward, a verification."""
