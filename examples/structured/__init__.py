"""Pairs from several scored images per prompt, with objects and relations (docs/data.md): ``fastinvdpo data build``."""
