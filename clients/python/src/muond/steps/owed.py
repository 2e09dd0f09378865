"""Hyperparameters that a step was closed before they came: they are said again with the next one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Groups = Mapping[str, Mapping[str, Any]]
"""{group: {hyperparameter: value}}"""


def owed_groups(said: Groups, in_force: Groups) -> Groups:
    """What was said and is not in force."""
    owed = {
        group: {
            key: value for key, value in values.items() if _plain(in_force.get(group, {}).get(key)) != _plain(value)
        }
        for group, values in said.items()
    }
    return {group: values for group, values in owed.items() if values}


def merge_groups(older: Groups, newer: Groups | None) -> Groups | None:
    """The values of both; those of ``newer`` count where there are two."""
    if not older:
        return newer
    merged = {group: {**values, **(newer or {}).get(group, {})} for group, values in older.items()}
    return {**(newer or {}), **merged}


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
