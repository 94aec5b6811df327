"""Frozen dataclasses as the single description of a configuration section.

The same class validates YAML and defines the flags and ``--help`` of a stage script. Its digest is recorded
with every result.
"""

import argparse
import ast
import dataclasses
import difflib
import inspect
import shlex
import textwrap
import types
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from sparsight.common.digests import is_free
from sparsight.common.errors import SparsightError
from sparsight.config.bounds import bounds_of

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


def parse(cls: type[T], section: Any, where: str) -> T:
    """Build ``cls`` from a mapping, checking keys, types and the class's own ``__post_init__``.

    Args:
        cls: a frozen dataclass whose annotations are int, float, bool, str, Literal, ``X | None``,
            ``tuple[X, ...]``, ``dict[str, X]``, or a kind of str that reads its own values (``read``).
        section: the section as read from YAML; ``None`` (an empty section) means all defaults.
        where: dotted path of the section, for messages.

    Raises:
        SparsightError: unknown or missing key, wrong type, or a value that the class rejects.
    """
    section = {} if section is None else section
    if not isinstance(section, Mapping):
        raise SparsightError(f"{where}: expected keys and values, got {section!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = get_type_hints(cls)
    check_keys(section, fields, where)
    values = {name: _convert(hints[name], value, f"{where}.{name}") for name, value in section.items()}
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise SparsightError(f"{where}: the key {name!r} is missing")
    try:
        return cls(**values)
    except SparsightError as error:
        raise SparsightError(f"{where}.{error}") from None


def check_keys(section: Mapping[str, Any], known: Mapping[str, Any], where: str) -> None:
    """Raise SparsightError for the first unknown key, naming the closest known one."""
    for key in section:
        if key not in known:
            matches = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"did you mean {matches[0]!r}?" if matches else f"known keys: {', '.join(known)}"
            raise SparsightError(f"{where}: unknown key {key!r}; {hint}")


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if hasattr(hint, "read"):
        return hint.read(value, where)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (inner,) = [a for a in arguments if a is not type(None)]
        return _convert(inner, value, where)
    if origin is Literal:
        if value in arguments:
            return value
        raise SparsightError(f"{where}: {value!r} is not one of {', '.join(map(str, arguments))}")
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise SparsightError(f"{where}: expected a list, got {value!r}")
        return tuple(_convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise SparsightError(f"{where}: expected keys and values, got {value!r}")
        return {str(key): _convert(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if hint is float and isinstance(value, str | int) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 1e-3 (without a dot) as a string
        except (ValueError, OverflowError):
            pass
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    quotes = "; put it in quotes" if hint is str and isinstance(value, int | float) else ""
    raise SparsightError(f"{where}: expected {hint.__name__}, got {value!r}{quotes}")


def field_docs(cls: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, by field name."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(node, ast.ClassDef)
    docs = {}
    for field, doc in zip(node.body, node.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant):
            docs[ast.unparse(field.target)] = inspect.cleandoc(str(doc.value.value)).replace("\n", " ")
    return docs


def add_arguments(parser: argparse.ArgumentParser, cls: type) -> None:
    """Give a stage script one flag per field of ``cls``; the help is the field's docstring."""
    group, docs = parser.add_argument_group(cls.__name__), field_docs(cls)
    for field in dataclasses.fields(cls):
        takes_several = get_origin(get_type_hints(cls)[field.name]) in (tuple, dict)
        bounds = bounds_of(get_type_hints(cls, include_extras=True)[field.name])
        default = "required" if field.default is dataclasses.MISSING else f"default: {field.default}"
        group.add_argument(
            f"--{field.name.replace('_', '-')}",
            action="extend" if takes_several else "store",
            nargs="*" if takes_several else None,
            metavar="KEY=VALUE" if get_origin(get_type_hints(cls)[field.name]) is dict else field.name.upper(),
            default=argparse.SUPPRESS,
            help=f"{docs[field.name]} ({f'{bounds}; ' if bounds else ''}{default})".replace("%", "%%"),
        )


def from_arguments(cls: type[T], arguments: argparse.Namespace) -> T:
    """Build ``cls`` from the flags of :func:`add_arguments`, validated as if it came from YAML."""
    section: dict[str, Any] = {}
    for name, hint in get_type_hints(cls).items():
        if not hasattr(arguments, name):
            continue
        value = getattr(arguments, name)
        if get_origin(hint) is dict:
            pairs = (item.partition("=") for item in value)
            section[name] = {key: _read(get_args(hint)[1], text) for key, _, text in pairs}
        elif get_origin(hint) is tuple:
            section[name] = [_read(get_args(hint)[0], text) for text in value]
        else:
            section[name] = _read(hint, value)
    return parse(cls, section, "arguments")


def _read(hint: Any, text: str) -> Any:
    """Convert a flag's text to the type of its field.

    Text that does not fit is returned unchanged, and :func:`parse` rejects it.
    """
    for kind in get_args(hint) or (hint,):
        if kind is bool and text in ("true", "false"):
            return text == "true"
        if kind is int and text.removeprefix("-").isdecimal():
            return int(text)
    return text


def to_flags(section: Any) -> str:
    """Shell flags from which a stage script reads ``section`` again; unset (None) fields are left out.

    Free fields are left out too, because Snakemake reruns a rule when its flags change.
    """
    words: list[str] = []
    for field in dataclasses.fields(section):
        if is_free(field):
            continue
        value, flag = getattr(section, field.name), f"--{field.name.replace('_', '-')}"
        if isinstance(value, dict):
            words += [flag, *(f"{key}={_write(item)}" for key, item in value.items())]
        elif isinstance(value, tuple):
            words += [f"{flag}={_write(item)}" for item in value] or [flag]  # with =, as a name may begin with a dash
        elif value is not None:
            words.append(f"{flag}={_write(value)}")
    return shlex.join(words)


def _write(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
