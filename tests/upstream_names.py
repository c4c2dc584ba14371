"""What we use of Megatron-core and Megatron-Bridge, and what their releases have: both read from sources, not imported.

Releases for Python 3.12 do not install beside the ones that the tests run on, so their names, parameters and fields are
kept in `upstream_names.json`. To make it anew, after a new use here or a new release there, in an empty folder:

    pip download --no-deps --python-version 3.12 --only-binary :all: megatron-core==0.18.2      (all of STACKS)
    python -m tests.upstream_names FOLDER
"""

from __future__ import annotations

import ast
import json
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TABLE = Path(__file__).with_suffix(".json")
# Megatron-core and the Megatron-Bridge made for it, as PyPI has them for Python 3.12; the first pair is what tests run on.
STACKS = (("0.16.1", "0.3.1"), ("0.17.1", "0.4.2"), ("0.18.2", "0.5.1"), ("0.19.2", "0.6.2"))

# The dataclasses whose fields our settings are: by the files that set them.
CONFIGS = {
    "model": "megatron.bridge.models.mla_provider:MLAModelProvider",  # TransformerConfig, GPTModelProvider and MLA's
    "optimizer": "megatron.core.optimizer:OptimizerConfig",
    "ddp": "megatron.core.distributed:DistributedDataParallelConfig",
}
# Objects that we get from Megatron: their classes, and the names in our sources that hold one.
OBJECTS = {
    "megatron.bridge:AutoBridge": ("bridge", "AutoBridge"),
    "megatron.core.distributed:DistributedDataParallel": ("chunk",),
    "megatron.core.optimizer:MegatronOptimizer": ("optimizer",),
    "megatron.core.optimizer_param_scheduler:OptimizerParamScheduler": ("scheduler",),
    "megatron.bridge.models.gpt_provider:GPTModelProvider": ("provider",),
}
# Calls whose function no name tells: what they reach, and the calls of ours that do.
CALLED = {
    "megatron.core.models.gpt.gpt_model:GPTModel.forward": "chunk",
    "megatron.core.pipeline_parallel.schedules:forward_backward_no_pipelining": "get_forward_backward_func",
    "megatron.core.pipeline_parallel.schedules:forward_backward_pipelining_without_interleaving": (
        "get_forward_backward_func"
    ),
}


@dataclass
class Uses:
    """`keywords`: of each upstream symbol `module:name` what it is called with; `attributes`: of the objects by class."""

    modules: set[str] = field(default_factory=set)
    keywords: dict[str, set[str]] = field(default_factory=dict)
    attributes: dict[str, dict[str, set[str]]] = field(default_factory=dict)

    def add(self, symbol: str, keywords: set[str]) -> None:
        self.keywords.setdefault(symbol, set()).update(keywords)


def our_uses() -> Uses:
    """Everything under nemo_dapo/megatron that names something of Megatron's."""
    uses = Uses()
    for file in sorted((ROOT / "nemo_dapo" / "megatron").glob("*.py")):
        _read_uses(ast.parse(file.read_text()), uses)
    return uses


# Which functions and constants of ours hold settings, by the file and the dataclass they end in.
SETTINGS = {
    ("provider.py", "model"): (
        *("numerics", "layout", "rotary_positions", "_latent_rope", "latent_attention", "without_side_losses"),
        *("transformer_engine", "plain_torch", "FULL_RECOMPUTATION", "eight_bits"),
    ),
    ("optimizer.py", "optimizer"): ("make_optimizer",),
    ("optimizer.py", "ddp"): ("ddp_config",),
}


def our_settings(file: str, config: str) -> set[str]:
    """Names of upstream fields that we set there: keys of mappings and of assignments to them."""
    tree = ast.parse((ROOT / "nemo_dapo" / "megatron" / file).read_text())
    wanted = SETTINGS[file, config]
    holders = [n for n in tree.body if getattr(n, "name", "") in wanted or _assigned(n) & set(wanted)]
    assert len(holders) == len(wanted), f"{file} has not all of {wanted}"
    return {name for holder in holders for node in ast.walk(holder) for name in _keys(node)}


