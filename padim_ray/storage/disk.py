"""Free space on this machine's disks."""

import shutil
from pathlib import Path


def format_size(size: float) -> str:
    """Format bytes in the largest unit that fits."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB" if size < 999.5 else f"{size:,.0f} TB"


def disk_usage(path: str | Path) -> tuple[int, int]:
    """Size and free bytes of the disk that holds a path, which needn't exist yet."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    usage = shutil.disk_usage(place)
    return usage.total, usage.free
