"""Runs and forked processes as in the trainer's tests."""

from tests.trainer.conftest import forks, template, workspace

__all__ = ["forks", "template", "workspace"]