def _keys(node: ast.AST) -> Iterator[str]:
    keys: list[Any] = []
    if isinstance(node, ast.Dict):
        keys = node.keys
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "fromkeys":
        keys = node.args[0].elts if isinstance(node.args[0], ast.Tuple) else []
    elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
        keys = [node.slice]
    yield from (key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str))


def _read_uses(tree: ast.Module, uses: Uses) -> None:
    aliases = dict(_aliases(tree))
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        keywords = {k.arg for k in calls[id(node)].keywords if k.arg} if id(node) in calls else set()
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("megatron.core."):
            uses.modules.add(node.value)
        elif isinstance(node, ast.Name) and node.id in aliases:
            uses.add(aliases[node.id], keywords)
        elif isinstance(node, ast.Attribute):
            _read_attribute(node, keywords, aliases, uses)
        for symbol, ours in CALLED.items():
            if isinstance(node, ast.Call) and _called_name(node) == ours:
                uses.add(symbol, {k.arg for k in node.keywords if k.arg})


def _aliases(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron"):
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}:{alias.name}"


def _read_attribute(node: ast.Attribute, keywords: set[str], aliases: dict[str, str], uses: Uses) -> None:
    owner = node.value
    if isinstance(owner, ast.Name) and owner.id in aliases:
        uses.add(f"{aliases[owner.id]}.{node.attr}", keywords)
    name = owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else ""
    for symbol, holders in OBJECTS.items():
        if name in holders:
            uses.attributes.setdefault(symbol, {}).setdefault(node.attr, set()).update(keywords)


def _called_name(call: ast.Call) -> str:
    function = call.func
    if isinstance(function, ast.Call):  # get_forward_backward_func()(…)
        function = function.func
        return function.id if isinstance(function, ast.Name) else ""
    return function.id if isinstance(function, ast.Name) and call.keywords and function.id == "chunk" else ""


# ------------------------------------------------------------------ what a release has


class Sources:
    """The unpacked wheels of one stack."""

    def __init__(self, folders: list[Path]) -> None:
        self.folders = folders
        self.trees: dict[str, ast.Module | None] = {}

    def module(self, name: str) -> ast.Module | None:
        """The module's tree; None where there is none of that name."""
        if name not in self.trees:
            path = name.replace(".", "/")
            files = (folder / file for folder in self.folders for file in (f"{path}.py", f"{path}/__init__.py"))
            found = next((file for file in files if file.is_file()), None)
            self.trees[name] = ast.parse(found.read_text()) if found else None
        return self.trees[name]

    def find(self, symbol: str) -> tuple[str, ast.AST] | None:
        """`module:name.attribute` -> where it is defined, through re-exports and base classes, and its definition."""
        module, _, path = symbol.partition(":")
        first, *rest = path.split(".")
        at = self._in_module(module, first)
        for name in rest:
            if at is None:
                return None
            where, node = at
            if isinstance(node, ast.Module):
                at = self._in_module(where, name)
            else:
                at = self._in_class(where, node, name) if isinstance(node, ast.ClassDef) else None
        return at

    def _in_module(self, module: str, name: str) -> tuple[str, ast.AST] | None:
        tree = self.module(module)
        if tree is None:
            return None
        if (submodule := self.module(f"{module}.{name}")) is not None:
            return f"{module}.{name}", submodule
        # The last definition holds, but one under `except ImportError` that only stands for a missing one.
        found: tuple[str, ast.AST] | None = None
        for node in _statements(tree.body):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
                found = module, node
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        found = self._in_module(_absolute(self, module, node), alias.name) or found
            elif found is None and name in _assigned(node):
                found = module, node
        return found

    def classes(self, module: str, node: ast.ClassDef) -> Iterator[tuple[str, ast.ClassDef]]:
        """The class and its bases in these sources."""
        yield module, node
        for base in node.bases:
            name = base.id if isinstance(base, ast.Name) else base.value.id if _is_generic(base) else ""  # type: ignore[attr-defined]
            at = self._in_module(module, name) if name else None
            if at and isinstance(at[1], ast.ClassDef) and at[1] is not node:
                yield from self.classes(*at)  # type: ignore[arg-type]

    def _in_class(self, module: str, node: ast.ClassDef, name: str) -> tuple[str, ast.AST] | None:
        for where, each in self.classes(module, node):
            for part in ast.walk(each):
                if isinstance(part, ast.FunctionDef) and part.name == name:
                    return where, part
                if name in _assigned(part):
                    return where, part
                if isinstance(part, ast.Attribute) and part.attr == name and isinstance(part.ctx, ast.Store):
                    return where, part
        return None

    def fields(self, symbol: str) -> list[str]:
        """Of a dataclass and its bases."""
        at = self.find(symbol)
        assert at is not None, symbol
        assert isinstance(at[1], ast.ClassDef), symbol
        found = {
            part.target.id
            for _, each in self.classes(at[0], at[1])
            for part in each.body
            if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
        }
        return sorted(found)

    def parameters(self, symbol: str) -> list[str] | None:
        """Of a function, or of a class's constructor; `*` for any; None where the symbol is missing."""
        at = self.find(symbol)
        if at is None:
            return None
        if isinstance(at[1], ast.ClassDef):
            init = self._in_class(at[0], at[1], "__init__")
            return _parameters(init[1]) if init else [*self.fields(symbol)]
        return _parameters(at[1])


