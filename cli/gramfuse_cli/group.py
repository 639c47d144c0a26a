"""Finds commands: each file of `gramfuse_cli.commands` is a command, and `silo_check.py` is `gramfuse silo check`."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import Any

import click

from gramfuse_cli import commands


class FileGroup(click.Group):
    """A group of commands with one file each, beside those that are registered as usual.

    To add a command, write a file: its name is the command's, after the prefix of its group, and it holds a click
    command of that name. Names of commands have "-" where names of files have "_".

        @click.command()
        def check() -> None:  # in silo_check.py: `gramfuse silo check`
            \"""Check the silo.\"""

        @click.command()
        def dry_run() -> None:  # in dry_run.py, because no file dry.py holds a FileGroup: `gramfuse dry-run`
            \"""Try it.\"""

    Args:
        prefix: what the names of its files begin with: "" for `gramfuse` itself, "silo_" for `gramfuse silo`.
    """

    def __init__(self, *arguments: Any, prefix: str = "", **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.prefix = prefix

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands."""
        files = self._files()
        mine = {name.replace("_", "-") for name in files if not self._in_inner_group(name, files)}
        return sorted({*super().list_commands(ctx), *mine})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command, and import its file only now; None if there is none of that name.

        Raises:
            click.ClickException: if the file does not hold a click command of its name.
        """
        name, files = cmd_name.replace("-", "_"), self._files()
        if "_" in cmd_name or name not in files or self._in_inner_group(name, files):
            return super().get_command(ctx, cmd_name)
        return self._read(name)

    def _files(self) -> set[str]:
        """Return the names of the files with this group's prefix, without it."""
        names = {module.name for module in pkgutil.iter_modules(commands.__path__)}
        return {name.removeprefix(self.prefix) for name in names if name.startswith(self.prefix)}

    def _in_inner_group(self, name: str, files: set[str]) -> bool:
        parts = name.split("_")
        outer = {"_".join(parts[:count]) for count in range(1, len(parts))}
        return any(isinstance(self._read(group), FileGroup) for group in outer & files)

    def _read(self, name: str) -> click.Command:
        module = import_module(f"{commands.__name__}.{self.prefix}{name}")
        command = getattr(module, name, None)
        if not isinstance(command, click.Command):
            raise click.ClickException(
                f"{module.__file__}: expected a click command {name!r}, because each file there is a command; add it, "
                "or move the file elsewhere"
            )
        return command
