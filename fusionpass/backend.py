"""The backend by the path that an installed package's metadata has: an editable install need not be made again."""

from fusionpass.entry.backend import fusionpass

__all__ = ["fusionpass"]
