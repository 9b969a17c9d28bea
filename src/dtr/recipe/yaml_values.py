"""YAML as recipes mean it: plain values, each key once, numbers such as 1e-3, and nothing that unfolds without end.

PyYAML follows YAML 1.1; what differs here is said at `Loader`. No torch in here.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

MAX_NODES = 100_000
"""Values that a document may hold once its aliases are followed; a recipe holds about a hundred."""

_FLOAT = re.compile(
    r"""^(?:[-+]?[0-9]+\.[0-9]*(?:[eE][-+]?[0-9]+)?
         |[-+]?\.[0-9]+(?:[eE][-+]?[0-9]+)?
         |[-+]?[0-9]+[eE][-+]?[0-9]+
         |[-+]?\.(?:inf|Inf|INF)
         |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)
_INT = re.compile(r"^[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]*|[1-9][0-9_]*)$")


def _resolvers(base: Any) -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """Without dates and base-60 numbers (12:30), and with 1e-3 as a number."""
    apart = {f"tag:yaml.org,2002:{name}" for name in ("timestamp", "float", "int")}
    found = {
        first: [(tag, form) for tag, form in forms if tag not in apart]
        for first, forms in base.yaml_implicit_resolvers.items()
    }
    for tag, form, firsts in (("float", _FLOAT, "-+0123456789."), ("int", _INT, "-+0123456789")):
        for first in firsts:
            found.setdefault(first, []).append((f"tag:yaml.org,2002:{tag}", form))
    return found


class Loader(yaml.SafeLoader):
    """A safe loader that refuses a key that comes twice, reads 1e-3 and 1e6 as numbers, and leaves dates as text."""

    yaml_implicit_resolvers = _resolvers(yaml.SafeLoader)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """As in the base class, each key once."""
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key.value}' comes twice", key.start_mark
                )
            seen.add((key.tag, key.value if isinstance(key, yaml.ScalarNode) else id(key)))
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: Any) -> Any:
        """As in the base class; Python reads no number of thousands of digits."""
        try:
            return super().construct_yaml_int(node)
        except ValueError:
            raise yaml.constructor.ConstructorError(
                None, None, "a number of too many digits", node.start_mark
            ) from None

    def construct_yaml_float(self, node: Any) -> Any:
        """As in the base class; 1e6 is a count where a whole number is wanted."""
        value = super().construct_yaml_float(node)
        is_count = "." not in node.value and value.is_integer() and abs(value) < 2**53
        return int(value) if is_count else value


Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)
Loader.add_constructor("tag:yaml.org,2002:float", Loader.construct_yaml_float)


class Dumper(yaml.SafeDumper):
    """Writes what `Loader` reads back as it was."""

    yaml_implicit_resolvers = _resolvers(yaml.SafeDumper)


def load_yaml(text: str) -> Any:
    """The one document of a text.

    Raises:
        yaml.YAMLError: not YAML, a key twice, other than plain values, or more than `MAX_NODES` of them.
    """
    loader = Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _num_nodes(node, {})
        return loader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    finally:
        loader.dispose()


def dump_yaml(data: Any) -> str:
    """Plain values as YAML, in their order."""
    return yaml.dump(data, Dumper=Dumper, sort_keys=False, allow_unicode=True)


def _num_nodes(node: yaml.Node, known: dict[int, int]) -> int:
    """Values in a node with its aliases followed: nine lines of aliases can stand for a billion."""
    if id(node) not in known:
        # Until it is counted, what leads back to a node makes it endless.
        known[id(node)] = MAX_NODES
        inner = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [part for entry in inner for part in (entry if isinstance(entry, tuple) else (entry,))]
        known[id(node)] = 1 + sum(_num_nodes(part, known) for part in parts)
    if known[id(node)] > MAX_NODES:
        mark = node.start_mark
        raise yaml.constructor.ConstructorError(None, None, f"aliases that unfold to over {MAX_NODES:,} values", mark)
    return known[id(node)]
