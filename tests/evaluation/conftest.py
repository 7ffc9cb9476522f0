"""Runs and forked processes as in the trainer's tests."""

from tests.trainer.conftest import _each_image_alone, forks, template, workspace

__all__ = ["_each_image_alone", "forks", "template", "workspace"]
