"""Targets that are `.pt2` archives of torch.export."""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch

from fusionpass.targets.types import Target, TargetError, first_line


def from_archive(path: str) -> Target:
    """The exported program in the archive at `path`."""
    if not Path(path).is_file():
        raise TargetError(f"there is no archive {path!r}: write one with torch.export.save(program, {path!r})")
    if zipfile.is_zipfile(path) and any("/aotinductor/" in name for name in zipfile.ZipFile(path).namelist()):
        raise TargetError(
            f"{path!r} is a package of AOTInductor, compiled code without a graph: give the archive of torch.export.save"
        )
    try:
        program = torch.export.load(path)
    except Exception as error:  # a broken zip, a missing member, bad JSON: torch raises another type for each
        why = first_line(error, 160).partition(" Please check the warnings")[0]  # the command does not show these
        raise TargetError(
            f"{path!r} could not be read by torch.export.load ({type(error).__name__}: {why}): "
            "write it again with torch.export.save"
        ) from error
    return Target(name=path, program=program)
