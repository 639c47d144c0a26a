"""Finds commands: a file of `gramfuse_cli.commands` is a command, and `silo_check.py` is `gramfuse silo check`."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import Any

import click

from gramfuse_cli import commands


class FileGroup(click.Group):
    """A group of commands with one file each, beside those that are registered as usual.

    To add a command, write a file: its name is the command's, after the prefix of its group, and it holds a click
    command of that name.

        @click.command()
        def check() -> None:  # in silo_check.py
            \"""Check the silo.\"""

    Args:
        prefix: what the names of its files begin with: "" for `gramfuse` itself, "silo_" for `gramfuse silo`.
    """

    def __init__(self, *arguments: Any, prefix: str = "", **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.prefix = prefix

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands."""
        return sorted({*super().list_commands(ctx), *self._files()})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command, and import its file only now; None if there is none of that name."""
        if cmd_name not in self._files():
            return super().get_command(ctx, cmd_name)
        command = getattr(import_module(f"{commands.__name__}.{self.prefix}{cmd_name}"), cmd_name)
        assert isinstance(command, click.Command)  # noqa: S101
        return command

    def _files(self) -> set[str]:
        names = {module.name for module in pkgutil.iter_modules(commands.__path__)}
        mine = {name.removeprefix(self.prefix) for name in names if name.startswith(self.prefix)}
        return {name for name in mine if "_" not in name}
