"""The configuration reference, written from the config dataclasses and the YAML options.

`config_page(root)` returns the page as Markdown. Sources are parsed, not imported, so that the page
needs none of saexp's dependencies:

- saexp/config/*.py: dataclasses, their fields, defaults and the docstring under each field;
- conf/<group>/*.yaml: the options of each group, described by the comment at the top of the file.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Field:
    """A field of a config dataclass."""

    name: str
    annotation: str
    default: str
    """Source text of the default; empty for a field without one."""
    doc: str


@dataclass(frozen=True)
class ConfigClass:
    """A config dataclass with the fields that it defines itself."""

    name: str
    bases: tuple[str, ...]
    doc: str
    fields: tuple[Field, ...]


def config_classes(root: Path) -> dict[str, ConfigClass]:
    """Class name -> config dataclass, of all modules of saexp/config."""
    classes = {}
    for path in sorted((root / "saexp/config").glob("*.py")):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.ClassDef) and _is_dataclass(node):
                classes[node.name] = ConfigClass(
                    name=node.name,
                    bases=tuple(ast.unparse(base) for base in node.bases),
                    doc=(ast.get_docstring(node) or "").strip(),
                    fields=tuple(_fields(node)),
                )
    return classes


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)


def _fields(node: ast.ClassDef) -> Iterator[Field]:
    for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        doc = ""
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            doc = " ".join(str(following.value.value).split())
        yield Field(
            statement.target.id, ast.unparse(statement.annotation), _default(statement.value), doc
        )


def _default(value: ast.expr | None) -> str:
    """Source of a default; of `field(default_factory=lambda: X)`, X."""
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "field":
        for keyword in value.keywords:
            if keyword.arg == "default":
                return ast.unparse(keyword.value)
            if keyword.arg == "default_factory" and isinstance(keyword.value, ast.Lambda):
                return ast.unparse(keyword.value.body)
            if keyword.arg == "default_factory":
                empty = {"dict": "{}", "list": "[]"}
                return empty.get(ast.unparse(keyword.value), "")
    text = "" if value is None else ast.unparse(value)
    return "" if text == "MISSING" else text


def options(root: Path, group: str) -> dict[str, str]:
    """Option -> what the comment at the top of its YAML file says."""
    comments = {}
    for path in sorted((root / "conf" / group).glob("*.yaml")):
        comment = []
        for line in path.read_text("utf-8").splitlines():
            if not line.startswith("#"):
                break
            if "@package" not in line:
                comment.append(line.removeprefix("#").strip())
        comments[path.stem] = " ".join(comment)
    return comments


def config_page(root: Path) -> str:
    """The page, as Markdown."""
    classes = config_classes(root)
    run = classes["RunConfig"]
    groups = {f.name: f.annotation for f in run.fields if f.annotation in classes}
    lines = [
        "# Configuration",
        "",
        "Every setting of a run. `group=option` chooses an option of a group, `group.key=value` "
        "changes one setting, and a top-level key is typed alone. `python -m saexp --cfg job` "
        "prints the composed configuration of a command without running it.",
        "",
        "## Top-level keys",
        "",
        *_table("", [f for f in run.fields if f.name not in groups]),
    ]
    for group, name in groups.items():
        lines += ["", f"## {group}", "", classes[name].doc, ""]
        listed = options(root, group)
        if listed:
            lines += [f"| `{group}=` | |", "|---|---|"]
            lines += [f"| `{option}` | {_escaped(doc)} |" for option, doc in listed.items()] + [""]
        lines += _table(f"{group}.", classes[name].fields)
        for title, doc, fields in _special(group, name, classes, listed):
            lines += ["", f"### {title}", "", doc, "", *_table(f"{group}.", fields)]
    experiments = options(root, "experiment")
    lines += ["", "## experiment", "", "Settings of a study, over the groups above.", ""]
    lines += ["| `experiment=` | |", "|---|---|"]
    lines += [f"| `{name}` | {_escaped(doc)} |" for name, doc in experiments.items()]
    return "\n".join(lines) + "\n"


def _special(
    group: str, base: str, classes: dict[str, ConfigClass], listed: dict[str, str]
) -> Iterator[tuple[str, str, tuple[Field, ...]]]:
    """Title, description and settings of each option that has a dataclass below `base`."""
    for name, described in classes.items():
        chain = _chain(name, base, classes)
        fields = tuple(f for below in chain for f in classes[below].fields)
        option = _option(name, base, listed)
        if chain and fields and option:
            yield f"Only with `{group}={option}`", described.doc, fields
        elif chain and fields and name.startswith("Custom"):
            yield f"Only with a custom {group}", described.doc, fields


def _chain(name: str, base: str, classes: dict[str, ConfigClass]) -> list[str]:
    """The dataclasses from below `base` down to `name`; empty where `name` is not below it."""
    for parent in classes[name].bases if name in classes else ():
        if parent == base:
            return [name]
        if above := _chain(parent, base, classes):
            return [*above, name]
    return []


def _option(name: str, base: str, listed: dict[str, str]) -> str:
    """The option whose dataclass is `name`: TopFeaturesConfig of analyzer -> top_features."""
    plain = name.removesuffix("Config").removesuffix(base.removesuffix("Config")).lower()
    return next((option for option in listed if option.replace("_", "") == plain), "")


def _table(prefix: str, fields: list[Field] | tuple[Field, ...]) -> list[str]:
    if not fields:
        return ["No settings beyond the choice of the option."]
    lines = ["| key | type | default | |", "|---|---|---|---|"]
    for field in fields:
        default = f"`{_escaped(_typed(field.default), code=True)}`" if field.default else ""
        lines.append(
            f"| `{prefix}{field.name}` | `{_escaped(field.annotation, code=True)}` | {default} "
            f"| {_escaped(field.doc)} |"
        )
    return lines


def _typed(default: str) -> str:
    """A default as it is typed on the command line: `null`, `true`, `[resid_post]`."""
    try:
        return _in_hydra(ast.literal_eval(default))
    except ValueError:
        return default


def _in_hydra(value: object) -> str:
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_in_hydra, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}: {_in_hydra(v)}" for k, v in value.items()) + "}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value) if value != "" else "''"


def _escaped(text: str, code: bool = False) -> str:
    """Text for a table cell; code spans are left as they are."""
    if code:
        return text
    parts = text.split("`")
    for i in range(0, len(parts), 2):
        for special in "|*[":
            parts[i] = parts[i].replace(special, f"\\{special}")
        parts[i] = parts[i].replace("<", "&lt;")
    return "`".join(parts)