def _assigned(node: ast.AST) -> set[str]:
    """Plain names that a statement gives a value or a type."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _is_generic(base: ast.expr) -> bool:
    return isinstance(base, ast.Subscript) and isinstance(base.value, ast.Name)


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Those of a module, also under `try` and `if`."""
    for node in body:
        yield node
        for inner in ("body", "orelse", "handlers"):
            if isinstance(node, ast.Try | ast.If | ast.ExceptHandler):
                yield from _statements(getattr(node, inner, []))


def _absolute(sources: Sources, module: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    is_package = any((folder / module.replace(".", "/")).is_dir() for folder in sources.folders)
    parts = module.split(".")[: None if is_package and node.level == 1 else -(node.level - is_package)]
    return ".".join([*parts, *([node.module] if node.module else [])])


def _parameters(node: ast.AST) -> list[str]:
    if not isinstance(node, ast.FunctionDef):
        return ["*"]
    given = node.args
    names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return [*names, "*"] if given.kwarg else names


def _keywords_of(function: str, tree: ast.Module | None) -> set[str]:
    """What a module's calls of `function` pass by name."""
    calls = (
        n for n in ast.walk(tree or ast.Module([], [])) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
    )
    return {k.arg for n in calls if n.func.id == function for k in n.keywords if k.arg}  # type: ignore[attr-defined]


def extract(folders: list[Path]) -> dict[str, Any]:
    """One stack's row of the table: what it has of our uses, and the fields of its configurations."""
    sources, uses = Sources(folders), our_uses()
    attributes = (f"{symbol}.{name}" for symbol, names in uses.attributes.items() for name in names)
    symbols = sorted({*uses.keywords, *attributes})
    return {
        "modules": sorted(name for name in uses.modules if sources.module(name) is not None),
        "parameters": {s: " ".join(found) for s in symbols if (found := sources.parameters(s)) is not None},
        "fields": {name: " ".join(sources.fields(symbol)) for name, symbol in CONFIGS.items()},
        "output_processor": sorted(
            _keywords_of("output_processor", sources.module("megatron.core.models.gpt.gpt_model"))
        ),
    }


def main(wheels: Path) -> None:
    table = {}
    for core, bridge in STACKS:
        folders = []
        for name, version in (("megatron_core", core), ("megatron_bridge", bridge)):
            (wheel,) = wheels.glob(f"{name}-{version}-*.whl")
            folders.append(wheels / "unpacked" / f"{name}-{version}")
            zipfile.ZipFile(wheel).extractall(folders[-1])
        table[f"megatron-core {core}, megatron-bridge {bridge}"] = extract(folders)
    TABLE.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
