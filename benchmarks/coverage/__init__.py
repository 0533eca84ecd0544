"""Coverage of architectures: every model pruned, checked and timed. See ``__main__.py``."""
