"""Passes that train: prune, distil, fine-tune for integers. They run a net's code, so only where that code is trusted.

`compress` composes them; each other file is one pass, or what passes share. What comes out is exported and goes the way
of every other source.
"""
