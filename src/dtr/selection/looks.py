"""How often searches have looked at the same confirmation items: the best of many is certified by luck alone.

Kept on this machine, in the cache folder, one small file for each teacher and task. The same search run again, or
resumed, is no new look.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from dtr.errors import OutputError
from dtr.files import write_json
from dtr.pretrained import open_cache


def count_look(subject: Mapping[str, Any], search: Mapping[str, Any]) -> int:
    """Note that a search looks at the confirmation items, and say how many others did so before.

    Args:
        subject: what the items are of: the fingerprints of teacher and task.
        search: what makes it another search: bank, settings and seed, JSON types only.
    """
    try:
        path = open_cache("looks") / f"{_digest(subject)}.json"
        looks = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        if (look := _digest(search)) not in looks:
            looks.append(look)
            write_json(path, looks)
    except (OutputError, OSError, ValueError):
        # A cache that cannot be written to counts nothing; a search must not fail by that.
        return 0
    return looks.index(look)


def _digest(entry: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()[:16]
