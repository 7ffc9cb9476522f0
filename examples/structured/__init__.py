"""Pairs from several scored images per prompt, described by objects and relations: ``fastinvdpo data build``
(docs/guides/data.md).
"""
