"""Channels ranked by what is lost once the layers that read them are refitted without them."""

from __future__ import annotations

from .criterion import elimination

__all__ = ["elimination"]
