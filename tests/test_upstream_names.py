"""Every name, keyword and field of Megatron's that we use exists in each release of it that we say we run on.

Read from sources on both sides (`upstream_names.py`); the releases' side is kept in `upstream_names.json`.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from nemo_dapo.config import reserved
from tests.upstream_names import ROOT, SETTINGS, STACKS, TABLE, Uses, our_settings, our_uses

TABLES: dict[str, dict[str, Any]] = json.loads(TABLE.read_text())
AGAIN = "; if the releases have it, make the table anew: see tests/upstream_names.py"


@pytest.fixture(scope="module")
def uses() -> Uses:
    return our_uses()


def test_the_table_holds_the_releases_that_are_named() -> None:
    assert [*TABLES] == [f"megatron-core {core}, megatron-bridge {bridge}" for core, bridge in STACKS]


def missing(symbol: str, keywords: set[str], release: dict[str, Any]) -> Iterator[str]:
    if symbol not in release["parameters"]:
        yield symbol
        return
    parameters = set(release["parameters"][symbol].split())
    if "*" not in parameters:
        yield from (f"{symbol}({keyword}=)" for keyword in sorted(keywords - parameters))


@pytest.mark.parametrize("stack", TABLES)
def test_every_import_and_keyword_exists(stack: str, uses: Uses) -> None:
    release = TABLES[stack]
    gone = [name for symbol, keywords in uses.keywords.items() for name in missing(symbol, keywords, release)]
    gone += uses.modules - set(release["modules"])
    assert not gone, f"{stack} lacks {gone}{AGAIN}"


@pytest.mark.parametrize("stack", TABLES)
def test_every_method_and_attribute_of_megatrons_objects_exists(stack: str, uses: Uses) -> None:
    gone = [
        name
        for symbol, attributes in uses.attributes.items()
        for attribute, keywords in attributes.items()
        if not hasattr(torch.nn.Module, attribute)  # DistributedDataParallel is one
        for name in missing(f"{symbol}.{attribute}", keywords, TABLES[stack])
    ]
    assert not gone, f"{stack} lacks {gone}{AGAIN}"


@pytest.mark.parametrize("stack", TABLES)
@pytest.mark.parametrize(("file", "config"), SETTINGS)
def test_every_setting_is_a_field(stack: str, file: str, config: str) -> None:
    ours = our_settings(file, config)
    assert len(ours) > 3, "nothing was read: this test could not fail"
    assert not ours - set(TABLES[stack]["fields"][config].split())


@pytest.mark.parametrize(("option", "config"), [*zip(reserved.TABLES, ("model", "optimizer", "ddp"), strict=True)])
def test_every_reserved_option_is_a_field_of_some_release(option: str, config: str) -> None:
    known = {name for release in TABLES.values() for name in release["fields"][config].split()}
    assert not reserved.TABLES[option].keys() - known


def test_the_hook_on_the_last_hidden_states_passes_what_our_function_takes() -> None:
    """Releases before 0.18 have none: there the output layer's forward is replaced."""
    tree = ast.parse((ROOT / "nemo_dapo" / "megatron" / "head.py").read_text())
    (ours,) = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "_process_output")
    taken = {argument.arg for argument in ours.args.kwonlyargs}
    passed = {stack: set(release["output_processor"]) for stack, release in TABLES.items()}
    assert [stack for stack, names in passed.items() if names] == [*TABLES][2:]
    for names in filter(None, passed.values()):
        assert taken <= names


def test_a_name_that_is_nowhere_would_be_noticed() -> None:
    release = next(iter(TABLES.values()))
    symbol = "megatron.core.optimizer:get_megatron_optimizer"
    assert [*missing(symbol, {"config", "no_such_keyword"}, release)] == [f"{symbol}(no_such_keyword=)"]
    assert [*missing("megatron.core:no_such_module", set(), release)] == ["megatron.core:no_such_module"]
